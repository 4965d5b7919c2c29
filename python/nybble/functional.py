"""The primitives on torch tensors and numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nybble import _core, integer, ops, products
from nybble._memory import memory
from nybble.cuda import ops as cuda
from nybble.errors import DtypeError, FormatError
from nybble.qtensor import QTensor

if TYPE_CHECKING:
    from nybble._core import FormatRow

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
EXACT = "exact"


def formats() -> list[FormatRow]:
    """The table of formats, one dict a row.

    Keys: `name`, `bits`, `decode` (codebook, integer, dense), `codebook` (values by code, or
    None), `scale`, `scale_dtype`, `blocksizes`, `default_blocksize`, `nestable`, `source`.
    """
    return _core.formats()


def quantize(
    x: torch.Tensor | np.ndarray[Any, Any],
    format: str = "nf4",
    *,
    blocksize: int | None = None,
    nested: bool = False,
    reference: str | None = None,
    nonfinite: str = "error",
) -> QTensor:
    """Quantize a tensor.

    Args:
        x: float32, float16 or bfloat16 of any shape. A non-contiguous tensor is copied.
        format: `nf4`, `fp4`, `int4`, `int8`, `dynamic8`, `dynamic8u` or `mxfp4`.
        blocksize: Elements that share a scale, along the flattened tensor; None for the
            format's default (64; 32 for mxfp4). `int8` has one scale a row and takes none.
        nested: Quantize the float32 scales too (double quantization, QLoRA).
        reference: None or "exact" for nearest rounding; "bitsandbytes-cpu" for the very bytes
            that bitsandbytes writes on a CPU.
        nonfinite: What to do with NaN and infinity: "error", or "zero" to store them as 0.

    Raises:
        FormatError: Unknown format, a block size it lacks, nested scales it lacks, or a value
            that is not finite; the message gives its flat position.
        DtypeError: `x` is not of a floating point type that can be quantized.
    """
    tensor, from_numpy = _as_tensor(x)
    shape = list(tensor.shape)
    size = _core.layout(format, shape, blocksize, nested)[0]
    packed, absmax, nested_absmax, nested_offset = ops.quantize(
        tensor.detach(), format, size, nested, reference or EXACT, nonfinite
    )
    return QTensor(
        packed=packed,
        absmax=absmax,
        format=format,
        shape=tensor.shape,
        dtype=tensor.dtype,
        blocksize=size,
        nested_absmax=nested_absmax if nested else None,
        nested_offset=nested_offset if nested else None,
        numpy=from_numpy,
    )


def dequantize(q: QTensor, dtype: Any = None, out: torch.Tensor | None = None) -> Any:
    """Decode a quantized tensor, into `out` if that is given; see `QTensor.dequantize`."""
    return q.dequantize(dtype, out)


def linear(
    x: torch.Tensor,
    q: QTensor,
    bias: torch.Tensor | None = None,
    compute: integer.Compute | None = None,
) -> torch.Tensor:
    """`x @ dequantize(q).T + bias`, differentiable in `x` and `bias`.

    Args:
        x: Floating point [..., in_features]. Under autocast it is cast first, as torch's linear
            does.
        q: Quantized weight [out_features, in_features].
        bias: [out_features], or None.
        compute: None is exact. "int8" multiplies integers, which is faster on a CPU: each 256
            activations of a row are rounded to signed bytes with one float32 scale, by at most
            1/254 of their largest magnitude, and the values of a 4-bit format to multiples of
            one number. That is exact for int4 and mxfp4; nf4 moves by at most 0.004 and fp4 by at
            most 0.0053 of a block's scale. With int8 weights a whole row of activations has one
            scale, as in LLM.int8(). A row with a value that is not finite becomes NaN; with int8
            weights on a CPU it is an error. Gradients take the rounding of activations for the
            identity.

    Returns:
        [..., out_features] in the dtype of `x`. On a CPU codes are exact, scales and sums are
        float32, and only the result is rounded; bfloat16 is multiplied in bfloat16 where the
        processor can, with weights that are at most half a unit of it off.

    Raises:
        FormatError: An unknown `compute`, or "int8" for a format whose codes are no integers
            (dynamic8, dynamic8u).
    """
    product = products.linear
    if compute is not None:
        integer.check_compute(compute, q.format)
        product = integer.linear
    # Field by field: `parts` and `how` take as long as a tenth of a small product.
    return product(
        autocast(x),
        q.packed,
        q.absmax,
        q.nested_absmax,
        q.nested_offset,
        bias,
        q.format,
        q.blocksize,
        q.shape,
        q.memo,
    )


# Naming the device takes a good part of the time of a small product.
_autocast = torch._C._is_any_autocast_enabled


def autocast(x: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype that an enclosing autocast asks for."""
    if not _autocast():
        return x
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point():
        return x.to(torch.get_autocast_dtype(device))
    return x


