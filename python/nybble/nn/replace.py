"""Replace the layers of a model by quantized ones, in place, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from nybble import _core
from nybble.errors import Error, FormatError
from nybble.integer import check_compute
from nybble.nn.choice import Choice, is_linear, replacement_of, replaces
from nybble.nn.coverage import Coverage, Row
from nybble.nn.embedding import QuantizedEmbedding
from nybble.nn.experts import (
    QuantizedExperts,
    dense_projection,
    experts_class,
    quantized_projection,
)
from nybble.nn.linear import QuantizedLinear
from nybble.nn.plan import Experts, Request, plan_model
from nybble.nn.quantized import QuantizedModule

__all__ = ["Coverage", "Row", "dequantize_model", "is_linear", "quantize_model", "replaces"]


def quantize_model(
    model: nn.Module,
    format: str = "nf4",
    *,
    blocksize: int | None = None,
    nested: bool = False,
    compute_dtype: torch.dtype | None = None,
    compute: str | None = None,
    skip: Sequence[str] | None = None,
    overrides: Mapping[str, str] | None = None,
    embeddings: bool = False,
    experts: bool = True,
    strict: bool = False,
    reference: str | None = None,
) -> Coverage:
    """Quantize the linear layers of a model in place, those of a mixture of experts included.

    Args:
        model: Any module; also one on the meta device, to be filled by loading.
        format: Format of every layer that no rule names.
        blocksize: Elements that share a scale; None for the format's default. A layer whose own
            format lacks this size gets that format's default.
        nested: Quantize the scales too, where the format can.
        compute_dtype: Dtype of products; None for that of the input.
        compute: "int8" for products of integers in linear layers and experts, as
            `nybble.linear` describes; layers that an override gives a format without integer
            codes compute as ever. None is exact.
        skip: Patterns of modules to leave alone: plain names, globs, or `re:` and a regular
            expression. None stands for `lm_head` and every module with a tied weight; a list
            replaces that.
        overrides: Pattern to format name, or to "skip". The first that matches a module wins;
            `skip` wins over all.
        embeddings: Quantize `nn.Embedding` too. One that an override names is quantized anyway.
        experts: Quantize experts too that transformers holds in parameters of rank 3. A pattern
            can name all of a layer (`model.layers.0.mlp.experts`) or one projection of one
            expert (`model.layers.0.mlp.experts.3.w1`). What chooses the experts stays as it is,
            unless an override names it.
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
    main = Choice(
        format=format,
        blocksize=blocksize,
        nested=nested,
        compute_dtype=compute_dtype,
        compute=check_compute(compute, format),
        reference=reference,
    )
    plan = plan_model(
        model,
        Request(
            main=main,
            rules=rules,
            has_skip_list=skip is not None,
            embeddings=embeddings,
            experts=experts,
        ),
    )
    if strict and plan.unsupported:
        names = ", ".join(f"{row.name} {list(row.shape)}" for row in plan.unsupported)
        raise FormatError(
            f"strict: no quantized layer for {names}; name them in skip, or pass strict=False"
        )
    quantized = _replace(model, plan.layers, plan.experts)
    return Coverage(
        quantized=quantized, kept=plan.kept, unsupported=plan.unsupported, unused=rules.unused()
    )


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn every quantized layer back into a dense one, in place; returns the model.

    Args:
        model: A model with quantized layers.
        dtype: Dtype of the weights; None for the dtype that each had.
    """
    made: dict[int, nn.Module] = {}
    done: list[str] = []
    for path, module in list(model.named_modules(remove_duplicate=False)):
        dense = made.get(id(module))
        if dense is None and not path.startswith(tuple(done)):
            dense = _dense(module, dtype)
        if dense is None:
            continue
        made[id(module)] = dense
        _set(model, path, dense)
        if isinstance(module, QuantizedExperts):
            done.append(f"{path}.")  # its layers went with it
    return model


def _dense(module: nn.Module, dtype: torch.dtype | None) -> nn.Module | None:
    if isinstance(module, QuantizedLinear):
        return module.to_linear(dtype)
    if isinstance(module, QuantizedEmbedding):
        return module.to_embedding(dtype)
    return module.to_experts(dtype) if isinstance(module, QuantizedExperts) else None


def _replace(
    model: nn.Module, layers: Mapping[str, Choice], experts: Mapping[str, Experts]
) -> list[Row]:
    """Quantize the chosen modules one at a time, wherever in the model they occur."""
    rows: list[Row] = []
    made: dict[int, nn.Module] = {}
    originals: dict[int, nn.Module] = {}  # kept alive, so that no id is used twice
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in made:
            _set(model, path, made[id(module)])
            continue
        quantized: nn.Module
        if path in layers:
            quantized, row = _layer(path, module, layers[path])
            rows.append(row)
        elif path in experts:
            quantized, more = _experts(path, module, experts[path])
            rows += more
        else:
            continue
        originals[id(module)], made[id(module)] = module, quantized
        _set(model, path, quantized)
    return rows


def _layer(path: str, module: nn.Module, choice: Choice) -> tuple[QuantizedModule, Row]:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    replacement = replacement_of(module)
    assert replacement is not None
    try:
        quantized = replacement(module, choice)
    except Error as error:
        raise type(error)(f"{path}.weight: {error}") from error
    return quantized, Row(
        name=f"{path}.weight" if path else "weight",
        kind=type(module).__name__,
        shape=tuple(weight.shape),
        format=choice.format,
        bytes_before=weight.nbytes,
        bytes_after=quantized.qtensor.nbytes,
    )


def _experts(path: str, module: nn.Module, plan: Experts) -> tuple[QuantizedExperts, list[Row]]:
    def make(name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
        choice = plan.choices[name]
        if choice is None:
            return dense_projection(weight, bias)
        try:
            return quantized_projection(weight, bias, **choice.options(), compute=choice.computable)
        except Error as error:
            raise type(error)(f"{path}.{name}.weight: {error}") from error

    first = next(choice for choice in plan.choices.values() if choice is not None)
    quantized = experts_class(first.bits)(module, plan.names, make)
    if len({choice and choice.format for choice in plan.choices.values()}) == 1:
        return quantized, _rows_of_parameters(path, module, quantized, first.format)
    return quantized, _rows_of_projections(path, module, quantized)


def _rows_of_parameters(
    path: str, module: nn.Module, quantized: QuantizedExperts, format: str
) -> list[Row]:
    """A row for each fused parameter, where all of it is in one format."""
    after: dict[str, int] = {}
    for _, _, role, layer in quantized.projections():
        assert isinstance(layer, QuantizedLinear)
        parameter = quantized.fused.parameter(role)
        after[parameter] = after.get(parameter, 0) + layer.qtensor.nbytes
    return [
        Row(
            name=f"{path}.{parameter}" if path else parameter,
            kind=type(module).__name__,
            shape=quantized.fused.parameters[parameter],
            format=format,
            bytes_before=module.get_parameter(parameter).nbytes,
            bytes_after=size,
        )
        for parameter, size in after.items()
    ]


def _rows_of_projections(path: str, module: nn.Module, quantized: QuantizedExperts) -> list[Row]:
    """A row for each projection, where they differ; those that stayed dense among them."""
    size = quantized.fused.dtype.itemsize
    return [
        Row(
            name=f"{path}.{name}.weight" if path else f"{name}.weight",
            kind=type(module).__name__,
            shape=(layer.out_features, layer.in_features),
            format=layer.format,
            bytes_before=size * layer.in_features * layer.out_features,
            bytes_after=layer.qtensor.nbytes,
        )
        for name, _, _, layer in quantized.projections()
        if isinstance(layer, QuantizedLinear)
    ]


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    if not path:
        raise FormatError(
            "the model itself is a single layer and cannot be replaced in place; use"
            " nybble.nn.Linear4bit.from_linear or wrap it in torch.nn.Sequential"
        )
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
