"""nybble in the Hugging Face stack.

Importing this registers the quantization method `nybble` with transformers, so that
`from_pretrained(..., quantization_config=NybbleConfig("nf4"))` quantizes while loading and what
`save_pretrained` wrote loads again. It needs `pip install transformers accelerate`; what is about
adapters needs `pip install peft`.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING, Any

if _find_spec("transformers") is None:
    raise ImportError("nybble.hf needs transformers: pip install transformers accelerate")

from nybble.hf.bitsandbytes import (
    disable_bitsandbytes_checkpoints,
    enable_bitsandbytes_checkpoints,
    from_pretrained,
    save_bitsandbytes,
)
from nybble.hf.config import NybbleConfig
from nybble.hf.register import register as _register

if TYPE_CHECKING:
    from nybble.hf.adapters.config import lora_config
    from nybble.hf.adapters.loading import load_adapter
    from nybble.hf.adapters.merge import MergedLayer, MergeReport, merge
    from nybble.hf.adapters.prepare import prepare_for_qlora
    from nybble.hf.adapters.sharding import full_state_dict, save_adapter

# PEFT is imported when one of these is first used.
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
    "NybbleConfig",
    "disable_bitsandbytes_checkpoints",
    "enable_bitsandbytes_checkpoints",
    "from_pretrained",
    "full_state_dict",
    "load_adapter",
    "lora_config",
    "merge",
    "prepare_for_qlora",
    "save_adapter",
    "save_bitsandbytes",
]

_register()


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'nybble.hf' has no attribute '{name}'")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
