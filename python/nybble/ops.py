"""The torch ops `torch.ops.nybble.*`: schema, shapes for tracing, CPU kernels, gradients.

Everything that the layers do goes through these, so that `torch.compile` sees one node with a
known shape. `nybble.cuda` registers kernels for CUDA devices; others run the definition in
`reference.py`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nybble import _core, reference
from nybble._memory import Memory, memory, optional_memory
from nybble.errors import DeviceError, DtypeError, FormatError

# Whether torch's "cuda" means CUDA. With ROCm it does not, and the ops stay plain torch code.
HAS_CUDA = torch.version.hip is None

# What kernels take activations in, and decode to.
FLOATS = frozenset((torch.float32, torch.bfloat16, torch.float16))

_WEIGHT = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset"
_HOW = "str format, int blocksize, SymInt[] shape"

_SCHEMAS = {
    "quantize": (
        "(Tensor x, str format, int blocksize, bool nested, str reference, str nonfinite)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "dequantize": f"({_WEIGHT}, {_HOW}, ScalarType dtype) -> Tensor",
    "dequantize_out": f"({_WEIGHT}, {_HOW}, Tensor(a!) out) -> ()",
    "linear": f"(Tensor x, {_WEIGHT}, Tensor? bias, {_HOW}) -> Tensor",
    "linear_backward": f"(Tensor grad, {_WEIGHT}, {_HOW}) -> Tensor",
    "embedding": f"(Tensor ids, {_WEIGHT}, {_HOW}, ScalarType dtype) -> Tensor",
    "int8_linear": (
        "(Tensor x, Tensor packed, Tensor absmax, Tensor? bias, float threshold) -> Tensor"
    ),
}

for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"nybble::{_name}", _schema)

Weight = tuple[str, list[int], int, Memory, Memory, "Memory | None", "Memory | None"]


def weight(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: Sequence[int],
) -> Weight:
    """The argument by which Rust takes a quantized tensor in host memory."""
    if packed.dtype not in (torch.uint8, torch.int8):
        packed = packed.view(torch.uint8)  # bytes that pose as floats (quant_storage)
    return (
        format,
        list(shape),
        blocksize,
        memory(packed),
        memory(absmax),
        optional_memory(nested_absmax),
        optional_memory(nested_offset),
    )


# Bytes from which on large pages are asked for. Fresh memory is mapped as it is first touched,
# which costs more than the arithmetic that fills it.
_LARGE = 1 << 22


def _expect_to_fill(fresh: Tensor) -> None:
    """Prepare a tensor that was just allocated and that a kernel fills next."""
    if fresh.nbytes >= _LARGE:
        _core.prefer_huge_pages(memory(fresh))


# --- quantize -------------------------------------------------------------------------------


def _empty_quantized(x: Tensor, format: str, blocksize: int, nested: bool) -> tuple[Tensor, ...]:
    shape = [int(extent) for extent in x.shape]
    _, packed, scales, nested_scales = _core.layout(format, shape, blocksize, nested)
    codes_shape, codes_dtype = (
        (tuple(shape), torch.int8) if reference.is_row_wise(format) else ((packed,), torch.uint8)
    )
    return (
        x.new_empty(codes_shape, dtype=codes_dtype),
        x.new_empty(scales, dtype=reference.scale_dtype(format, nested)),
        x.new_empty(nested_scales, dtype=torch.float32),
        x.new_empty(() if nested else (0,), dtype=torch.float32),
    )


@torch.library.impl("nybble::quantize", "cpu")
def _quantize_cpu(
    x: Tensor, format: str, blocksize: int, nested: bool, reference: str, nonfinite: str
) -> tuple[Tensor, ...]:
    x = x.contiguous()
    out = _empty_quantized(x, format, blocksize, nested)
    packed, absmax, nested_absmax, nested_offset = out
    _expect_to_fill(packed)
    _expect_to_fill(absmax)
    parts = weight(
        packed,
        absmax,
        nested_absmax if nested else None,
        nested_offset if nested else None,
        format,
        blocksize,
        x.shape,
    )
    _core.quantize(memory(x), parts, reference, nonfinite, kernel_threads())
    return out


def quantize_on_cpu(
    x: Tensor, format: str, blocksize: int, nested: bool, reference: str, nonfinite: str
) -> tuple[Tensor, ...]:
    """Devices without kernels: quantized on the CPU, which defines the bytes, and moved back."""
    out = torch.ops.nybble.quantize(x.cpu(), format, blocksize, nested, reference, nonfinite)
    return tuple(part.to(x.device) for part in out)


torch.library.impl("nybble::quantize", "CompositeExplicitAutograd")(quantize_on_cpu)


@torch.library.register_fake("nybble::quantize")
def _quantize_fake(
    x: Tensor, format: str, blocksize: int, nested: bool, reference: str, nonfinite: str
) -> tuple[Tensor, ...]:
    return _empty_quantized(x, format, blocksize, nested)


# --- dequantize -----------------------------------------------------------------------------


@torch.library.impl("nybble::dequantize", "cpu")
def _dequantize_cpu(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    parts = weight(packed, absmax, nested_absmax, nested_offset, format, blocksize, shape)
    out = packed.new_empty(tuple(shape), dtype=dtype)
    _expect_to_fill(out)
    _core.dequantize(parts, memory(out), 0, kernel_threads())
    return out


torch.library.impl("nybble::dequantize", "CompositeExplicitAutograd")(reference.dequantize)


@torch.library.register_fake("nybble::dequantize")
def _dequantize_fake(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(tuple(shape), dtype=dtype)


def _check_out(packed: Tensor, shape: Sequence[int], out: Tensor) -> None:
    """Whether `out` can be filled: the shape, a dtype that decoding has, contiguous, same device.

    Raises:
        FormatError: Another shape, or memory with gaps.
        DtypeError: A dtype other than float32, float16 and bfloat16.
        DeviceError: Another device.
    """
    if tuple(out.shape) != tuple(shape):
        raise FormatError(f"out has shape {tuple(out.shape)}, the tensor has {tuple(shape)}")
    if out.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise DtypeError(f"out is {out.dtype}; use float32, float16 or bfloat16")
    if not out.is_contiguous():
        raise FormatError(f"out has strides {out.stride()}; it must be contiguous")
    if out.device != packed.device:
        raise DeviceError(f"out is on {out.device}, the codes are on {packed.device}")


@torch.library.impl("nybble::dequantize_out", "cpu")
def _dequantize_out_cpu(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: Sequence[int],
    out: Tensor,
) -> None:
    _check_out(packed, shape, out)
    parts = weight(packed, absmax, nested_absmax, nested_offset, format, blocksize, shape)
    _core.dequantize(parts, memory(out), 0, kernel_threads())


@torch.library.impl("nybble::dequantize_out", "CompositeExplicitAutograd")
def _dequantize_out_elsewhere(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: Sequence[int],
    out: Tensor,
) -> None:
    _check_out(packed, shape, out)
    scales = (absmax, nested_absmax, nested_offset)
    out.copy_(reference.dequantize(packed, *scales, format, blocksize, shape, out.dtype))


@torch.library.register_fake("nybble::dequantize_out")
def _dequantize_out_fake(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: Sequence[int],
    out: Tensor,
) -> None:
    _check_out(packed, shape, out)


# --- what products share --------------------------------------------------------------------


def _threads_asked_for() -> int | None:
    """`NYBBLE_NUM_THREADS`, if it is a number above 0; the core reads it the same way."""
    text = os.environ.get("NYBBLE_NUM_THREADS", "")
    return int(text) if text.isdecimal() and int(text) > 0 else None


_THREADS = _threads_asked_for()  # once, like everything that is read from the environment


def kernel_threads() -> int:
    """Threads of a kernel: `NYBBLE_NUM_THREADS`, else as many as torch uses at the moment."""
    return torch.get_num_threads() if _THREADS is None else _THREADS


@functools.cache
def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a CPU multiplies: float32 where it has no units for a narrower one."""
    native = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    if dtype not in native:
        return dtype
    supported = getattr(torch.ops.mkldnn, native[dtype], None)
    return dtype if supported is not None and supported() else torch.float32


