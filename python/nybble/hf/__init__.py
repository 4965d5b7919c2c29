"""Hugging Face: transformers models and PEFT adapters with quantized layers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nybble.hf.adapters.config import lora_config
    from nybble.hf.adapters.loading import load_adapter
    from nybble.hf.adapters.merge import MergedLayer, MergeReport, merge
    from nybble.hf.adapters.prepare import prepare_for_qlora
    from nybble.hf.adapters.sharding import full_state_dict, save_adapter

_HOMES = {
    "nybble.hf.adapters.config": ("lora_config",),
    "nybble.hf.adapters.loading": ("load_adapter",),
    "nybble.hf.adapters.merge": ("MergeReport", "MergedLayer", "merge"),
    "nybble.hf.adapters.prepare": ("prepare_for_qlora",),
    "nybble.hf.adapters.sharding": ("full_state_dict", "save_adapter"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "MergeReport",
    "MergedLayer",
    "full_state_dict",
    "load_adapter",
    "lora_config",
    "merge",
    "prepare_for_qlora",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'nybble.hf' has no attribute '{name}'")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
