"""Launches of emulated kernels on tensors of the CPU, which stand for device memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from params import Scales

import nybble as nb

NAMES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
NESTED_BLOCKSIZE = 256


def at(tensor: torch.Tensor | None) -> int | None:
    """The address of a tensor."""
    return None if tensor is None else tensor.data_ptr()


def poisoned(shape: Any, dtype: torch.dtype) -> torch.Tensor:
    """Memory full of 0xff (NaN), so that what a kernel does not write is noticed."""
    out = torch.empty(shape, dtype=dtype)
    out.reshape(-1).view(torch.uint8).fill_(0xFF)
    return out


def scales_of(q: Any) -> tuple[Scales, list[torch.Tensor]]:
    """The scales of a QTensor, and what must stay alive meanwhile."""
    scales = Scales(log2_blocksize=int(math.log2(q.blocksize)))
    kept = []
    if q.nested:
        book = next(row["codebook"] for row in nb.formats() if row["name"] == "dynamic8")
        codebook = torch.tensor(book, dtype=torch.float32)
        kept = [codebook]
        scales.codes, scales.codebook = at(q.absmax), at(codebook)
        scales.nested_absmax, scales.offset = at(q.nested_absmax), at(q.nested_offset)
        scales.log2_nested_blocksize = int(math.log2(NESTED_BLOCKSIZE))
    elif q.absmax.dtype == torch.uint8:
        scales.codes = at(q.absmax)
    else:
        scales.absmax = at(q.absmax)
    return scales, kept


def values_of(format: str) -> list[float]:
    """The table of a format."""
    table = next(row["codebook"] for row in nb.formats() if row["name"] == format)
    assert table is not None
    return list(table)
