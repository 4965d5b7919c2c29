"""Checkpoint files: quantize, dequantize, open, verify.

Names are loaded when they are first used: neither converting nor looking at
files needs torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nybble.checkpoint.convert import dequantize_checkpoint, quantize_checkpoint
    from nybble.checkpoint.open import (
        Checkpoint,
        Entry,
        Problem,
        Summary,
        Totals,
        Verification,
        open_checkpoint,
    )
    from nybble.checkpoint.report import Report, TensorReport, TensorStats

_HOMES = {
    "nybble.checkpoint.convert": ("dequantize_checkpoint", "quantize_checkpoint"),
    "nybble.checkpoint.open": (
        "Checkpoint",
        "Entry",
        "Problem",
        "Summary",
        "Totals",
        "Verification",
        "open_checkpoint",
    ),
    "nybble.checkpoint.report": ("Report", "TensorReport", "TensorStats"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Checkpoint",
    "Entry",
    "Problem",
    "Report",
    "Summary",
    "TensorReport",
    "TensorStats",
    "Totals",
    "Verification",
    "dequantize_checkpoint",
    "open_checkpoint",
    "quantize_checkpoint",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'nybble.checkpoint' has no attribute '{name}'")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value
