"""Products with a quantized weight: `torch.ops.nybble.linear` and its gradient.

On a CPU the kernels decode the weight on the way; it never exists as a whole. `cuda/products.py` is
for CUDA devices. Other devices, and activations in types without kernels, use the definition in
`reference.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nybble import _core, ops, reference
from nybble._memory import Memory, memory, name_of
from nybble.cuda import place
from nybble.cuda import products as cuda

_FLOATS = ops.FLOATS


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
    size = ops.check_product(x, shape)
    parts = (packed, absmax, nested_absmax, nested_offset)
    if x.dtype not in _FLOATS:
        return reference.linear(x, *parts, bias, format, blocksize, list(shape))
    weight = ops.weight(*parts, format, blocksize, shape)
    return product(_core.Prepared(weight).linear, x, size, bias, shape[0])


def _empty_strided(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device="cpu")


# What compiled graphs allocate their results with, where this torch has it. `new_empty` takes twice
# as long, most of it to take its arguments apart and to find the device.
_guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_empty: Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor] = getattr(
    _guards, "_empty_strided_cpu", _empty_strided
)


def product(
    kernel: Callable[[Memory, Memory | None, Memory, int], None],
    x: Tensor,
    size: torch.Size,
    bias: Tensor | None,
    rows: int,
) -> Tensor:
    """What a method of `_core.Prepared` makes of `x`, whose shape is `size`."""
    x = x.contiguous()
    dtype = x.dtype
    if len(size) == 2 and rows > 0:
        m = size[0]
        out, elements = _empty((m, rows), (rows, 1), dtype), m * rows
    elif len(size) == 3 and rows > 0 and size[1] > 0:
        batch, m = size[0], size[1]
        out, elements = _empty((batch, m, rows), (m * rows, rows, 1), dtype), batch * m * rows
    else:
        out = x.new_empty((*size[:-1], rows))
        elements = out.numel()
    name = name_of(dtype)
    added = None
    if bias is not None:
        bias = bias.contiguous() if bias.dtype in _FLOATS else bias.float().contiguous()
        added = memory(bias)
    # As `memory` describes them, without asking torch for what is known here.
    described = x.data_ptr(), x.numel(), name
    kernel(described, added, (out.data_ptr(), elements, name), ops.kernel_threads())
    return out


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
    ops.check_product(x, shape)
    return x.new_empty(*x.shape[:-1], shape[0])


@torch.library.impl("nybble::linear_backward", "cpu")
def _backward_cpu(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: Sequence[int],
) -> Tensor:
    weight = (packed, absmax, nested_absmax, nested_offset, format, blocksize, list(shape))
    if grad.dtype not in _FLOATS:
        return reference.linear_backward(grad, *weight)
    return _gradient(_core.Prepared(ops.weight(*weight)), grad, shape[1])


def _gradient(prepared: _core.Prepared, grad: Tensor, columns: int) -> Tensor:
    grad = grad.contiguous()
    out = grad.new_empty((*grad.shape[:-1], columns))
    prepared.linear_backward(memory(grad), memory(out), ops.kernel_threads())
    return out


torch.library.impl("nybble::linear_backward", "CompositeExplicitAutograd")(
    reference.linear_backward
)


@torch.library.register_fake("nybble::linear_backward")
def _backward_fake(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: Sequence[int],
) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], shape[1])


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, absmax, nested_absmax, nested_offset, bias, format, blocksize, shape = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, nested_offset)
    ctx.how, ctx.memo = (format, blocksize, shape), Memo()
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """grad_x = grad @ W; the weight is frozen."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = (*ctx.saved_tensors, *ctx.how)
        if grad.dtype not in _FLOATS or others_have_a_say(grad, weight[0], None):
            grad_x = torch.ops.nybble.linear_backward(grad, *weight)
        else:
            prepared = ctx.memo.get(*weight)
            if isinstance(prepared, _core.Prepared):
                grad_x = _gradient(prepared, grad, ctx.how[2][1])
            else:
                grad_x = cuda.gradient(prepared, grad, weight[0], *ctx.how)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, grad_bias, None, None, None


torch.library.register_autograd("nybble::linear", _linear_backward, setup_context=_linear_setup)


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, absmax, nested_absmax, nested_offset, format, blocksize, shape = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, nested_offset)
    ctx.how = (format, blocksize, shape)


