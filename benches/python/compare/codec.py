"""Quantizing and dequantizing a weight of 4096x4096."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import nybble as nb
from compare import ours
from compare.cell import Entry, Run, entry
from compare.weights import BF16, F16, F32, copies_of, short

_SHAPE = (4096, 4096)
_ELEMENTS = _SHAPE[0] * _SHAPE[1]
_OF = {"shape": "4096x4096", "elements": _ELEMENTS}


def quantize(run: Run) -> None:
    """From every dtype, to every format; bitsandbytes for the formats that it has."""
    dtypes = (F32, BF16) if run.quick else (F32, BF16, F16)
    torch.manual_seed(0)
    for dtype in dtypes:
        size = _ELEMENTS * dtype.itemsize
        first = (torch.randn(*_SHAPE) * 0.02).to(dtype)
        sources = [first, *(first.clone() for _ in range(copies_of(size) - 1))]
        entries: list[Entry] = []
        for format in ("nf4", "fp4", "int4", "mxfp4", "dynamic8", "int8"):
            q = nb.quantize(first, format)
            how: dict[str, Any] = {"dtype": short(dtype), "nbytes": size + ours.nbytes(q)}
            entries.append(entry(format, "nybble", _quantize(sources, format), **how))
            if ours.takes(nb.quantize, "out"):
                call = _quantize(sources, format, out=q)
                entries.append(entry(f"{format} out=", "nybble", call, **how))
            if format == "nf4":
                call = _quantize(sources, format, nested=True)
                entries.append(entry("nf4 nested", "nybble", call, **how))
            if dtype == F32 or not run.quick:
                entries += _bitsandbytes(sources, format, how)
        run.measure("quantize", entries, beside=[run.limits.read, run.limits.copy], **_OF)
    if not ours.takes(nb.quantize, "out"):
        run.notes.append("nb.quantize has no argument `out`")


def dequantize(run: Run) -> None:
    """To a fresh tensor, and into a given one where this version can."""
    torch.manual_seed(0)
    first = torch.randn(*_SHAPE) * 0.02
    entries: list[Entry] = []
    for format in ("nf4", "dynamic8", "int8"):
        qs = ours.copied(nb.quantize(first, format))
        for dtype in (BF16, F32):
            size = ours.nbytes(qs[0]) + _ELEMENTS * dtype.itemsize
            how: dict[str, Any] = {"dtype": short(dtype), "nbytes": size}
            entries.append(entry(f"{format} fresh", "nybble", _dequantize(qs, dtype), **how))
            if ours.takes(nb.dequantize, "out"):
                outs = [torch.empty(_SHAPE, dtype=dtype) for _ in range(4)]
                call = _dequantize(qs, dtype, outs)
                entries.append(entry(f"{format} out=", "nybble", call, **how))
    entries += _bitsandbytes_dequantize(first)
    run.measure("dequantize", entries, beside=[run.limits.read, run.limits.copy], **_OF)
    if not ours.takes(nb.dequantize, "out"):
        run.notes.append("nb.dequantize has no argument `out`: a given tensor is not measured")


def _quantize(sources: list[torch.Tensor], format: str, **options: Any) -> Callable[[int], Any]:
    return lambda i: nb.quantize(sources[i % len(sources)], format, **options)


def _dequantize(
    qs: list[nb.QTensor], dtype: torch.dtype, outs: list[torch.Tensor] | None = None
) -> Callable[[int], Any]:
    if outs is None:
        return lambda i: nb.dequantize(qs[i % len(qs)], dtype)
    return lambda i: nb.dequantize(qs[i % len(qs)], out=outs[i % len(outs)])  # type: ignore[call-arg]


def _bitsandbytes(sources: list[torch.Tensor], format: str, how: dict[str, Any]) -> list[Entry]:
    """bitsandbytes' function for the format, if it is installed and has one."""
    try:
        import bitsandbytes.functional as functional
    except ImportError:
        return []
    ways: dict[str, Callable[[torch.Tensor], Any]] = {
        "nf4": lambda x: functional.quantize_4bit(x, quant_type="nf4"),
        "fp4": lambda x: functional.quantize_4bit(x, quant_type="fp4"),
        "dynamic8": lambda x: functional.quantize_blockwise(x, blocksize=256),
        "int8": lambda x: functional.int8_vectorwise_quant(x.to(F16)),
    }
    if format not in ways:
        return []
    way = ways[format]
    call = lambda i: way(sources[i % len(sources)])  # noqa: E731 (as short as it gets)
    return [entry(format, "bitsandbytes", call, warm=1, **how)]


def _bitsandbytes_dequantize(first: torch.Tensor) -> list[Entry]:
    try:
        import bitsandbytes.functional as functional
    except ImportError:
        return []
    packed, state = functional.quantize_4bit(first.to(BF16), quant_type="nf4")
    size = packed.numel() + state.absmax.numel() * 4 + _ELEMENTS * BF16.itemsize
    how: dict[str, Any] = {"dtype": "bf16", "nbytes": size}
    return [
        entry(
            "nf4 fresh", "bitsandbytes", lambda _: functional.dequantize_4bit(packed, state), **how
        ),
    ]
