"""Matrices out of a quantized tensor that holds many, without decoding it."""

from __future__ import annotations

from dataclasses import replace

import torch

from nybble import reference
from nybble.errors import FormatError
from nybble.qtensor import QTensor


def rows(q: QTensor, start: int, stop: int) -> QTensor:
    """Rows of a quantized tensor that is seen as a matrix [..., columns]; decodes to the same bits.

    Scales that are quantized themselves stay so if the rows begin and end with a group of 256
    scales; else they are stored as float32, with the values that they decode to.

    Args:
        q: Any quantized tensor of rank 1 or more.
        start: First row.
        stop: Row after the last.

    Returns:
        [stop - start, columns], with memory of its own.

    Raises:
        FormatError: A block of elements with a common scale lies across the border.
    """
    columns = q.shape[-1]
    shape = torch.Size((stop - start, columns))
    if reference.is_row_wise(q.format):
        packed = q.packed.reshape(-1, columns)[start:stop].clone()
        return replace(q, packed=packed, absmax=q.absmax[start:stop].clone(), shape=shape)
    first, last = start * columns, stop * columns
    at_end = last == q.numel()
    if first % q.blocksize or (last % q.blocksize and not at_end):
        raise FormatError(
            f"rows {start} to {stop} of a tensor {list(q.shape)} do not begin and end with a block"
            f" of {q.blocksize} elements; they cannot be taken out of it without quantizing again"
        )
    bits = reference.spec(q.format)["bits"]
    packed = q.packed.flatten().view(torch.uint8)[first * bits // 8 : -(-last * bits // 8)]
    absmax, nested, offset = _scales(q, first // q.blocksize, -(-last // q.blocksize), at_end)
    return replace(
        q,
        packed=packed.clone(),
        absmax=absmax.clone(),
        shape=shape,
        nested_absmax=nested,
        nested_offset=offset,
    )


def _scales(
    q: QTensor, first: int, last: int, at_end: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    if q.nested_absmax is None or q.nested_offset is None:
        return q.absmax[first:last], None, None
    size = reference.NESTED_BLOCKSIZE
    if first % size == 0 and (last % size == 0 or at_end):
        groups = q.nested_absmax[first // size : -(-last // size)]
        return q.absmax[first:last], groups.clone(), q.nested_offset.clone()
    scales = reference.decode_scales(q.absmax, q.nested_absmax, q.nested_offset)
    return scales[first:last], None, None
