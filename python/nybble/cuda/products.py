"""Products on CUDA devices.

Few rows of activations are multiplied with the packed weight by one kernel. For many rows torch
multiplies with the decoded weight, some rows of it at a time, so that the decoded part is small
enough to stay in the device's cache and needs little memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nybble import _core, ops, reference
from nybble._memory import memory, name_of, optional_memory
from nybble.cuda import place
from nybble.cuda.ops import SCRATCH

# Rows and multiples that torch's integer product takes.
_INT_ROWS, _INT_MULTIPLE = 17, 8


@functools.cache
def _most_rows(format: str, columns: int, dtype: torch.dtype, index: int) -> int:
    return _core.cuda_most_rows(format, columns, name_of(dtype), (index, 0))


def linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    format: str,
    blocksize: int,
    shape: Sequence[int],
) -> Tensor:
    """`nybble::linear`."""
    ops.check_product(x, shape)
    parts = (packed, absmax, nested_absmax, nested_offset)
    how = (format, blocksize, list(shape))
    if x.dtype not in ops.FLOATS:
        return reference.linear(x, *parts, bias, *how)
    return product(place.weight(*parts, *how), x, packed, bias, *how)


def product(
    weight: _core.CudaWeight,
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    format: str,
    blocksize: int,
    shape: Sequence[int],
    fused: bool | None = None,
) -> Tensor:
    """`x @ weight.T + bias` for a weight that was described.

    `fused` is for timing: one kernel for any number of rows, or none. Else their number decides.
    """
    n, k = shape
    x = place.aligned(x)
    bias = _contiguous(bias)
    place.check_together(packed, x, bias)
    rows = math.prod(x.shape[:-1])
    out = x.new_empty((*x.shape[:-1], n))
    if rows == 0 or n == 0:
        return out
    at = place.where(packed)
    if fused is None:
        fused = rows <= _most_rows(format, k, x.dtype, at[0])
    if fused and k > 0:
        weight.linear(memory(x), optional_memory(bias), memory(out), at)
        return out
    bias = None if bias is None else bias.to(x.dtype)
    x2, out2 = x.reshape(rows, k), out.view(rows, n)
    for chunk, decoded in _decoded(weight, x, at, format, blocksize, shape):
        part = out2[:, chunk]
        if bias is None:
            torch.mm(x2, decoded.T, out=part)
        else:
            torch.addmm(bias[chunk], x2, decoded.T, out=part)
    return out


def linear_backward(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: Sequence[int],
) -> Tensor:
    """`nybble::linear_backward`."""
    parts = (packed, absmax, nested_absmax, nested_offset)
    how = (format, blocksize, list(shape))
    if grad.dtype not in ops.FLOATS:
        return reference.linear_backward(grad, *parts, *how)
    return gradient(place.weight(*parts, *how), grad, packed, *how)


def gradient(
    weight: _core.CudaWeight,
    grad: Tensor,
    packed: Tensor,
    format: str,
    blocksize: int,
    shape: Sequence[int],
) -> Tensor:
    """`grad @ weight` for a weight that was described. Several chunks are summed in float32."""
    n, k = shape
    grad2 = grad.contiguous().view(math.prod(grad.shape[:-1]), n)
    place.check_together(packed, grad2)
    decoded_rows = _decoded(weight, grad, place.where(packed), format, blocksize, shape)
    sums = [torch.mm(grad2[:, chunk], decoded) for chunk, decoded in _first(decoded_rows)]
    total = sums[0] if sums else grad2.new_zeros(len(grad2), k)
    wide: Tensor | None = None
    for chunk, decoded in decoded_rows:
        wide = total.float() if wide is None else wide
        wide += torch.mm(grad2[:, chunk], decoded)
    return (total if wide is None else wide.to(grad.dtype)).reshape(*grad.shape[:-1], k)


def _first(chunks: Iterator[tuple[slice, Tensor]]) -> Iterator[tuple[slice, Tensor]]:
    """The first of them, if there is one."""
    for chunk in chunks:
        yield chunk
        return


def _decoded(
    weight: _core.CudaWeight,
    like: Tensor,
    at: place.Place,
    format: str,
    blocksize: int,
    shape: Sequence[int],
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a weight and what they decode to, in memory that the next ones overwrite."""
    n, k = shape
    if n * k == 0:
        if n > 0:
            yield slice(0, n), like.new_zeros(n, k)
        return
    step = rows_at_a_time(format, blocksize, shape, like.element_size())
    scratch = like.new_empty(min(step, n) * k)
    for start in range(0, n, step):
        stop = min(start + step, n)
        decoded = scratch[: (stop - start) * k]
        weight.dequantize(memory(decoded), start * k, at)
        yield slice(start, stop), decoded.view(stop - start, k)