def _backward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient is linear in the gradient that it was made from."""
    again = torch.ops.nybble.linear(grad, *ctx.saved_tensors, None, *ctx.how)
    return again, None, None, None, None, None, None, None


torch.library.register_autograd(
    "nybble::linear_backward", _backward_backward, setup_context=_backward_setup
)


_grad_enabled = torch.is_grad_enabled


def others_have_a_say(x: Tensor, packed: Tensor, bias: Tensor | None) -> bool:
    """Whether a gradient is wanted, or a tracer, mode or subclass of torch is to be asked."""
    return not ops.is_plain(x, packed) or _is_followed(x, bias)


def _is_followed(x: Tensor, bias: Tensor | None) -> bool:
    return _grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


class Memo:
    """Descriptions of weights by the modules or tensors that hold them.

    To describe a weight takes longer than to multiply with a small one. A description holds
    addresses, so it is only used while the tensors are still where they were.
    """

    __slots__ = ("_prepared",)

    def __init__(self) -> None:
        self._prepared: _core.Prepared | _core.CudaWeight | None = None

    def get(
        self,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        nested_offset: Tensor | None,
        format: str,
        blocksize: int,
        shape: Sequence[int],
    ) -> _core.Prepared | _core.CudaWeight:
        """The description of a weight in host memory, or that of a CUDA device."""
        nested = None
        if nested_absmax is not None and nested_offset is not None:
            nested = (nested_absmax.data_ptr(), nested_offset.data_ptr())
        prepared = self._prepared
        if prepared is None or not prepared.is_at(packed.data_ptr(), absmax.data_ptr(), nested):
            parts = (packed, absmax, nested_absmax, nested_offset)
            prepared = self._prepared = (
                _core.Prepared(ops.weight(*parts, format, blocksize, shape))
                if packed.is_cpu
                else place.weight(*parts, format, blocksize, shape)
            )
        return prepared

    def __reduce__(self) -> tuple[type[Memo], tuple[()]]:
        """A copy starts empty: addresses mean nothing elsewhere."""
        return Memo, ()


def _multiply(
    prepared: _core.Prepared | _core.CudaWeight,
    x: Tensor,
    size: torch.Size,
    packed: Tensor,
    bias: Tensor | None,
    how: tuple[str, int, Sequence[int]],
) -> Tensor:
    """The product on the device that the description is for."""
    if isinstance(prepared, _core.Prepared):
        return product(prepared.linear, x, size, bias, how[2][0])
    return cuda.product(prepared, x, packed, bias, *how)


class _Followed(torch.autograd.Function):
    """The product where a gradient is wanted and nothing but autograd looks on.

    The op has a gradient too, but torch takes several times as long to find it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        nested_offset: Tensor | None,
        bias: Tensor | None,
        how: tuple[str, int, Sequence[int]],
        memo: Memo,
    ) -> Tensor:
        ctx.save_for_backward(packed, absmax, nested_absmax, nested_offset)
        ctx.how, ctx.memo = how, memo
        ctx.bias_dtype = None if bias is None else bias.dtype
        prepared = memo.get(packed, absmax, nested_absmax, nested_offset, *how)
        return _multiply(prepared, x, x.shape, packed, bias, how)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, _, _, _, _, grad_bias, *_ = _linear_backward(ctx, grad)
        return grad_x, None, None, None, None, grad_bias, None, None


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
    memo: Memo | None = None,
) -> Tensor:
    """`torch.ops.nybble.linear`; calls the kernel itself where nothing else has a say.

    For a small layer and one row, torch's way to a kernel in Python takes longer than the kernel.
    `memo` spares describing the weight again.
    """
    parts = (packed, absmax, nested_absmax, nested_offset)
    how = (format, blocksize, shape)
    result: Tensor
    if not ops.is_plain(x, packed) or x.dtype not in _FLOATS:
        result = torch.ops.nybble.linear(x, *parts, bias, *how)
        return result
    size = ops.check_product(x, shape)
    memo = memo or Memo()
    if _is_followed(x, bias):
        result = _Followed.apply(x, *parts, bias, how, memo)
        return result
    prepared = memo.get(packed, absmax, nested_absmax, nested_offset, format, blocksize, shape)
    return _multiply(prepared, x, size, packed, bias, how)
