"""Which layers of a model an adapter goes to."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from nybble.errors import FormatError
from nybble.nn.experts import QuantizedExperts
from nybble.nn.linear import QuantizedLinear
from nybble.nn.quantized import QuantizedModule
from nybble.nn.replace import is_linear

ALL_LINEAR = "all-linear"

# What transformers calls the head that a classifier trains from scratch.
_CLASSIFIERS = ("score", "classifier")
_CLASSIFYING = ("SEQ_CLS", "TOKEN_CLS")


def is_all_linear(targets: str | Sequence[str] | None) -> bool:
    """Whether every linear layer is meant."""
    if isinstance(targets, str):
        return targets.lower() == ALL_LINEAR
    return targets is None or [str(name).lower() for name in targets] == [ALL_LINEAR]


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by name; one that carries an adapter is given as the layer inside."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside: set[str] = set()
    for name, module in model.named_modules():
        if name in inside:
            continue
        if isinstance(module, BaseTunerLayer):
            inside.update(f"{name}.{child}" for child, _ in module.named_modules() if child)
            yield name, module.get_base_layer()
        else:
            yield name, module


def linear_names(model: nn.Module, task: str | None) -> list[str]:
    """Full names of the linear layers that "all-linear" means.

    Left out are the output head, the head of a classifier, and layers of expert blocks.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    classifiers = _CLASSIFIERS if task in _CLASSIFYING else ()
    blocks = [name for name, m in model.named_modules() if isinstance(m, QuantizedExperts)]
    names = [
        name
        for name, layer in named_layers(model)
        if _is_linear(layer)
        and layer is not head
        and name not in classifiers
        and not any(name.startswith(f"{block}.") for block in blocks)
    ]
    if not names:
        raise FormatError(
            f"{type(model).__name__} has no linear layer that an adapter could go to, the output"
            " head and experts apart; name the layers in target_modules"
        )
    return names


def shortest_names(model: nn.Module, names: Iterable[str]) -> list[str] | str:
    """What `target_modules` says to mean exactly these modules.

    The last parts of the names where they mean only these, as people write them; else whole names;
    and a regular expression where a whole name is the end of another module's.
    """
    chosen = set(names)
    others = {name for name, _ in named_layers(model)} - chosen
    other_ends = {name.rpartition(".")[2] for name in others}
    ends = {name: name.rpartition(".")[2] for name in chosen}
    short = sorted({name if end in other_ends else end for name, end in ends.items()})
    if any(other.endswith(f".{name}") for name in short for other in others):
        return "|".join(re.escape(name) for name in sorted(chosen))
    return short


def target_layers(model: nn.Module, config: Any) -> dict[str, nn.Module]:
    """The layers that a config's `target_modules` names.

    Raises:
        FormatError: A target that matches nothing, or a quantized module that is not linear.
    """
    layers = dict(named_layers(model))
    _check_targets(config.target_modules, layers)
    found = {name: layer for name, layer in layers.items() if matches(config, name)}
    for name, layer in found.items():
        if isinstance(layer, QuantizedModule) and not isinstance(layer, QuantizedLinear):
            raise FormatError(
                f"target '{name}' is a {type(layer).__name__}; adapters go around linear layers,"
                " so leave it out of target_modules"
            )
    return found


def check_trained_whole(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse `modules_to_save` that hold quantized weights: those have no gradient.

    Raises:
        FormatError: The module, and what to do.
    """
    for name, layer in named_layers(model):
        for wanted in names:
            if isinstance(layer, QuantizedModule) and f".{wanted}." in f".{name}.":
                raise FormatError(
                    f"modules_to_save trains '{wanted}' whole, but '{name}' is quantized; leave it"
                    " out, make it a target, or skip it when the model is quantized"
                )


def matches(config: Any, name: str) -> bool:
    """Whether a config's targets mean the module of this name."""
    from peft.tuners.tuners_utils import check_target_module_exists

    return bool(check_target_module_exists(config, name))


def _check_targets(targets: str | Iterable[str], layers: dict[str, nn.Module]) -> None:
    if isinstance(targets, str):
        if not any(re.fullmatch(targets, name) for name in layers):
            raise FormatError(
                f"the regular expression {targets!r} matches no whole name of a module; names look"
                f" like {_example(layers)!r}, and 'all-linear' means every linear layer"
            )
        return
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            ends = {name.rpartition(".")[2] for name in layers}
            close = difflib.get_close_matches(target, [*ends, *layers], n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"example: '{_example(layers)}'"
            raise FormatError(f"no module is called '{target}', nor ends in '.{target}'; {hint}")


def _example(layers: dict[str, nn.Module]) -> str:
    return next((name for name, layer in layers.items() if _is_linear(layer)), "")


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, (QuantizedLinear, nn.Linear)) or is_linear(layer)
