"""Models that nybble quantized in transformers, seen by real bitsandbytes."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nybble.nn.quantized import QuantizedModule

pytestmark = [
    pytest.mark.parity,
    # bitsandbytes' own: int8 products of other dtypes than float16, and torch's deprecations.
    pytest.mark.filterwarnings("default"),
]
bnb = pytest.importorskip("bitsandbytes")
tf = pytest.importorskip("transformers")
hf = pytest.importorskip("nybble.hf")

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "AutoModelForCausalLM", {**LLAMA, "tie_word_embeddings": False}),
    "qwen2 tied": ("qwen2", "AutoModelForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "gpt2": (
        "gpt2",
        "AutoModelForCausalLM",
        {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 128, "n_positions": 64},
    ),
    "bert": (
        "bert",
        "AutoModelForSequenceClassification",
        {key: LLAMA[key] for key in LLAMA if key != "num_key_value_heads"},
    ),
    "t5": (
        "t5",
        "AutoModelForSeq2SeqLM",
        {"d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 2, "num_heads": 2}
        | {"vocab_size": 128, "decoder_start_token_id": 0},
    ),
}
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"format": "nf4"},
    "nf4 nested": {"format": "nf4", "nested": True},
    "fp4": {"format": "fp4"},
    "int8": {"format": "int8"},
    "nf4 skip": {"format": "nf4", "skip": ["lm_head", "k_proj", "key", "k"]},
}


def theirs(kind: dict[str, Any]) -> Any:
    skip = {"llm_int8_skip_modules": kind.get("skip")}
    if kind["format"] == "int8":
        return tf.BitsAndBytesConfig(load_in_8bit=True, **skip)
    return tf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind["format"],
        bnb_4bit_use_double_quant=kind.get("nested", False),
        bnb_4bit_compute_dtype=torch.bfloat16,
        **skip,
    )


def decoded(module: nn.Module) -> torch.Tensor:
    weight: Any = module.weight
    if isinstance(module, bnb.nn.Linear4bit):
        # As one long row: with AVX-512, bitsandbytes finds the scale of a block by its row, which
        # is wrong where rows are not whole blocks.
        state = copy.copy(weight.quant_state)
        state.shape = torch.Size([math.prod(state.shape)])
        flat = bnb.functional.dequantize_4bit(weight.data, state)
        return flat.reshape(weight.quant_state.shape)
    return bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_bitsandbytes_would_have_written_the_same_and_loads_it(
    tmp_path: Path, model: str, kind: str
):
    architecture, auto, sizes = MODELS[model]
    cls = getattr(tf, auto)
    torch.manual_seed(0)
    config = tf.AutoConfig.for_model(architecture, **sizes)
    cls.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    options = KINDS[kind]
    ours = cls.from_pretrained(
        tmp_path / "dense",
        quantization_config=hf.NybbleConfig(
            **options, reference="bitsandbytes-cpu", compute_dtype="bfloat16"
        ),
        device_map="cpu",
    )
    hf.save_bitsandbytes(ours, tmp_path / "ours")
    reference = cls.from_pretrained(
        tmp_path / "dense", quantization_config=theirs(options), device_map="cpu"
    )
    reference.save_pretrained(tmp_path / "theirs")
    found, wanted = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    texts = [json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs")]
    assert texts[0] == texts[1]

    loaded = cls.from_pretrained(tmp_path / "ours", device_map="cpu")
    names = [n for n, m in ours.named_modules() if isinstance(m, QuantizedModule)]
    assert names
    for name in names:
        theirs_decoded = decoded(loaded.get_submodule(name))
        ours_decoded = ours.get_submodule(name).dequantize(theirs_decoded.dtype)
        assert torch.equal(theirs_decoded, ours_decoded), name