def rows_at_a_time(format: str, blocksize: int, shape: Sequence[int], itemsize: int) -> int:
    """Rows that are decoded at a time: as many as fit in `SCRATCH`.

    Kernels begin at whole words of codes, or whole blocks for a codebook of 256. Where rows are
    odd, that takes several rows at least, whatever their size.
    """
    _, k = shape
    row = reference.spec(format)
    start = 1 if reference.is_row_wise(format) else 32 if row["bits"] == 4 else blocksize
    least = start // math.gcd(start, k)
    return max(least, SCRATCH // (k * itemsize) // least * least)


def _contiguous(bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    return (bias if bias.dtype in ops.FLOATS else bias.float()).contiguous()


# --- LLM.int8() -----------------------------------------------------------------------------


def int8_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    """`nybble::int8_linear`. A row in which a value is not finite gives a row of NaN.

    A CPU raises an error there; a device would have to be waited for.
    """
    ops.check_product(x, packed.shape)
    n, k = packed.shape
    rows = math.prod(x.shape[:-1])
    if x.dtype not in ops.FLOATS or rows * n * k == 0:
        return reference.int8_linear(x, packed, absmax, bias, threshold)
    x, bias = x.contiguous(), _contiguous(bias)
    place.check_together(packed, absmax, x, bias)
    at = place.where(packed)
    out = x.new_empty((*x.shape[:-1], n))
    codes = x.new_empty((rows, k), dtype=torch.int8)
    scales = x.new_empty(rows, dtype=torch.float32)
    flags = outliers = None
    if threshold > 0:
        flags = x.new_zeros(k, dtype=torch.uint8)
        columns, count = (x.new_empty(size, dtype=torch.int32) for size in (k, 1))
        outliers = (memory(x), memory(columns), memory(count))
        _core.cuda_int8_outliers(outliers, memory(flags), threshold, at)
    _core.cuda_int8_rows(memory(x), optional_memory(flags), memory(codes), memory(scales), rows, at)
    integers = codes
    if rows >= _INT_ROWS and k % _INT_MULTIPLE == 0 and n % _INT_MULTIPLE == 0:
        integers = torch._int_mm(codes, packed.T)
    weight = ops.weight(packed, absmax, None, None, "int8", k, packed.shape)
    _core.cuda_int8_linear(
        memory(integers), memory(scales), weight, outliers, optional_memory(bias), memory(out), at
    )
    return out


# --- compute="int8" --------------------------------------------------------------------------


def integer_product(
    weight: _core.CudaWeight,
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    group: int,
) -> Tensor:
    """`x @ weight.T + bias` of integers, for a weight of four-bit codes that was described.

    `group` activations share a scale.
    """
    n, k = shape
    x = place.aligned(x)
    bias = _contiguous(bias)
    place.check_together(packed, x, bias)
    rows = math.prod(x.shape[:-1])
    out = x.new_empty((*x.shape[:-1], n))
    codes = x.new_empty((rows, k), dtype=torch.int8)
    factors = x.new_empty((rows, -(-k // group)), dtype=torch.float32)
    scratch = (memory(codes), memory(factors))
    at = place.where(packed)
    weight.integer_linear(memory(x), scratch, optional_memory(bias), memory(out), at)
    return out


if ops.HAS_CUDA:
    torch.library.impl("nybble::linear", "cuda")(linear)
    torch.library.impl("nybble::linear_backward", "cuda")(linear_backward)
    torch.library.impl("nybble::int8_linear", "cuda")(int8_linear)
