"""Linear layers with quantized weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from nybble import integer, products
from nybble.errors import FormatError
from nybble.functional import autocast, quantize
from nybble.nn.quantized import QuantizedModule, empty_quantized
from nybble.qtensor import QTensor

if TYPE_CHECKING:
    from typing_extensions import Self


class QuantizedLinear(QuantizedModule):
    """`x @ weight.T + bias` with a quantized weight [out_features, in_features].

    Attributes:
        compute: None computes with the decoded weight; "int8" rounds activations to signed bytes
            and multiplies integers, as `nybble.linear` describes. It belongs to the module:
            copies, pickles and moved modules have it, and loading another weight leaves it as
            it is, unless the codes of that are no integers (dynamic8), which makes it None.
            State dicts have bitsandbytes' keys, which do not say it.
    """

    bias: nn.Parameter | None
    compute: integer.Compute | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: str,
        blocksize: int | None = None,
        nested: bool = False,
        compute_dtype: torch.dtype | None = None,
        compute: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Make a layer of zeros, to be filled by `load_state_dict` or `requantize_`.

        Args:
            in_features: Length of a row of the weight.
            out_features: Number of rows.
            bias: Whether there is a bias.
            format: Storage format.
            blocksize: Elements that share a scale; None for the format's default.
            nested: Quantize the scales too.
            compute_dtype: Dtype of the product; None for the dtype of the input.
            compute: "int8" for products of integers, or None.
            dtype: Dtype of the bias, and the one that `dequantize` returns to.
            device: Where the tensors live.
        """
        dtype = dtype or torch.get_default_dtype()
        shape = (out_features, in_features)
        super().__init__(
            empty_quantized(shape, format, blocksize, nested, dtype, device), compute_dtype
        )
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))
        self.transposed = False
        self.compute = integer.check_compute(compute, self.format)

    @classmethod
    def from_qtensor(
        cls,
        q: QTensor,
        bias: torch.Tensor | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        compute: str | None = None,
    ) -> Self:
        """Wrap a quantized weight of rank 2, sharing its memory."""
        if len(q.shape) != 2:
            raise FormatError(f"a linear layer needs a weight of rank 2, got {tuple(q.shape)}")
        module = cls.__new__(cls)
        QuantizedModule.__init__(module, q, compute_dtype)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        module.register_parameter("bias", bias)
        module.transposed = False
        module.compute = integer.check_compute(compute, q.format)
        return module

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        format: str,
        *,
        blocksize: int | None = None,
        nested: bool = False,
        compute_dtype: torch.dtype | None = None,
        compute: str | None = None,
        reference: str | None = None,
    ) -> Self:
        """Quantize an `nn.Linear` (or transformers' `Conv1D`, whose weight is transposed).

        The bias is shared, not copied.
        """
        transposed = not isinstance(linear, nn.Linear)
        weight = getattr(linear, "weight", None)
        if not isinstance(weight, torch.Tensor):
            raise FormatError(f"{type(linear).__name__} has no weight to quantize")
        q = quantize_weight(
            weight.T if transposed else weight,
            format,
            blocksize=blocksize,
            nested=nested,
            reference=reference,
        )
        module = cls.from_qtensor(
            q, getattr(linear, "bias", None), compute_dtype=compute_dtype, compute=compute
        )
        module.transposed = transposed
        module.train(linear.training)
        return module

    def hold(self, q: QTensor) -> None:
        """Take over a quantized weight; `compute` becomes None if its codes are no integers."""
        super().hold(q)
        self.compute = integer.where_possible(self.compute, q.format)

    @property
    def in_features(self) -> int:
        """Length of a row of the weight."""
        return self.shape[1]

    @property
    def out_features(self) -> int:
        """Number of rows of the weight."""
        return self.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features] in the dtype of `x`."""
        x = autocast(x)
        wanted = self.compute_dtype
        if wanted is None or wanted == x.dtype:
            return self._product(x)
        return self._product(x.to(wanted)).to(x.dtype)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        # Not through `Module.__getattr__`, which takes longer than a small product.
        parameters, buffers = self._parameters, self._buffers
        weight, absmax = parameters["weight"], buffers["absmax"]
        assert weight is not None
        assert absmax is not None
        parts = (weight, absmax, buffers["nested_absmax"], buffers["nested_offset"])
        bias, how = parameters["bias"], (self.format, self.blocksize, self.shape)
        if self.compute is None:
            return products.linear(x, *parts, bias, *how, self._memo)
        return integer.linear(x, *parts, bias, *how, self._memo)

    def extra_repr(self) -> str:
        """Describe the weight and the arithmetic in one line."""
        compute = "" if self.compute is None else f", compute={self.compute}"
        return super().extra_repr() + compute

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The dense layer: `nn.Linear`, or `Conv1D` if it was made from one."""
        weight = self.dequantize(dtype)
        if self.transposed:
            from transformers.pytorch_utils import Conv1D

            dense: nn.Module = Conv1D(self.out_features, self.in_features)
            weight = weight.T.contiguous()
        else:
            dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(weight)
        dense.register_parameter("bias", self.bias)
        return dense.train(self.training)


