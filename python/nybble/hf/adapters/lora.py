"""The LoRA layer around a quantized linear layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from nybble.errors import FormatError
from nybble.hf.adapters.dora import DoraVariant
from nybble.hf.adapters.support import check_supported
from nybble.nn.linear import QuantizedLinear
from nybble.qtensor import QTensor


class LoraLinear(nn.Module, LoraLayer):  # type: ignore[misc]  # peft has no types
    """`base_layer(x) + scaling * lora_B(lora_A(dropout(x)))` with a frozen quantized base layer.

    PEFT makes it for the layers that a config from `nybble.hf.lora_config` names. It follows
    PEFT's conventions, so adapters are added, chosen, disabled, saved and loaded with PEFT's own
    functions. The codes and scales of the base layer are never changed by training. Merging
    quantizes the sum again in the layer's own format; the original codes are kept meanwhile, so
    that unmerging restores every bit.

    Adapter weights are float32 unless `autocast_adapter_dtype=False` asks for the dtype of the
    base: its `compute_dtype`, or the dtype that its weight had.
    """

    # What LoraLayer brings, for the type checker.
    base_layer: Any
    lora_A: Any  # noqa: N815
    lora_B: Any  # noqa: N815
    lora_bias: Any
    lora_dropout: Any
    lora_variant: Any
    scaling: Any
    merged: bool
    merged_adapters: list[str]
    active_adapters: list[str]
    disable_adapters: bool
    get_base_layer: Any
    _cast_input_dtype: Any
    _check_forward_args: Any
    _mixed_batch_forward: Any
    _unmerged: QTensor | None
    _unmerged_bias: torch.Tensor | None
    _is_making: bool

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        """Wrap a layer; called by PEFT.

        Args:
            base_layer: A `QuantizedLinear`, or a layer of PEFT around one.
            adapter_name: Name of the first adapter.
            config: The `LoraConfig`.
            r: Rank.
            lora_alpha: Numerator of the scaling.
            kwargs: What PEFT says about other kinds of layers.
        """
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False  # codes are [out, in], also of layers made from Conv1D
        self._unmerged = None
        self._unmerged_bias = None
        self._active_adapter = adapter_name
        self.update_layer(
            adapter_name,
            r,
            lora_alpha=lora_alpha,
            config=config,
            tied_adapter=kwargs.get("tied_adapter"),
        )

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """The variants of LoRA that this layer knows."""
        return {(): None, ("use_dora",): DoraVariant}

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: Any, **kwargs: Any
    ) -> None:
        """Add an adapter, or replace the one of that name."""
        check_supported(config)
        self._is_making = True
        try:
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        finally:
            self._is_making = False

    def _get_in_out_features(self, module: QuantizedLinear) -> tuple[int, int]:
        """Lengths of input and output; also of a layer whose codes are sharded."""
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(
        self, base_layer: QuantizedLinear
    ) -> tuple[torch.device, torch.dtype | None]:
        """Where adapters go, and the dtype of new ones before PEFT makes them float32.

        None for those that PEFT moves after it has loaded them: they keep what the file says.
        """
        dtype = (base_layer.compute_dtype or base_layer.dtype) if self._is_making else None
        return base_layer.weight.device, dtype

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is a matrix that is added to the weight."""
        variant = self.lora_variant.get(adapter_name)
        return variant is None or bool(variant.supports_lora_conversion())

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., in_features] to [..., out_features] in the dtype of `x`, or that of autocast.

        With `adapter_names`, a list with an adapter (or `__base__`) for each element of the batch,
        each element goes through its own.
        """
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        kwargs.pop("alora_offsets", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: torch.Tensor
        if adapter_names is not None and not self.disable_adapters:
            result = self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
            return result
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.lora_A:
                result = self._adapted(name, x, result)
        return result

    def _adapted(self, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """The result with one adapter more."""
        if not torch.is_autocast_enabled(x.device.type):
            x = self._cast_input_dtype(x, self.lora_A[name].weight.dtype)
        variant = self.lora_variant.get(name)
        if variant is not None:
            adapted: torch.Tensor = variant.forward(self, active_adapter=name, x=x, result=result)
            return adapted.to(result.dtype)
        low = self.lora_A[name](self.lora_dropout[name](x))
        update: torch.Tensor = self.lora_B[name](low) * self.scaling[name]
        return result + update.to(result.dtype)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What an adapter adds to the weight, [out_features, in_features], in its own dtype."""
        delta = self.delta(adapter)
        return delta.to(self.lora_B[adapter].weight.dtype)

    def delta(self, adapter: str) -> torch.Tensor:
        """The same in float32, however coarse the adapter is."""
        product = self.lora_B[adapter].weight.float() @ self.lora_A[adapter].weight.float()
        delta: torch.Tensor = product * self.scaling[adapter]
        return delta

    @property
    def unmerged(self) -> QTensor:
        """The weight without any adapter, as it was loaded."""
        held: QTensor = self.get_base_layer().qtensor
        return held if self._unmerged is None else self._unmerged.to(held.device)

    def merged_weight(self, names: Iterable[str]) -> torch.Tensor:
        """The float32 weight [out_features, in_features] with these adapters, not yet quantized.

        Raises:
            FormatError: An adapter has values that are not finite.
        """
        weight: torch.Tensor = self.unmerged.dequantize(torch.float32)
        for name in names:
            with torch.no_grad():
                variant = self.lora_variant.get(name)
                if variant is None:
                    weight = weight + self.delta(name)
                else:
                    weight = variant.merge_safe(self, name, weight)
            if not bool(torch.isfinite(weight).all()):
                raise FormatError(
                    f"adapter '{name}' gives a merged weight with values that are not finite;"
                    " its training has diverged, or it was damaged"
                )
        return weight

    def merged_bias(self, names: Iterable[str]) -> torch.Tensor | None:
        """The bias with those of these adapters (`lora_bias=True`); None if there is none.

        Raises:
            FormatError: An adapter has a bias and the base layer has none.
        """
        own = self.get_base_layer().bias
        bias: torch.Tensor | None = own if self._unmerged_bias is None else self._unmerged_bias
        for name in names:
            if not self.lora_bias[name]:
                continue
            if bias is None:
                raise FormatError(
                    f"adapter '{name}' has a bias (lora_bias=True) and this layer has none, so"
                    " it cannot be merged; keep the adapter apart"
                )
            added = self.lora_B[name].bias.detach() * self.scaling[name]
            bias = bias.detach() + added.to(bias.device, bias.dtype)
        return bias

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the base weight, quantized again in its own format.

        All merged adapters are summed in float32 before one quantization, however many calls
        merged them.

        Args:
            safe_merge: Accepted for PEFT; values that are not finite are refused in any case.
            adapter_names: Which; None for the active ones.

        Raises:
            FormatError: An adapter has values that are not finite, or a bias without a place.
        """
        del safe_merge
        chosen = check_adapters_to_merge(self, adapter_names)
        names = [name for name in chosen or () if name in self.lora_A]
        if not names:
            return
        base, everything = self.get_base_layer(), [*self.merged_adapters, *names]
        weight, bias = self.merged_weight(everything), self.merged_bias(everything)
        if self._unmerged is None:
            self._unmerged = base.qtensor
            self._unmerged_bias = None if base.bias is None else base.bias.detach().clone()
        base.requantize_(weight)
        if bias is not None:
            base.bias.data = bias.detach()
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Take all merged adapters out again; codes, scales and bias are the original ones."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        base.hold(self.unmerged)
        if self._unmerged_bias is not None:
            base.bias.data = self._unmerged_bias.to(base.bias.device)
        self._unmerged = self._unmerged_bias = None
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return "lora." + super().__repr__()
