"""Products with quantized weights: `matmul_4bit`, `matmul` (LLM.int8()) and `gemv_4bit`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, fields
from typing import Any

import torch

from nybble import ops, products
from nybble.compat.bitsandbytes._blockwise import deliver
from nybble.compat.bitsandbytes._four_bit import dequantize_4bit, how, parts
from nybble.compat.bitsandbytes._int8 import int8_vectorwise_quant
from nybble.compat.bitsandbytes._quant_state import QuantState
from nybble.errors import FormatError


def matmul_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    quant_state: QuantState,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`A @ W.T + bias` for a 4-bit weight W, differentiable in `A` and `bias`.

    Args:
        A: Floating point [..., in_features].
        B: Codes of W in any shape (`Params4bit`, or its transpose).
        quant_state: State of W, whose shape is [out_features, in_features].
        out: Takes the result if given; it then has no gradient.
        bias: [out_features], or None.

    Returns:
        [..., out_features] in the dtype of `A`.

    Raises:
        FormatError: No state, or one of a weight that is not a matrix.
    """
    if quant_state is None:
        raise FormatError("matmul_4bit needs the quant_state of the weight, got None")
    if quant_state.shape is None or len(quant_state.shape) != 2:
        raise FormatError(
            f"matmul_4bit needs a weight [out_features, in_features], got {quant_state.shape}"
        )
    packed = B.detach().contiguous().reshape(-1, 1)
    rows, columns = quant_state.shape
    if A.shape[-1] == rows != columns:
        if not torch.compiler.is_compiling():
            warnings.warn(
                f"matmul_4bit: the weight was quantized as [in, out] = {[rows, columns]}; quantize"
                " its transpose instead, which is faster",
                DeprecationWarning,
                stacklevel=2,
            )
        decoded = dequantize_4bit(packed, quant_state).to(A.dtype)
        result = torch.nn.functional.linear(A, decoded.t(), bias)
    else:
        result = products.linear(A, *parts(packed, quant_state), bias, *how(quant_state))
    return deliver(result, out)


def gemv_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> torch.Tensor:
    """`A @ W.T` for a 4-bit weight, with any number of rows; see `matmul_4bit`.

    Args:
        A: Floating point [..., in_features].
        B: Codes of W.
        out: Takes the result if given.
        transposed_A: Must be False.
        transposed_B: Must be False.
        state: State of W; needed.

    Raises:
        FormatError: No state, or a transposed operand.
    """
    if state is None:
        raise FormatError("gemv_4bit needs the state that quantize_4bit returned, got None")
    if transposed_A or transposed_B:
        raise FormatError("gemv_4bit takes no transposed operands; transpose A, or the weight")
    return matmul_4bit(A, B, state, out=out)


_FORMER_FIELDS = frozenset({"CxB", "CxBt", "formatB", "_tile_indices"})


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.device == b.device and torch.equal(a, b)
    return bool(a is b or (not isinstance(a, torch.Tensor) and a == b))


@dataclass(eq=False)
class MatmulLtState:
    """What a `Linear8bitLt` keeps between calls.

    Attributes:
        CB: int8 weight [out_features, in_features].
        SCB: float32 scale of each row of it.
        threshold: Magnitude from which activations are outliers; 0 for none.
        is_training: Whether `matmul` is to multiply with the decoded weight (on a CPU).
        has_fp16_weights: Whether the weight itself is floating point, and quantized at each call.
        idx: Numbers of the columns that had outliers in the last int8 product (not recorded by
            compiled code).
        force_no_igemmlt: Kept for callers; there is one product.
        SB: Kept for callers, like all that follow: None, or as it was set.
    """

    force_no_igemmlt: bool = False
    CB: torch.Tensor | None = None
    SB: torch.Tensor | None = None
    SCB: torch.Tensor | None = None
    SBt: torch.Tensor | None = None
    CBt: torch.Tensor | None = None
    subB: torch.Tensor | None = None  # noqa: N815
    outlier_pool: Any = None
    has_accumulated_gradients = False
    threshold = 0.0
    idx: torch.Tensor | None = None
    is_training = True
    has_fp16_weights = True
    use_pool = False

    def __getattr__(self, name: str) -> Any:
        """None, with a warning, for what older kernels used; bitsandbytes does the same."""
        if name in _FORMER_FIELDS:
            message = f"MatmulLtState.{name} is always None; it belongs to former kernels"
            warnings.warn(message, FutureWarning, stacklevel=2)
            return None
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MatmulLtState):
            return False
        names = {*(field.name for field in fields(self)), *vars(self), *vars(other)}
        return all(_same(getattr(self, name), getattr(other, name, None)) for name in names)

    __hash__ = None  # type: ignore[assignment]

    def reset_grads(self) -> None:
        """Forget the quantized weight."""
        self.CB = self.SB = self.SCB = self.SBt = self.CBt = None


class _RoundTrip(torch.autograd.Function):
    """A floating point weight as its int8 form decodes; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        return decoded

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0], None


def matmul(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`A @ B.T + bias` by LLM.int8() (arXiv:2208.07339).

    Activations become int8 row by row, except columns with a magnitude of at least `threshold`.
    While `state.is_training` is set, a CPU multiplies with the decoded weight instead. It is
    differentiable in `A`, `bias` and, while training, in a floating point `B`.

    Args:
        A: Floating point [..., in_features].
        B: Weight [out_features, in_features]: floating point, or int8 if `state` has its scales.
        out: Takes the result if given.
        state: Holds the quantized weight; made if not given.
        threshold: If above 0, replaces that of the state.
        bias: [out_features], or None.

    Returns:
        [..., out_features] in the dtype of `A`.

    Raises:
        FormatError: An int8 weight without scales.
    """
    state = MatmulLtState() if state is None else state
    if threshold > 0.0:
        state.threshold = threshold
    if B.is_floating_point():
        state.CB, state.SCB, _ = int8_vectorwise_quant(B)
    if state.CB is None or state.SCB is None:
        raise FormatError(
            "the int8 weight has no scales; pass a state with CB and SCB, or a weight of floats"
        )
    codes, scales = state.CB.to(A.device).detach(), state.SCB.to(A.device)
    trains_weight = B.is_floating_point() and B.requires_grad and torch.is_grad_enabled()
    if not state.is_training or (A.device.type != "cpu" and not trains_weight):
        result = ops.int8_linear(A, codes, scales, bias, float(state.threshold))
        if state.threshold > 0.0 and not torch.compiler.is_compiling():
            outlier = A.detach().abs() >= state.threshold
            state.idx = torch.nonzero(outlier.reshape(-1, A.shape[-1]).any(dim=0)).flatten()
    elif trains_weight:
        decoded = ops.dequantize(codes, scales, None, None, *_how(codes), B.dtype)
        weight = _RoundTrip.apply(B, decoded).to(A.dtype)
        result = torch.nn.functional.linear(A, weight, None if bias is None else bias.to(A.dtype))
    else:
        result = products.linear(A, codes, scales, None, None, bias, *_how(codes))
    return deliver(result, out)


def _how(codes: torch.Tensor) -> tuple[str, int, list[int]]:
    return "int8", codes.shape[1], list(codes.shape)
