"""The op `torch.ops.nybble.integer_linear`: products with activations of signed bytes.

Opt-in (`compute="int8"`), since rounding the activations changes the result; see
`nybble.linear` for by how much.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from nybble import _core, ops, products, reference
from nybble.cuda import place
from nybble.cuda import products as cuda
from nybble.errors import FormatError

Compute = Literal["int8"]

# Activations that share a scale.
GROUP = 256

torch.library.define(
    "nybble::integer_linear",
    "(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset,"
    " Tensor? bias, str format, int blocksize, SymInt[] shape) -> Tensor",
)


def check_compute(compute: str | None, format: str) -> Compute | None:
    """The kind of arithmetic, if there is one of this name for this format.

    Raises:
        FormatError: It is neither "int8" nor None, or the codes of the format are no integers.
    """
    if compute is None:
        return None
    if compute != "int8":
        raise FormatError(f"compute must be 'int8' or None, got {compute!r}")
    _check_integers(format)
    return "int8"


def where_possible(compute: str | None, format: str) -> Compute | None:
    """`compute`, where the codes of the format are integers; None elsewhere.

    Raises:
        FormatError: It is neither "int8" nor None.
    """
    row = reference.spec(format)
    known = check_compute(compute, "int8")
    return known if row["bits"] == 4 or row["decode"] == "integer" else None


@functools.cache
def _check_integers(format: str) -> None:
    """Whether a format has integer codes; asking the core at each product would take long."""
    if not reference.is_row_wise(format):
        _core.integers(format)


def _integer_linear_cpu(
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
    parts = ops.weight(packed, absmax, nested_absmax, nested_offset, format, blocksize, shape)
    return products.product(_core.Prepared(parts).integer_linear, x, size, bias, shape[0])


torch.library.impl("nybble::integer_linear", "cpu")(_integer_linear_cpu)


@functools.cache
def _values(format: str, device: torch.device) -> Tensor:
    """What each code is multiplied as: its integer times the step of the table."""
    integers, step = _core.integers(format)
    return torch.tensor(integers, dtype=torch.float32, device=device) * step


def _rounded(x: Tensor) -> Tensor:
    """Activations that were signed bytes with one scale a group, as float32."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % GROUP))
    # Not -1 for the groups: with no rows it could be anything.
    groups = padded.reshape(*x.shape[:-1], padded.shape[-1] // GROUP, GROUP)
    scale = groups.abs().amax(dim=-1, keepdim=True)
    # Not `127 / scale`: torch takes that for 127 times the reciprocal, which rounds twice.
    factor = torch.where(scale > 0, torch.full_like(scale, 127) / scale, torch.zeros_like(scale))
    codes = torch.round(groups * factor)
    # 0 times what is not finite makes the whole group NaN.
    decoded = codes * (scale * reference._INVERSE_QMAX) + 0 * scale
    rounded: Tensor = decoded.flatten(-2)[..., : x.shape[-1]]
    return rounded


def definition(
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
    """The definition in plain torch: both factors rounded to integers, then multiplied."""
    ops.check_product(x, shape)
    if reference.is_row_wise(format):
        return reference.int8_linear(x, packed, absmax, bias, 0.0)
    codes = reference.unpack(packed, shape[0] * shape[1]).long()
    scales = reference.decode_scales(absmax, nested_absmax, nested_offset)
    blocks = reference._blocks(_values(format, packed.device)[codes], blocksize) * scales[:, None]
    weight = blocks.flatten()[: shape[0] * shape[1]].reshape(tuple(shape))
    out = _rounded(x) @ weight.T
    return (out if bias is None else out + bias.float()).to(x.dtype)


torch.library.impl("nybble::integer_linear", "CompositeExplicitAutograd")(definition)


def _integer_linear_cuda(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    format: str,
    blocksize: int,
    shape: Sequence[int],
    memo: products.Memo | None = None,
) -> Tensor:
    if reference.is_row_wise(format):
        return cuda.int8_linear(x, packed, absmax, bias, 0.0)
    ops.check_product(x, shape)
    parts, how = (packed, absmax, nested_absmax, nested_offset), (format, blocksize, shape)
    if x.dtype not in ops.FLOATS or x.numel() * shape[0] == 0:
        return definition(x, *parts, bias, *how)
    described = place.weight(*parts, *how) if memo is None else memo.get(*parts, *how)
    assert isinstance(described, _core.CudaWeight)  # the weight is there too
    return cuda.integer_product(described, x, packed, bias, shape, GROUP)


if ops.HAS_CUDA:
    torch.library.impl("nybble::integer_linear", "cuda")(_integer_linear_cuda)


@torch.library.register_fake("nybble::integer_linear")
def _integer_linear_fake(
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


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, absmax, nested_absmax, nested_offset, bias, format, blocksize, shape = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, nested_offset)
    ctx.how = (format, blocksize, shape)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """grad_x = grad @ W: rounding of the activations counts as the identity."""
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.nybble.linear_backward(grad, *ctx.saved_tensors, *ctx.how)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias_dtype)
    return grad_x, None, None, None, None, grad_bias, None, None, None


torch.library.register_autograd("nybble::integer_linear", _backward, setup_context=_setup)

integer_linear: Callable[..., Tensor] = torch.ops.nybble.integer_linear


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
    memo: products.Memo | None = None,
) -> Tensor:
    """`torch.ops.nybble.integer_linear`, without torch's detour where nothing else has a say.

    `memo` spares describing the weight again.
    """
    parts = (packed, absmax, nested_absmax, nested_offset)
    if products.others_have_a_say(x, packed, bias):
        result: Tensor = integer_linear(x, *parts, bias, format, blocksize, shape)
        return result
    if not x.is_cpu:
        return _integer_linear_cuda(x, *parts, bias, format, blocksize, shape, memo)
    size = ops.check_product(x, shape)
    prepared = (memo or products.Memo()).get(*parts, format, blocksize, shape)
    assert isinstance(prepared, _core.Prepared)  # the weight is on the CPU too
    return products.product(prepared.integer_linear, x, size, bias, shape[0])


def llm_int8(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    threshold: float,
    memo: products.Memo,
) -> Tensor:
    """`torch.ops.nybble.int8_linear`, without torch's detour where nothing else has a say."""
    # The op also takes codes with gaps, which have no one address to remember.
    if products.others_have_a_say(x, packed, bias) or not x.is_cpu or not packed.is_contiguous():
        return ops.int8_linear(x, packed, absmax, bias, threshold)
    shape = packed.shape
    size = ops.check_product(x, shape)
    prepared = memo.get(packed, absmax, None, None, "int8", shape[1], shape)
    assert isinstance(prepared, _core.Prepared)
    kernel = functools.partial(prepared.int8_linear, threshold=threshold)
    return products.product(kernel, x, size, bias, shape[0])
