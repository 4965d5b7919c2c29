"""Linear layers with int8 weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nybble.compat.bitsandbytes._products import MatmulLtState, matmul
from nybble.compat.bitsandbytes.nn._storing import Stored8bit
from nybble.compat.bitsandbytes.nn.params import Int8Params


class Linear8bitLt(Stored8bit, nn.Linear):
    """`x @ weight.T + bias` by LLM.int8() (arXiv:2208.07339).

    With `has_fp16_weights=False` the weight is quantized when the layer is moved to a device
    (also to the CPU) or first used. With True it stays floating point, can be trained, and is
    quantized at each call.

    Attributes:
        state: Threshold, mode, and the quantized weight as `matmul` takes it.
        index: Kept for callers.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Any = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        """Make a layer with random weights.

        Args:
            input_features: Length of a row of the weight.
            output_features: Number of rows.
            bias: Whether there is a bias.
            has_fp16_weights: Keep the weight as floats.
            threshold: Magnitude from which activations are outliers, multiplied in their own
                precision; 0 for none.
            index: Kept as an attribute.
            device: Where the weight of floats is made.
        """
        nn.Linear.__init__(self, input_features, output_features, bias, device)
        self.state = MatmulLtState()
        self.index = index
        self.state.threshold = threshold
        self.state.has_fp16_weights = has_fp16_weights
        self.state.use_pool = threshold > 0.0 and not has_fp16_weights
        self.weight = Int8Params(
            self.weight.data, has_fp16_weights=has_fp16_weights, requires_grad=has_fp16_weights
        )

    def _weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def init_8bit_state(self) -> None:
        """Point the state at the codes and scales of the weight, which keeps them too."""
        assert isinstance(self.weight, Int8Params)
        self.state.CB = self.weight.CB
        self.state.SCB = self.weight.SCB

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._follow_weight()
        return self

    def _load_weight(self, *arguments: Any) -> None:
        super()._load_weight(*arguments)
        self._follow_weight()

    def _follow_weight(self) -> None:
        """Bring the state up to date with a weight that moved, or was loaded."""
        if isinstance(self.weight, Int8Params) and self.weight.is_quantized8:
            self.state.has_fp16_weights = False
            if self.state.CB is not None:
                self.init_8bit_state()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features] in the dtype of `x`."""
        self.state.is_training = self.training
        weight = self.weight
        if isinstance(weight, Int8Params):
            if not weight.is_quantized8 and not weight.has_fp16_weights:
                self.weight = weight = weight.to(x.device)
            if weight.SCB is not None:
                self.init_8bit_state()
        elif weight.is_floating_point():  # tied to the weight of another layer
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return nn.functional.linear(x, weight.to(x.dtype), bias)
        return matmul(x, weight, state=self.state, bias=self.bias)
