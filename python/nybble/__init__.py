"""Quantize language models to 8 and 4 bits.

Names are loaded when they are first used, so that `import nybble` and the command line cost
nothing that they do not need: no torch, no CUDA, no network.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nybble._core import __version__
from nybble.errors import (
    CheckpointError,
    DeviceError,
    DtypeError,
    Error,
    FormatError,
    OutOfMemoryError,
    RowIndexError,
)

if TYPE_CHECKING:
    from nybble import nn
    from nybble.checkpoint import (
        Checkpoint,
        Report,
        dequantize_checkpoint,
        open_checkpoint,
        quantize_checkpoint,
    )
    from nybble.checkpoint.models import load_model, save_model
    from nybble.functional import (
        ErrorStats,
        dequantize,
        error,
        formats,
        linear,
        pack,
        quantize,
        unpack,
    )
    from nybble.nn.replace import Coverage, dequantize_model, quantize_model
    from nybble.qtensor import QTensor

_HOMES = {
    "nybble.checkpoint": (
        "Checkpoint",
        "Report",
        "RowIndexError",
        "dequantize_checkpoint",
        "open_checkpoint",
        "quantize_checkpoint",
    ),
    "nybble.functional": (
        "ErrorStats",
        "dequantize",
        "error",
        "formats",
        "linear",
        "pack",
        "quantize",
        "unpack",
    ),
    "nybble.checkpoint.models": ("load_model", "save_model"),
    "nybble.nn.replace": ("Coverage", "dequantize_model", "quantize_model"),
    "nybble.qtensor": ("QTensor",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Coverage",
    "DeviceError",
    "DtypeError",
    "Error",
    "ErrorStats",
    "FormatError",
    "OutOfMemoryError",
    "QTensor",
    "Report",
    "RowIndexError",
    "__version__",
    "dequantize",
    "dequantize_checkpoint",
    "dequantize_model",
    "error",
    "formats",
    "linear",
    "load_model",
    "nn",
    "open_checkpoint",
    "pack",
    "quantize",
    "quantize_checkpoint",
    "quantize_model",
    "save_model",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name == "nn":
        return importlib.import_module("nybble.nn")
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'nybble' has no attribute '{name}'")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
