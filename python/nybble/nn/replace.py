"""Replace the layers of a model by quantized ones, in place, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nybble import _core, reference
from nybble.errors import Error, FormatError
from nybble.nn.coverage import Coverage, Row
from nybble.nn.embedding import QuantizedEmbedding, embedding_class
from nybble.nn.linear import QuantizedLinear, linear_class
from nybble.nn.quantized import QuantizedModule

__all__ = ["Coverage", "Row", "dequantize_model", "quantize_model", "replaces"]

_SKIP = "skip"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How one layer is to be quantized."""

    format: str
    blocksize: int | None
    nested: bool
    compute_dtype: torch.dtype | None
    reference: str | None

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return reference.spec(self.format)["bits"]

    def options(self) -> dict[str, Any]:
        """The keyword arguments of a layer's `from_...` constructor."""
        row = reference.spec(self.format)
        return {
            "format": self.format,
            "blocksize": self.blocksize if self.blocksize in row["blocksizes"] else None,
            "nested": self.nested and row["nestable"],
            "compute_dtype": self.compute_dtype,
            "reference": self.reference,
        }


Replacement = Callable[[Any, Choice], QuantizedModule]
_REPLACEMENTS: dict[type[nn.Module], Replacement] = {}


def replaces(kind: type[nn.Module]) -> Callable[[Replacement], Replacement]:
    """Register how modules of exactly this class are quantized."""

    def register(replacement: Replacement) -> Replacement:
        _REPLACEMENTS[kind] = replacement
        return replacement

    return register


@replaces(nn.Linear)
def _linear(module: nn.Linear, choice: Choice) -> QuantizedModule:
    return linear_class(choice.bits).from_linear(module, **choice.options())


@replaces(nn.Embedding)
def _embedding(module: nn.Embedding, choice: Choice) -> QuantizedModule:
    return embedding_class(choice.bits).from_embedding(module, **choice.options())


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a dense linear layer that `quantize_model` can replace."""
    return _replacement(module) is _REPLACEMENTS[nn.Linear]


def _replacement(module: nn.Module) -> Replacement | None:
    kind = type(module)
    if kind in _REPLACEMENTS:
        return _REPLACEMENTS[kind]
    # transformers' Conv1D is a linear layer with a transposed weight. It is told by name, so
    # that nybble does not import transformers.
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return _REPLACEMENTS[nn.Linear]
    return None


def quantize_model(
    model: nn.Module,
    format: str = "nf4",
    *,
    blocksize: int | None = None,
    nested: bool = False,
    compute_dtype: torch.dtype | None = None,
    skip: Sequence[str] | None = None,
    overrides: Mapping[str, str] | None = None,
    embeddings: bool = False,
    strict: bool = False,
    reference: str | None = None,
) -> Coverage:
    """Quantize the linear layers of a model in place.

    Args:
        model: Any module; also one on the meta device, to be filled by loading.
        format: Format of every layer that no rule names.
        blocksize: Elements that share a scale; None for the format's default. A layer whose own
            format lacks this size gets that format's default.
        nested: Quantize the scales too, where the format can.
        compute_dtype: Dtype of products; None for that of the input.
        skip: Patterns of modules to leave alone: plain names, globs, or `re:` and a regular
            expression. None stands for `lm_head` and every module with a tied weight; a list
            replaces that.
        overrides: Pattern to format name, or to "skip". The first that matches a module wins;
            `skip` wins over all.
        embeddings: Quantize `nn.Embedding` too. One that an override names is quantized anyway.
        strict: Raise, and change nothing, if a parameter with two or more dimensions has no
            quantized layer.
        reference: As in `nybble.quantize`.

    Returns:
        What became of every parameter and why, with bytes.

    Raises:
        FormatError: Unknown format or bad pattern; with `strict`, an unsupported parameter.
    """
    _core.layout(format, [1], blocksize, nested)  # names and sizes are checked before any work
    rules = _core.Rules(list(skip or ()), dict(overrides or {}))
    default_rules = _core.Rules(["lm_head"], {}) if skip is None else None
    tied = _tied(model)
    chosen: dict[str, Choice] = {}
    rows: dict[str, Row] = {}
    for path, module in _owners(model):
        decision = rules.decide(path)
        reason = ""
        if decision == _SKIP:
            reason = "skip"
        elif decision is None and default_rules and default_rules.decide(path) == _SKIP:
            reason = "output head (default skip)"
        elif decision is None and default_rules and id(getattr(module, "weight", None)) in tied:
            reason = "tied weight"
        elif decision is None and isinstance(module, nn.Embedding) and not embeddings:
            reason = "embedding (pass embeddings=True)"
        replaceable = _replacement(module) is not None
        if replaceable and not reason:
            name = decision or format
            if _quantized_format(name):
                chosen[path] = Choice(
                    format=name,
                    blocksize=blocksize,
                    nested=nested,
                    compute_dtype=compute_dtype,
                    reference=reference,
                )
            else:
                reason = f"override to {name}"
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            if path in chosen and name.endswith("weight"):
                continue
            rows[name] = _kept(name, module, parameter, reason, replaceable)
    unsupported = [row for row in rows.values() if row.reason.startswith("no quantized layer")]
    if strict and unsupported:
        names = ", ".join(f"{row.name} {list(row.shape)}" for row in unsupported)
        raise FormatError(
            f"strict: no quantized layer for {names}; name them in skip, or pass strict=False"
        )
    quantized = _replace(model, chosen)
    kept = [row for row in rows.values() if row not in unsupported]
    return Coverage(quantized=quantized, kept=kept, unsupported=unsupported, unused=rules.unused())


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn every quantized layer back into a dense one, in place; returns the model.

    Args:
        model: A model with quantized layers.
        dtype: Dtype of the weights; None for the dtype that each had.
    """
    made: dict[int, nn.Module] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            continue
        if id(module) not in made:
            if isinstance(module, QuantizedLinear):
                made[id(module)] = module.to_linear(dtype)
            else:
                made[id(module)] = module.to_embedding(dtype)
        _set(model, path, made[id(module)])
    return model


