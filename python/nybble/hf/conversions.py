"""How tensors of experts find their places: transformers merges them, quantized experts do not.

A model with quantized experts calls each expert's weight as most files do. The conversions that
merge these files are left out for it; files with one tensor for all experts are taken apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from nybble.hf.loading import COMPANIONS, place
from nybble.nn.experts import QuantizedExperts
from nybble.nn.quantized import QuantizedModule
from nybble.qtensor import QTensor


def for_quantized_experts(conversions: list[Any], model: nn.Module) -> list[Any]:
    """The conversions of a model, changed where its experts are quantized."""
    experts = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, QuantizedExperts)
    }
    if not experts:
        return conversions
    return [_spared(conversion, experts) for conversion in conversions] + _splitters(experts)


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
    """The conversion, without effect on experts that are quantized."""
    if not isinstance(conversion, WeightConverter):
        return conversion
    targets = tuple(pattern.replace("\\", "") for pattern in conversion.target_patterns)
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
            if f"{own}.{parameter}" in made:
                continue
            split = SplitExperts(module, f".{own}.", parameter)
            sources = list(split.sources)
            made[f"{own}.{parameter}"] = WeightConverter(sources, split.targets, operations=[split])
    return list(made.values())


class SplitExperts(ConversionOps):  # type: ignore[misc]
    """Take one parameter of all experts apart, dense or quantized."""

    supports_many_to_many = True

    def __init__(self, experts: QuantizedExperts, prefix: str, parameter: str) -> None:
        self.parameter = parameter
        self.dtype: torch.dtype | None = None  # that dense parts have in the model
        kind = "bias" if parameter.endswith("_bias") else "weight"
        role_of = parameter.removesuffix("_bias")
        #: Places: name in the model, role, expert.
        self.targets = [
            f"{prefix}{expert}.{name}.{kind}"
            for expert in range(experts.num_experts)
            for role, name in experts.names.items()
            if experts.fused.parameter(role) == role_of
        ]
        self._prefix = prefix
        # Patterns of names in files, and the names below the module that they stand for.
        names = [parameter, *(parameter + name.removeprefix("weight") for name in COMPANIONS)]
        self.sources = {re.escape(f"{prefix}{name}") + "$": name for name in names}

    def convert(
        self, input_dict: Mapping[str, Any], model: nn.Module, full_layer_name: str, **_: Any
    ) -> dict[str, torch.Tensor]:
        """Take the tensors of the parameter.

        What will be quantized comes out as a view, what stays dense as a tensor of its own.
        """
        tensors = {
            self.sources[pattern]: value[0] if isinstance(value, list) else value
            for pattern, value in input_dict.items()
        }
        before = full_layer_name.removesuffix(self.targets[0])
        path = f"{before}{self._prefix}".removesuffix(".")
        experts = model.get_submodule(path)
        assert isinstance(experts, QuantizedExperts)
        value: Any = tensors[self.parameter]
        if len(tensors) > 1:
            value = QTensor.from_state_dict(tensors, self.parameter)
        parts: dict[str, torch.Tensor] = {}
        for below, piece in experts.pieces(self.parameter, value):
            whole = f"{path}.{below}"
            owner, kind = whole.rsplit(".", 1)
            if isinstance(piece, QTensor):
                parts[whole] = place(model, owner, piece).weight
            else:
                module = model.get_submodule(owner)
                quantized = isinstance(module, QuantizedModule) and kind == "weight"
                parts[whole] = piece if quantized else _own(piece, self.dtype)
        return parts


def _own(view: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A copy, in this dtype if it is a floating point one."""
    copied = view.clone(memory_format=torch.contiguous_format)
    return copied.to(dtype) if dtype is not None and dtype.is_floating_point else copied
