"""nybble in the Hugging Face stack.

Importing this registers the quantization method `nybble` with transformers, so that
`from_pretrained(..., quantization_config=NybbleConfig("nf4"))` quantizes while loading and what
`save_pretrained` wrote loads again. It needs `pip install transformers accelerate`.
"""

from __future__ import annotations

from importlib.util import find_spec as _find_spec

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

__all__ = [
    "NybbleConfig",
    "disable_bitsandbytes_checkpoints",
    "enable_bitsandbytes_checkpoints",
    "from_pretrained",
    "save_bitsandbytes",
]

_register()
