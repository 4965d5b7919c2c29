"""The definition of each op in plain torch.

Slow and short. The tests compare the Rust core with it, and it serves every device that has no
kernels of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from nybble import _core

if TYPE_CHECKING:
    from nybble._core import FormatRow

NESTED_BLOCKSIZE = 256
_INVERSE_QMAX = 7.874015718698502e-3


@functools.cache
def spec(format: str) -> FormatRow:
    """The row of the table of formats."""
    return {row["name"]: row for row in _core.formats()}[format]


def scale_dtype(format: str, nested: bool) -> torch.dtype:
    """The type that scales are stored in: bytes if they are codes themselves."""
    is_code = nested or spec(format)["scale_dtype"] == "uint8"
    return torch.uint8 if is_code else torch.float32


def is_row_wise(format: str) -> bool:
    """Whether codes are signed integers with one scale a row (LLM.int8())."""
    return spec(format)["decode"] == "integer"


@functools.cache
def codebook(format: str, device: torch.device) -> torch.Tensor:
    """The value of each code, float32."""
    return torch.tensor(spec(format)["codebook"], dtype=torch.float32, device=device)


def _blocks(flat: torch.Tensor, blocksize: int) -> torch.Tensor:
    padding = -flat.numel() % blocksize
    return torch.nn.functional.pad(flat, (0, padding)).reshape(-1, blocksize)


def decode_scales(
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
) -> torch.Tensor:
    """The float32 scale of each block."""
    if nested_absmax is not None and nested_offset is not None:
        values = codebook("dynamic8", absmax.device)[absmax.long()]
        scales = _blocks(values, NESTED_BLOCKSIZE) * nested_absmax[:, None]
        return scales.flatten()[: absmax.numel()] + nested_offset
    if absmax.dtype == torch.uint8:
        return torch.exp2(absmax.double() - 127).float()
    return absmax


def unpack(packed: torch.Tensor, elements: int) -> torch.Tensor:
    """One code an element, from nibbles with the first element high."""
    packed = packed.flatten().view(torch.uint8)
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[:elements]


def dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    format: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Decode: value = codebook[code] * scale in float32, rounded once."""
    row = spec(format)
    if is_row_wise(format):
        columns = shape[-1] if shape else 1
        codes = packed.reshape(-1, columns) if columns else packed.reshape(absmax.numel(), 0)
        return (codes.float() * absmax[:, None] * _INVERSE_QMAX).to(dtype).reshape(tuple(shape))
    elements = 1
    for extent in shape:
        elements *= extent
    codes = unpack(packed, elements) if row["bits"] == 4 else packed.flatten()
    values = codebook(format, packed.device)[codes.long()]
    scales = decode_scales(absmax, nested_absmax, nested_offset)
    blocks = _blocks(values, blocksize) * scales[:, None]
    return blocks.flatten()[:elements].to(dtype).reshape(tuple(shape))


def quantize(x: torch.Tensor, format: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (one an element, flat) and float32 scales of a blockwise float32-scaled format.

    Nearest value, ties to the lower one; whole and short blocks are multiplied by 1/absmax.
    """
    values = codebook(format, x.device)
    ordered, order = torch.sort(values, stable=True)
    pivots = (ordered[:-1] + ordered[1:]) / 2
    blocks = _blocks(x.flatten().float(), blocksize)
    absmax = blocks.abs().amax(dim=1) if blocks.numel() else blocks.new_zeros(0)
    reciprocal = torch.where(absmax > 0, 1 / absmax, torch.zeros_like(absmax))
    position = torch.bucketize(blocks * reciprocal[:, None], pivots)
    return order[position].flatten()[: x.numel()].to(torch.uint8), absmax


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    format: str,
    blocksize: int,
    shape: Sequence[int],
) -> torch.Tensor:
    """`x @ dequantize(weight).T + bias` in the dtype of x."""
    weight = dequantize(
        packed, absmax, nested_absmax, nested_offset, format, blocksize, shape, x.dtype
    )
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def linear_backward(
    grad: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    format: str,
    blocksize: int,
    shape: Sequence[int],
) -> torch.Tensor:
    """`grad @ dequantize(weight)` in the dtype of grad: the gradient of the input of `linear`."""
    return grad @ dequantize(
        packed, absmax, nested_absmax, nested_offset, format, blocksize, shape, grad.dtype
    )


def embedding(
    ids: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_offset: torch.Tensor | None,
    format: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows of the decoded table."""
    table = dequantize(
        packed, absmax, nested_absmax, nested_offset, format, blocksize, shape, dtype
    )
    return torch.nn.functional.embedding(ids, table)


def int8_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
) -> torch.Tensor:
    """LLM.int8(): rows of x become signed bytes; columns of outliers are multiplied apart."""
    flat = x.reshape(-1, x.shape[-1]).float()
    outlier = (flat.abs() >= threshold).any(dim=0) if threshold > 0 else None
    inliers = flat if outlier is None else flat.masked_fill(outlier, 0.0)
    scale = inliers.abs().amax(dim=1, keepdim=True) if x.shape[-1] else flat.new_zeros(len(flat), 1)
    # Not `127 / scale`: torch takes that for 127 times the reciprocal, which rounds twice.
    factor = torch.full_like(scale, 127) / scale
    factor = torch.where(scale > 0, factor, torch.zeros_like(scale))
    codes = torch.round(inliers * factor)
    product = (codes.double() @ packed.double().T).float()
    out = product * (scale * absmax) * (1 / 127**2)
    if outlier is not None:
        weight = packed[:, outlier].float() * absmax[:, None] * _INVERSE_QMAX
        out = out + flat[:, outlier] @ weight.T
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).reshape(*x.shape[:-1], packed.shape[0])