def check_product(x: Tensor, shape: Sequence[int]) -> torch.Size:
    """The shape of `x` [..., in_features], if it can be multiplied by a weight of this shape.

    Raises:
        RuntimeError: The weight has no rank of 2, `x` another number of features or no floats.
    """
    size = x.shape
    if len(shape) == 2 and size and size[-1] == shape[1] and x.is_floating_point():
        return size
    torch._check(
        len(shape) == 2, lambda: f"linear needs a weight of rank 2, got shape {list(shape)}"
    )
    torch._check(
        x.dim() > 0 and x.shape[-1] == shape[1],
        lambda: f"linear: x has shape {list(x.shape)}, the weight takes {shape[1]} features",
    )
    torch._check(
        x.is_floating_point(), lambda: f"linear needs floating point activations, got {x.dtype}"
    )
    return size


_compiling = torch.compiler.is_compiling
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.maybe_current_level
_tracing = torch._C._get_tracing_state
_forward = torch.autograd.forward_ad


def is_plain(x: Tensor, packed: Tensor) -> bool:
    """Whether no tracer, subclass, mode or transform of torch wants to see what is done here."""
    return (
        not _compiling()
        and type(x) is Tensor
        and ((x.is_cpu and packed.is_cpu) or (HAS_CUDA and x.is_cuda and packed.is_cuda))
        and _modes() == 0
        and _transforms() is None
        and _forward._current_level < 0
        and _tracing() is None
    )


