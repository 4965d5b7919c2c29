"""Small models of several architectures, and the checkpoints that bitsandbytes made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

GOLDEN = Path(__file__).parents[2] / "golden" / "bnb_checkpoints"


@pytest.fixture
def golden() -> Path:
    """The directory of the checkpoints."""
    return GOLDEN


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """`make("gpt2")` saves a small random model and returns its directory."""

    def make(kind: str, auto: str = "AutoModelForCausalLM", **options: Any) -> Path:
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **_SIZES[kind], **options)
        model = getattr(transformers, auto).from_config(config, dtype=torch.bfloat16)
        path = tmp_path / f"{kind}-{auto}"
        model.save_pretrained(path)
        return path

    return make


_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
_SIZES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 128, "n_positions": 64},
    "bert": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 128,
    },
    "t5": {
        "d_model": 64,
        "d_kv": 32,
        "d_ff": 96,
        "num_layers": 2,
        "num_heads": 2,
        "vocab_size": 128,
        "decoder_start_token_id": 0,
    },
}
