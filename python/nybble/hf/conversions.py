"""How tensors of experts find their places: transformers merges them, quantized experts do not.

A model with quantized experts calls each expert's weight as most files do. The conversions that
merge these files are left out for it; files with one tensor for all experts are taken apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from nybble.nn.experts import QuantizedExperts
from nybble.nn.fused import Fused
from nybble.nn.quantized import QuantizedModule


def for_quantized_experts(conversions: list[Any], model: nn.Module) -> list[Any]:
    """The conversions of a model, changed where its experts are quantized."""
    experts = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, QuantizedExperts)
    }
    if not experts:
        return conversions
    kept = [_spared(conversion, experts) for conversion in conversions]
    return [conversion for conversion in kept if conversion is not None] + _splitters(experts)


def for_saving(conversions: list[Any]) -> list[Any]:
    """The conversions without those that only loading needs: experts keep names of their own."""
    return [
        conversion
        for conversion in conversions
        if not any(isinstance(op, SplitExperts) for op in getattr(conversion, "operations", ()))
    ]


class _Elsewhere(WeightConverter):  # type: ignore[misc]
    """A merging conversion that leaves the experts at some paths alone."""

    __slots__ = ("spared",)

    spared: tuple[str, ...]

    def copy(self, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:
        """A copy, such as the reverse, which sees no name of a spared expert."""
        made = super().copy(source_patterns, target_patterns, **kwargs)
        made.spared = ()
        return made

    def _scoped_match(self, source_key: str) -> Any:
        if any(path in f".{source_key}" for path in self.spared):
            return None
        return super()._scoped_match(source_key)


def _spared(conversion: Any, experts: Mapping[str, QuantizedExperts]) -> Any:
    """The conversion for what is not quantized; None if nothing is left."""
    targets = tuple(
        pattern.replace("\\", "") for pattern in getattr(conversion, "target_patterns", ())
    )
    if not isinstance(conversion, WeightConverter):
        return conversion
    concerned = [
        path
        for path, module in experts.items()
        if any(f"{path}.{name}".endswith(targets) for name in module.fused.parameters)
    ]
    if not concerned:
        return conversion
    elsewhere = _Elsewhere(
        list(conversion._original_source_patterns),
        list(conversion._original_target_patterns),
        operations=conversion.operations,
    )
    elsewhere.scope_prefix = conversion.scope_prefix
    elsewhere.base_model_prefix = conversion.base_model_prefix
    # With a dot before it, so that a key without the model's prefix is found too.
    elsewhere.spared = tuple(f".{path.partition('.')[2] or path}." for path in concerned)
    return elsewhere


def _splitters(experts: Mapping[str, QuantizedExperts]) -> list[Any]:
    """Conversions from parameters of rank 3, one for each name that such a parameter has."""
    made: dict[str, Any] = {}
    for path, module in experts.items():
        own = path.rpartition(".")[2]
        for parameter in module.fused.parameters:
            source = rf"\.{own}\.{parameter}$"
            if source not in made:
                split = SplitExperts(module.fused, dict(module.names), f".{own}.", parameter)
                made[source] = WeightConverter([source], split.targets, operations=[split])
    return list(made.values())


class SplitExperts(ConversionOps):  # type: ignore[misc]
    """Take one parameter of all experts apart."""

    supports_many_to_many = True

    def __init__(self, fused: Fused, names: dict[str, str], prefix: str, parameter: str) -> None:
        self.fused = fused
        self.is_bias = parameter.endswith("_bias")
        kind = "bias" if self.is_bias else "weight"
        weight = parameter.removesuffix("_bias")
        self._places = [
            (f"{prefix}{expert}.{name}.{kind}", role, expert)
            for expert in range(fused.num_experts)
            for role, name in names.items()
            if fused.parameter(role) == weight
        ]

    @property
    def targets(self) -> list[str]:
        """The names that come out."""
        return [name for name, _, _ in self._places]

    def convert(
        self, input_dict: Mapping[str, Any], model: nn.Module, full_layer_name: str, **_: Any
    ) -> dict[str, torch.Tensor]:
        """Take `{name: [tensor]}` with one tensor [experts, ...].

        What will be quantized comes out as a view of it; what stays, as a tensor of its own.
        """
        (value,) = input_dict.values()
        whole = value[0] if isinstance(value, list) else value
        part = self.fused.bias if self.is_bias else self.fused.matrix
        before = full_layer_name.removesuffix(self.targets[0])
        parts: dict[str, torch.Tensor] = {}
        for name, role, expert in self._places:
            owner = model.get_submodule((before + name).rpartition(".")[0])
            view = part(whole, role, expert)
            quantized = isinstance(owner, QuantizedModule) and not self.is_bias
            parts[name] = view if quantized else view.clone(memory_format=torch.contiguous_format)
        return parts