# --- embedding ------------------------------------------------------------------------------


@torch.library.impl("nybble::embedding", "cpu")
def _embedding_cpu(
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
    parts = weight(packed, absmax, nested_absmax, nested_offset, format, blocksize, shape)
    rows = ids.to(torch.int64).contiguous()
    out = packed.new_empty((*ids.shape, shape[1]), dtype=dtype)
    _core.dequantize_rows(parts, memory(rows), memory(out), kernel_threads())
    return out


torch.library.impl("nybble::embedding", "CompositeExplicitAutograd")(reference.embedding)


@torch.library.register_fake("nybble::embedding")
def _embedding_fake(
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
    return packed.new_empty((*ids.shape, shape[1]), dtype=dtype)


# --- LLM.int8() -----------------------------------------------------------------------------


@torch.library.impl("nybble::int8_linear", "cpu")
def _int8_linear_cpu(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    check_product(x, packed.shape)
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], packed.shape[0])
    packed = packed.contiguous()  # kept under a name: `weight` only notes the address
    parts = weight(packed, absmax, None, None, "int8", 0, packed.shape)
    bias = None if bias is None else bias.contiguous()
    operands = (memory(x), optional_memory(bias), memory(out))
    _core.Prepared(parts).int8_linear(*operands, kernel_threads(), threshold)
    return out


torch.library.impl("nybble::int8_linear", "CompositeExplicitAutograd")(reference.int8_linear)


@torch.library.register_fake("nybble::int8_linear")
def _int8_linear_fake(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    check_product(x, packed.shape)
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _int8_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, absmax, bias, _ = inputs
    ctx.save_for_backward(packed, absmax)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _int8_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """grad_x = grad @ W: rounding of the activations counts as the identity."""
    packed, absmax = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        how = ("int8", packed.shape[1], list(packed.shape))
        grad_x = torch.ops.nybble.linear_backward(grad, packed, absmax, None, None, *how)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None


torch.library.register_autograd(
    "nybble::int8_linear", _int8_linear_backward, setup_context=_int8_linear_setup
)

quantize: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = torch.ops.nybble.quantize
dequantize: Callable[..., Tensor] = torch.ops.nybble.dequantize
dequantize_out: Callable[..., None] = torch.ops.nybble.dequantize_out
embedding: Callable[..., Tensor] = torch.ops.nybble.embedding
int8_linear: Callable[..., Tensor] = torch.ops.nybble.int8_linear