def _quantized_format(name: str) -> bool:
    return reference.spec(name)["decode"] != "dense"


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that have parameters of their own, each once, quantized ones left out."""
    for path, module in model.named_modules():
        own = next(module.parameters(recurse=False), None)
        if own is not None and not isinstance(module, QuantizedModule):
            yield path, module


def _tied(model: nn.Module) -> set[int]:
    """Parameters that more than one module holds."""
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return {parameter for parameter, count in holders.items() if count > 1}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kept(
    name: str, module: nn.Module, parameter: nn.Parameter, reason: str, replaceable: bool
) -> Row:
    if parameter.dim() < 2:
        reason = "one-dimensional"
    elif not reason and not replaceable:
        reason = f"no quantized layer for {type(module).__name__} parameters of rank" + (
            f" {parameter.dim()}"
        )
    return Row(
        name=name,
        kind=type(module).__name__,
        shape=tuple(parameter.shape),
        format=_dtype_name(parameter.dtype),
        reason=reason or "not a weight",
        bytes_before=parameter.nbytes,
        bytes_after=parameter.nbytes,
    )


def _replace(model: nn.Module, chosen: Mapping[str, Choice]) -> list[Row]:
    """Quantize the chosen modules one at a time, wherever in the model they occur."""
    rows: list[Row] = []
    made: dict[int, QuantizedModule] = {}
    originals: dict[int, nn.Module] = {}  # kept alive, so that no id is used twice
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in made:
            _set(model, path, made[id(module)])
            continue
        if path not in chosen:
            continue
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        choice = chosen[path]
        replacement = _replacement(module)
        assert replacement is not None
        try:
            quantized = replacement(module, choice)
        except Error as error:
            raise type(error)(f"{path}.weight: {error}") from error
        originals[id(module)], made[id(module)] = module, quantized
        _set(model, path, quantized)
        rows.append(
            Row(
                name=f"{path}.weight" if path else "weight",
                kind=type(module).__name__,
                shape=tuple(weight.shape),
                format=choice.format,
                bytes_before=weight.nbytes,
                bytes_after=quantized.qtensor.nbytes,
            )
        )
    return rows


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    if not path:
        raise FormatError(
            "the model itself is a single layer and cannot be replaced in place; use"
            " nybble.nn.Linear4bit.from_linear or wrap it in torch.nn.Sequential"
        )
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
