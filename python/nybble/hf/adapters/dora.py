"""DoRA on a quantized linear layer: row lengths of the adapted weight are learned apart."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraVariant
from torch import nn


class RowLengths(DoraLinearLayer):  # type: ignore[misc]  # peft has no types
    """The learned lengths `m` [out_features] of one adapter.

    A row of zeros, which quantized weights have now and then, starts with length 0 and stays as
    it is, where a division of 0 by 0 would give NaN.
    """

    def get_weight_norm(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Norm of each row, 1 for a row of zeros."""
        norm: torch.Tensor = super().get_weight_norm(*args, **kwargs)
        return torch.where(norm > 0, norm, torch.ones_like(norm))


class DoraVariant(LoraVariant):  # type: ignore[misc]  # peft has no types
    """Weight-decomposed LoRA (DoRA, arXiv:2402.09353).

    The adapted weight is `m * (W + s B A) / |W + s B A|`, where `m` [out_features] is learned and
    the norm is that of each row. The norm needs the dense weight: it is decoded for the length of
    a call, so a training step holds one dense weight per layer more than plain LoRA does.
    """

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:  # noqa: ARG004
        """Start with the row lengths of the decoded weight, so that nothing changes at first."""
        base, delta = module.unmerged.dequantize(torch.float32), module.delta(adapter_name)
        layer = RowLengths(fan_in_fan_out=False)
        # An adapter on the meta device is filled from a file later.
        norm = torch.linalg.vector_norm(base.to(delta.device) + delta, dim=1).detach()
        layer.weight = nn.Parameter(norm)  # float32: rounded lengths would change every row
        module.lora_magnitude_vector[adapter_name] = layer

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """The result of the layer with this adapter, given that without it."""
        del kwargs
        dropout = module.lora_dropout[active_adapter]
        dropped = module.training and not isinstance(dropout, nn.Identity)
        update: torch.Tensor = module.lora_magnitude_vector[active_adapter](
            dropout(x),
            lora_A=module.lora_A[active_adapter],
            lora_B=module.lora_B[active_adapter],
            scaling=module.scaling[active_adapter],
            base_layer=_dense(module, x.dtype),
            base_result=None if dropped else result,
            adapter_name=active_adapter,
        )
        return result + update

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The weight [out_features, in_features] with this adapter in it.

        Norms are those of the weight without any adapter, as in `forward`.
        """
        delta = module.delta(active_adapter)
        base = module.unmerged.dequantize(torch.float32)
        magnitude = module.lora_magnitude_vector[active_adapter]
        norm = magnitude.get_weight_norm(base, delta, scaling=1)
        factor = (magnitude.weight.float() / norm).view(-1, 1)
        merged: torch.Tensor = factor * (orig_weight + delta)
        return merged


def _dense(module: Any, dtype: torch.dtype) -> nn.Linear:
    """The base layer with a decoded weight, for the length of a call."""
    base = module.get_base_layer()
    dense = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(base.dequantize(dtype), requires_grad=False)
    dense.register_parameter("bias", base.bias)
    return dense
