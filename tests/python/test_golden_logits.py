"""Models of nybble's layers compute what models of the decoded weights compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import nybble as nb

GOLDEN = Path(__file__).parents[1] / "golden" / "bnb_checkpoints" / "llama_tied"


@pytest.mark.parametrize("kind", ["nf4_dq", "fp4", "int8"])
def test_logits_are_those_of_the_decoded_weights(kind):
    transformers = pytest.importorskip("transformers")
    np = pytest.importorskip("numpy")
    from safetensors.torch import load_file

    config = transformers.AutoConfig.from_pretrained(GOLDEN / "original")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    nb.load_model(model, GOLDEN / kind)
    assert any(isinstance(m, nb.nn.Linear4bit | nb.nn.Linear8bit) for m in model.modules())
    ids = torch.from_numpy(np.load(GOLDEN / "input_ids.npy")).long()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    want = load_file(GOLDEN / kind / "ref_logits.safetensors")["dequant_fp32"]
    assert float((logits - want).norm() / want.norm()) <= 1e-5