@dataclass(frozen=True, kw_only=True)
class ErrorStats:
    """How far a quantized tensor is from the original.

    Attributes:
        sqnr_db: Signal to quantization noise, 10 log10(sum x² / sum (x - y)²); inf without error.
        mse: Mean squared error.
        max_abs: Largest error.
        rel_rms: Root of sum (x - y)² / sum x².
        cosine: Cosine between original and decoded tensor.
        count: Elements compared.
        absmax_min: Smallest scale.
        absmax_max: Largest scale.
        outliers: Elements above four times the root mean square of their block or row.
    """

    sqnr_db: float
    mse: float
    max_abs: float
    rel_rms: float
    cosine: float
    count: int
    absmax_min: float
    absmax_max: float
    outliers: int


def error(x: torch.Tensor | np.ndarray[Any, Any], q: QTensor) -> ErrorStats:
    """Compare a tensor with its quantized form, in float64 sums.

    On a CUDA device that has both, the sums are made there and only they come back.

    Raises:
        FormatError: The shapes differ.
    """
    tensor, _ = _as_tensor(x)
    if tensor.shape != q.shape:
        raise FormatError(
            f"error compares tensors of one shape, got {tuple(tensor.shape)} and {tuple(q.shape)}"
        )
    tensor = tensor.detach()
    on_device = ops.HAS_CUDA and tensor.is_cuda and tensor.device == q.device
    if on_device and tensor.dtype in ops.FLOATS and tensor.numel() > 0:
        return ErrorStats(**cuda.error_stats(tensor, *q.parts, *q.how))
    tensor, host = tensor.cpu().contiguous(), q.cpu()
    weight = ops.weight(*host.parts, *host.how)
    return ErrorStats(**_core.error_stats(memory(tensor), weight, ops.kernel_threads()))


def pack(codes: torch.Tensor, order: str = "high_first") -> torch.Tensor:
    """Pack 4-bit codes, one a byte, into nibbles.

    Args:
        codes: uint8 of any shape, values 0 to 15.
        order: "high_first" (bitsandbytes), "low_first" (MXFP4 files of Hugging Face) or
            "planar32" (GGUF: of each 32, the low halves hold the first 16).

    Returns:
        uint8, flat; halves without an element are 0.
    """
    flat = _bytes(codes)
    group = 32 if order == "planar32" else 2
    packed = torch.empty(-(-flat.numel() // group) * group // 2, dtype=torch.uint8)
    _core.pack_codes(memory(flat), order, memory(packed))
    return packed.to(codes.device)


def unpack(packed: torch.Tensor, elements: int, order: str = "high_first") -> torch.Tensor:
    """The reverse of `pack`: `elements` codes, one a byte, flat."""
    flat = _bytes(packed)
    codes = torch.empty(elements, dtype=torch.uint8)
    _core.unpack_codes(memory(flat), order, memory(codes))
    return codes.to(packed.device)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype != torch.uint8:
        raise DtypeError(f"codes are uint8, got {tensor.dtype}")
    return tensor.detach().cpu().contiguous().flatten()


def _as_tensor(x: torch.Tensor | np.ndarray[Any, Any]) -> tuple[torch.Tensor, bool]:
    if isinstance(x, torch.Tensor):
        tensor, from_numpy = x, False
    elif isinstance(x, np.ndarray) and x.dtype in (np.float32, np.float16):
        array = x if x.flags.writeable else x.copy()  # torch warns of read-only memory
        tensor, from_numpy = torch.from_numpy(np.ascontiguousarray(array).reshape(x.shape)), True
    else:
        found = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
        raise DtypeError(f"cannot quantize {found}; pass a float32 or float16 array, or a tensor")
    if tensor.dtype not in _FLOATS:
        raise DtypeError(
            f"cannot quantize {tensor.dtype}; cast to float32, float16 or bfloat16 first"
        )
    return tensor, from_numpy