class Linear4bit(QuantizedLinear):
    """A linear layer whose weight is nf4, fp4, int4 or mxfp4."""

    bits = 4

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: str = "nf4",
        blocksize: int | None = None,
        nested: bool = False,
        compute_dtype: torch.dtype | None = None,
        compute: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """See `QuantizedLinear`; nf4 unless told otherwise."""
        super().__init__(
            in_features,
            out_features,
            bias,
            format=format,
            blocksize=blocksize,
            nested=nested,
            compute_dtype=compute_dtype,
            compute=compute,
            dtype=dtype,
            device=device,
        )


class Linear8bit(QuantizedLinear):
    """A linear layer whose weight is int8 (one scale a row) or dynamic8.

    Attributes:
        threshold: None computes with the decoded weight, so that activations keep their
            precision. A number (LLM.int8(), arXiv:2208.07339) quantizes activations of an int8
            weight to signed bytes row by row; if it is above 0, columns with a magnitude of at
            least `threshold` are multiplied in full precision. bitsandbytes uses 6.0.
    """

    bits = 8
    threshold: float | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: str = "int8",
        blocksize: int | None = None,
        threshold: float | None = None,
        compute_dtype: torch.dtype | None = None,
        compute: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """See `QuantizedLinear`; int8 unless told otherwise."""
        super().__init__(
            in_features,
            out_features,
            bias,
            format=format,
            blocksize=blocksize,
            compute_dtype=compute_dtype,
            compute=compute,
            dtype=dtype,
            device=device,
        )
        self.threshold = threshold

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if self.threshold is None:
            return super()._product(x)
        if self.format != "int8":
            raise FormatError(f"a threshold belongs to int8 weights; this one is {self.format}")
        parameters = self._parameters  # as above
        weight, absmax = parameters["weight"], self._buffers["absmax"]
        assert weight is not None
        assert absmax is not None
        threshold = float(self.threshold)
        return integer.llm_int8(x, weight, absmax, parameters["bias"], threshold, self._memo)

    def extra_repr(self) -> str:
        """Describe the weight in one line."""
        threshold = "" if self.threshold is None else f", threshold={self.threshold}"
        return super().extra_repr() + threshold


def quantize_weight(
    weight: torch.Tensor,
    format: str,
    *,
    blocksize: int | None = None,
    nested: bool = False,
    reference: str | None = None,
) -> QTensor:
    """Quantize a weight, or lay out its quantized form if it is on the meta device."""
    if weight.device.type == "meta":
        return empty_quantized(
            tuple(weight.shape), format, blocksize, nested, weight.dtype, weight.device
        )
    return quantize(
        weight.detach(), format, blocksize=blocksize, nested=nested, reference=reference
    )


def linear_class(bits: int) -> type[Linear4bit] | type[Linear8bit]:
    """The layer that holds formats of this many bits."""
    return Linear4bit if bits == Linear4bit.bits else Linear8bit
