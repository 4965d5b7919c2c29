"""Linear layers with 4-bit weights."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from nybble.compat.bitsandbytes._products import matmul_4bit
from nybble.compat.bitsandbytes._quant_state import QuantState
from nybble.compat.bitsandbytes.nn._storing import Stored4bit
from nybble.compat.bitsandbytes.nn.params import Params4bit

logger = logging.getLogger(__name__)


def quantized_weight(module: Stored4bit, device: torch.device) -> Params4bit | None:
    """The 4-bit weight of a layer; None if something put a weight of floats in its place.

    A weight that was never moved is quantized now. One that lost its state (FSDP makes new
    parameters) gets it back from the layer.
    """
    weight = module.weight
    if isinstance(weight, Params4bit):
        if weight.quant_state is None and weight.bnb_quantized:
            weight.quant_state = module.quant_state
        if weight.quant_state is None:
            module.weight = weight = weight.to(device)
        return weight
    if module.quant_state is None:
        return None
    module.weight = restored = Params4bit(
        weight.data,
        quant_state=module.quant_state,
        blocksize=module.quant_state.blocksize,
        compress_statistics=module.quant_state.nested,
        quant_type=module.quant_state.quant_type or "",
        quant_storage=module.quant_storage,
        module=module,
        bnb_quantized=True,
    )
    return restored


class Linear4bit(Stored4bit, nn.Linear):
    """`x @ weight.T + bias` with a 4-bit weight (QLoRA, arXiv:2305.14314).

    It is made with a weight of floats, which is quantized when the layer is moved to a device
    (also to the CPU) or first used. Nothing is repacked or cast later: a forward pass changes
    neither weight nor bias. Products are exact, as there; `compute="int8"` belongs to
    `nybble.nn.Linear4bit`.
    """

    quant_state: QuantState | None

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        """Make a layer with random weights.

        Args:
            input_features: Length of a row of the weight.
            output_features: Number of rows.
            bias: Whether there is a bias.
            compute_dtype: Dtype of the product; None for that of the first input.
            compress_statistics: Quantize the scales too.
            quant_type: `nf4` or `fp4`.
            quant_storage: Dtype as which the codes pose.
            device: Where the weight of floats is made.
        """
        nn.Linear.__init__(self, input_features, output_features, bias, device)
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self.quant_state = None
        self.quant_storage = quant_storage

    def _weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def set_compute_type(self, x: torch.Tensor) -> None:
        """Choose the dtype of products after the first input: its own, float16 excepted."""
        if x.dtype in (torch.float32, torch.bfloat16):
            self.compute_dtype = x.dtype
        elif x.dtype == torch.float16 and self.compute_dtype in (None, torch.float32):
            logger.warning(
                "input is float16 and compute_dtype is %s; pass compute_dtype=torch.float16 to"
                " multiply in it",
                self.compute_dtype,
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features] in the dtype of `x`."""
        weight = quantized_weight(self, x.device)
        if weight is None:
            return nn.functional.linear(x, self.weight.to(x.dtype), _as(self.bias, x))
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        entered = x
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        assert weight.quant_state is not None
        return matmul_4bit(x, weight, weight.quant_state, bias=_as(self.bias, x)).to(entered.dtype)


def _as(bias: Any, x: torch.Tensor) -> torch.Tensor | None:
    """The bias in the dtype of `x`, for this product only."""
    return None if bias is None else bias.to(x.dtype)


class LinearFP4(Linear4bit):
    """`Linear4bit` with fp4."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        """See `Linear4bit`."""
        super().__init__(
            *(input_features, output_features, bias, compute_dtype, compress_statistics),
            *("fp4", quant_storage, device),
        )


class LinearNF4(Linear4bit):
    """`Linear4bit` with nf4."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        """See `Linear4bit`."""
        super().__init__(
            *(input_features, output_features, bias, compute_dtype, compress_statistics),
            *("nf4", quant_storage, device),
        )
