"""Launches to look at from outside, in a process of their own.

`python -m gpu.launches BACKEND every` launches every kernel on small tensors, since a sanitizer
takes a hundred times as long; `... BACKEND large` launches a few on tensors as large as timed ones.
"""

from __future__ import annotations

import sys

import torch

import nybble as nb
from gpu.backend import Backend, backend
from nybble import cuda, reference

FORMATS = (("nf4", False), ("nf4", True), ("mxfp4", False), ("dynamic8", False), ("int8", False))
#: Rows of activations for every kernel of products, decoding included.
ROWS = (1, 9, 17, 40, 130, 257)


def every(there: Backend) -> None:
    """Every kernel."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for format, nested in FORMATS:
            for columns in (128, 72):
                _format(there, format, nested, columns, dtype)


def _format(there: Backend, format: str, nested: bool, columns: int, dtype: torch.dtype) -> None:
    w = there.random(72, columns, dtype=dtype)
    blocksize = 0 if reference.is_row_wise(format) else nb.quantize(w.cpu(), format).blocksize
    parts = there.op("quantize")(w, format, blocksize, nested, "exact", "error")
    parts = (*parts[:2], *(parts[2:] if nested else (None, None)))
    how = (format, blocksize, [72, columns])
    there.op("dequantize")(*parts, *how, dtype)
    cuda.ops.error_stats(w, *parts, *how)
    for rows in ROWS:
        x = there.random(rows, columns, dtype=dtype)
        there.op("linear")(x, *parts, None, *how)
        if format in ("nf4", "mxfp4") and rows < 10:
            there.op("integer_linear")(x, *parts, None, *how)
        if format == "int8":
            there.op("int8_linear")(x, *parts[:2], None, 2.0)
    there.wait()


def large(there: Backend) -> None:
    """The kernels whose counters are read."""
    shape = (48, 128) if there.fake else (14336, 4096)
    w = there.random(*shape)
    q = nb.quantize(w, "nf4")
    for rows in (1, 256):
        there.linear(there.random(rows, shape[1]), q)
    there.op("dequantize")(*q.parts, *q.how, torch.bfloat16)
    there.wait()


if __name__ == "__main__":
    {"every": every, "large": large}[sys.argv[2]](backend(sys.argv[1]))
