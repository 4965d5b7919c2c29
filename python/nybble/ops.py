"""The torch ops `torch.ops.nybble.*`: schema, shapes for tracing, CPU kernels, gradients.

Everything that the layers do goes through these, so that `torch.compile` sees one node with a
known shape. Devices other than the CPU run the definition in `reference.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nybble import _core, reference
from nybble._memory import Memory, memory, optional_memory

_WEIGHT = "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset"
_HOW = "str format, int blocksize, SymInt[] shape"

_SCHEMAS = {
    "quantize": (
        "(Tensor x, str format, int blocksize, bool nested, str reference, str nonfinite)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "dequantize": f"({_WEIGHT}, {_HOW}, ScalarType dtype) -> Tensor",
    "linear": f"(Tensor x, {_WEIGHT}, Tensor? bias, {_HOW}) -> Tensor",
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
    parts = weight(
        packed,
        absmax,
        nested_absmax if nested else None,
        nested_offset if nested else None,
        format,
        blocksize,
        x.shape,
    )
    _core.quantize(memory(x), parts, reference, nonfinite)
    return out


@torch.library.impl("nybble::quantize", "CompositeExplicitAutograd")
def _quantize_elsewhere(
    x: Tensor, format: str, blocksize: int, nested: bool, reference: str, nonfinite: str
) -> tuple[Tensor, ...]:
    """Devices without kernels: quantized on the CPU, which defines the bytes, and moved back."""
    out = torch.ops.nybble.quantize(x.cpu(), format, blocksize, nested, reference, nonfinite)
    return tuple(part.to(x.device) for part in out)


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
    _core.dequantize(parts, memory(out))
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


# --- linear ---------------------------------------------------------------------------------

# Elements of the weight that are decoded at a time. A single row of activations is multiplied
# tile by tile while the tile is in the cache. For more rows each product starts torch's threads,
# which costs more than the cache gives, so the tile only bounds the memory.
_TILE_OF_ONE_ROW = 1 << 21
_TILE = 1 << 24


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


def _check_product(x: Tensor, shape: Sequence[int]) -> None:
    if len(shape) == 2 and x.dim() > 0 and x.shape[-1] == shape[1] and x.is_floating_point():
        return
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


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Torch's linear in the dtype of its arguments, whatever an autocast around the op says."""
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return torch.nn.functional.linear(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def _folded(rows: Tensor, x: Tensor) -> Tensor:
    """The rows of a product in the leading shape of `x`.

    Not a view, as torch's own product is none: autograd refuses to change views that a custom op
    returns in place, which activations and residual sums do.
    """
    if x.dim() == 2:
        return rows
    folded: Tensor = torch.ops.aten._unsafe_view.default(rows, [*x.shape[:-1], rows.shape[-1]])
    return folded


def _linear_cpu(
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
    parts = weight(packed, absmax, nested_absmax, nested_offset, format, blocksize, shape)
    _check_product(x, shape)
    out_features, in_features = shape
    flat = x.reshape(-1, in_features)
    if flat.shape[0] > 1:  # torch has quick code of its own for one row of any dtype
        flat = flat.to(arithmetic(x.dtype))
    bias = None if bias is None else bias.to(flat.dtype)
    tile_elements = _TILE_OF_ONE_ROW if flat.shape[0] == 1 else _TILE
    rows = max(1, tile_elements // max(1, in_features))
    if rows >= out_features:
        tile = flat.new_empty(out_features, in_features)
        _core.dequantize(parts, memory(tile))
        out = _dense(flat, tile, bias)
    else:
        out = flat.new_empty(flat.shape[0], out_features)
        scratch = flat.new_empty(rows, in_features)
        for start in range(0, out_features, rows):
            stop = min(start + rows, out_features)
            tile = scratch[: stop - start]
            _core.dequantize(parts, memory(tile), start * in_features)
            part = None if bias is None else bias[start:stop]
            out[:, start:stop] = _dense(flat, tile, part)
    return _folded(out.to(x.dtype), x)


torch.library.impl("nybble::linear", "cpu")(_linear_cpu)
torch.library.impl("nybble::linear", "CompositeExplicitAutograd")(reference.linear)


@torch.library.register_fake("nybble::linear")
def _linear_fake(
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
    _check_product(x, shape)
    return x.new_empty(*x.shape[:-1], shape[0])


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, absmax, nested_absmax, nested_offset, bias, format, blocksize, shape = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, nested_offset)
    ctx.how = (format, blocksize, shape)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """grad_x = grad @ W, with W decoded again in the dtype of grad; the weight is frozen."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        wide = arithmetic(grad.dtype) if grad.device.type == "cpu" else grad.dtype
        weight = torch.ops.nybble.dequantize(*ctx.saved_tensors, *ctx.how, wide)
        grad_x = (grad.to(wide) @ weight).to(grad.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, grad_bias, None, None, None


torch.library.register_autograd("nybble::linear", _linear_backward, setup_context=_linear_setup)


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
    """`torch.ops.nybble.linear`; calls the CPU kernel itself where nothing else has a say.

    For a small layer and one row, torch's way to a kernel in Python takes longer than the kernel.
    """
    arguments = (
        *(x, packed, absmax, nested_absmax, nested_offset, bias),
        *(format, blocksize, shape),
    )
    wants_gradient = torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )
    if torch.compiler.is_compiling() or wants_gradient or not _is_plain(x, packed):
        result: Tensor = torch.ops.nybble.linear(*arguments)
        return result
    return _linear_cpu(*arguments)


def _is_plain(x: Tensor, packed: Tensor) -> bool:
    """Whether no subclass, mode or transform of torch wants to see what is done with these."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and packed.is_cpu
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
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
    _core.dequantize_rows(parts, memory(rows), memory(out))
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
    _check_product(x, packed.shape)
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], packed.shape[0])
    parts = weight(packed.contiguous(), absmax, None, None, "int8", 0, packed.shape)
    bias = None if bias is None else bias.contiguous()
    threads = torch.get_num_threads()
    _core.int8_linear(memory(x), parts, optional_memory(bias), threshold, memory(out), threads)
    return out


torch.library.impl("nybble::int8_linear", "CompositeExplicitAutograd")(reference.int8_linear)


@torch.library.register_fake("nybble::int8_linear")
def _int8_linear_fake(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float
) -> Tensor:
    _check_product(x, packed.shape)
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
        how = ("int8", 0, list(packed.shape), grad.dtype)
        grad_x = grad @ torch.ops.nybble.dequantize(packed, absmax, None, None, *how)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None


torch.library.register_autograd(
    "nybble::int8_linear", _int8_linear_backward, setup_context=_int8_linear_setup
)

quantize: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = torch.ops.nybble.quantize
dequantize: Callable[..., Tensor] = torch.ops.nybble.dequantize
embedding: Callable[..., Tensor] = torch.ops.nybble.embedding
int8_linear: Callable[..., Tensor] = torch.ops.nybble.int8_linear
