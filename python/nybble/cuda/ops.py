"""Quantizing and decoding on CUDA devices: the ops of `nybble.ops` for tensors there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nybble import _core, ops, reference
from nybble._memory import memory, optional_memory
from nybble.cuda import place
from nybble.errors import DeviceError

#: Bytes of a weight that are decoded at a time where it is not the result.
SCRATCH = 32 << 20


def quantize(
    x: Tensor, format: str, blocksize: int, nested: bool, reference: str, nonfinite: str
) -> tuple[Tensor, ...]:
    """`nybble::quantize`. Waits for the device only to learn whether all values are finite."""
    if reference != "exact" or nonfinite not in ("error", "zero") or x.numel() == 0:
        # What another library does on a CPU, what only the core can refuse, and nothing at all.
        return ops.quantize_on_cpu(x, format, blocksize, nested, reference, nonfinite)
    x = place.aligned(x)
    at = place.where(x)
    out = ops._empty_quantized(x, format, blocksize, nested)
    packed, absmax, nested_absmax, nested_offset = out
    parts = ops.weight(
        packed,
        absmax,
        nested_absmax if nested else None,
        nested_offset if nested else None,
        format,
        blocksize,
        x.shape,
    )
    scratch = x.new_empty(absmax.numel(), dtype=torch.float32) if nested else None
    # As an unsigned number the largest there is.
    first = x.new_full((1,), -1, dtype=torch.int64) if nonfinite == "error" else None
    _core.cuda_quantize(
        memory(x),
        parts,
        place.tables_for(format, nested, x.device),
        optional_memory(scratch),
        optional_memory(first),
        nonfinite == "zero",
        at,
    )
    if first is not None:
        _refuse_nonfinite(x, first)
    return out


def _refuse_nonfinite(x: Tensor, first: Tensor) -> None:
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise DeviceError(
            "whether all values are finite cannot be asked during a capture; quantize with"
            ' nonfinite="zero" there'
        )
    index = int(first.item())
    if index != -1:
        _core.refuse_nonfinite(index, float(x.flatten()[index].item()))


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """`nybble::dequantize`."""
    weight = (packed, absmax, nested_absmax, nested_offset, format, blocksize, list(shape))
    if dtype not in ops.FLOATS:
        return reference.dequantize(*weight, dtype)
    out = packed.new_empty(tuple(shape), dtype=dtype)
    place.weight(*weight).dequantize(memory(out), 0, place.where(packed))
    return out


def dequantize_out(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: Sequence[int],
    out: Tensor,
) -> None:
    """`nybble::dequantize_out`."""
    ops._check_out(packed, shape, out)
    weight = (packed, absmax, nested_absmax, nested_offset, format, blocksize, list(shape))
    place.weight(*weight).dequantize(memory(out), 0, place.where(packed))


def embedding(
    ids: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """`nybble::embedding`: gathers the codes and scales of the rows, then decodes those.

    Rows that are no whole blocks are rows of the whole decoded table.
    """
    weight = (packed, absmax, nested_absmax, nested_offset, format, blocksize, list(shape))
    rows, columns = shape[0], shape[1:].numel() if isinstance(shape, torch.Size) else shape[1]
    whole_blocks = columns > 0 and columns % blocksize == 0
    if dtype not in ops.FLOATS or not whole_blocks or ids.numel() == 0:
        return torch.nn.functional.embedding(ids, dequantize(*weight, dtype))
    place.check_together(packed, absmax, nested_absmax, nested_offset)
    if packed.dtype not in (torch.uint8, torch.int8):
        packed = packed.view(torch.uint8)  # bytes that pose as floats (quant_storage)
    flat = ids.flatten().to(torch.int64)
    if nested_absmax is not None:
        absmax = reference.decode_scales(absmax, nested_absmax, nested_offset)
    codes = packed.reshape(rows, -1).index_select(0, flat)
    scales = absmax.reshape(rows, -1).index_select(0, flat).flatten()
    if not reference.is_row_wise(format):
        codes = codes.flatten()
    gathered = (codes, scales, None, None, format, blocksize, [flat.numel(), columns])
    return dequantize(*gathered, dtype).reshape(*ids.shape, columns)


def error_stats(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: Sequence[int],
) -> _core.Figures:
    """How far a tensor is from its quantized form; waits for the device.

    The weight is decoded in parts, as for products, and compared on the device.
    """
    x = place.aligned(x).flatten()
    place.check_together(packed, x)
    weight = place.weight(packed, absmax, nested_absmax, nested_offset, format, blocksize, shape)
    at = place.where(packed)
    run, words = weight.run()
    found = x.new_empty((-(-x.numel() // run), words), dtype=torch.int64)
    step = max(1, SCRATCH // (run * torch.float32.itemsize)) * run
    scratch = x.new_empty(min(step, x.numel()), dtype=torch.float32)
    for start in range(0, x.numel(), step):
        part = x[start : start + step]
        decoded = scratch[: part.numel()]
        runs = found[start // run : -(-(start + part.numel()) // run)]
        weight.dequantize(memory(decoded), start, at)
        weight.compare(memory(part), memory(decoded), start, memory(runs), at)
    return _core.cuda_error_stats(memory(found.cpu()), x.numel())


if ops.HAS_CUDA:
    torch.library.impl("nybble::quantize", "cuda")(quantize)
    torch.library.impl("nybble::dequantize", "cuda")(dequantize)
    torch.library.impl("nybble::dequantize_out", "cuda")(dequantize_out)
    torch.library.impl("nybble::embedding", "cuda")(embedding)
