"""What becomes of each parameter of a model, decided before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

from torch import nn

from nybble import _core
from nybble.errors import FormatError
from nybble.nn.choice import Choice, replacement_of
from nybble.nn.conversion import Conversions
from nybble.nn.coverage import Row
from nybble.nn.experts import projection_roles
from nybble.nn.fused import Fused, describe, holds_experts
from nybble.nn.quantized import QuantizedModule

_SKIP = "skip"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the caller of `quantize_model` wants.

    Attributes:
        main: How layers are quantized that no rule names.
        rules: The caller's patterns.
        has_skip_list: Whether a list replaces what is left alone by default.
        embeddings: Whether embeddings are quantized.
        experts: Whether fused experts are quantized.
    """

    main: Choice
    rules: _core.Rules
    has_skip_list: bool
    embeddings: bool
    experts: bool


@dataclass(frozen=True, kw_only=True)
class Experts:
    """What becomes of one experts module.

    Attributes:
        names: What gate, up and down projection are called.
        choices: Each projection (`3.up_proj`), and how it is quantized; None: it stays dense.
    """

    names: tuple[str, ...]
    choices: dict[str, Choice | None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What becomes of a model.

    Attributes:
        layers: Modules that are quantized whole, by path.
        experts: Experts modules of which something is quantized, by path.
        kept: Parameters that stay on purpose.
        unsupported: Parameters with two or more dimensions that have no quantized layer.
    """

    layers: dict[str, Choice] = field(default_factory=dict)
    experts: dict[str, Experts] = field(default_factory=dict)
    kept: list[Row] = field(default_factory=list)
    unsupported: list[Row] = field(default_factory=list)


def plan_model(model: nn.Module, request: Request) -> Plan:
    """Decide about every parameter that is not quantized yet."""
    plan = Plan()
    defaults = None if request.has_skip_list else _Defaults(model)
    conversions = Conversions(model)
    for path, module in _owners(model):
        choice, reason = _decide(model, path, module, request, defaults)
        is_layer = replacement_of(module) is not None
        if holds_experts(module):
            _plan_experts(plan, path, module, request, conversions, choice, reason)
        elif is_layer and choice is not None:
            plan.layers[path] = choice
            _keep(plan, path, module, "", besides={"weight"})
        else:
            lacking = f"no quantized layer for {type(module).__name__}"
            _keep(plan, path, module, reason, unsupported="" if is_layer else lacking)
    return plan


def _decide(
    model: nn.Module, path: str, module: nn.Module, request: Request, defaults: _Defaults | None
) -> tuple[Choice | None, str]:
    """How a module is quantized, if it is; else why not."""
    choice, reason = _ruled(request, path)
    if choice is not None or reason:
        return choice, reason
    reason = defaults.reason(path, module) if defaults is not None else ""
    if not reason and isinstance(module, nn.Embedding) and not request.embeddings:
        reason = "embedding (pass embeddings=True)"
    if not reason and holds_experts(module) and not request.experts:
        reason = "experts (pass experts=True)"
    if not reason and _is_router(model, path, module):
        reason = "router (chooses experts)"
    return (None, reason) if reason else (request.main, "")


def _ruled(request: Request, path: str) -> tuple[Choice | None, str]:
    """What the caller's patterns say about a path; nothing and no reason if none matches."""
    decision = request.rules.decide(path)
    if decision is None or decision == _SKIP:
        return None, decision or ""
    choice = replace(request.main, format=decision)
    return (choice, "") if choice.quantizes else (None, f"override to {decision}")


class _Defaults:
    """What is left alone unless the caller has a list."""

    def __init__(self, model: nn.Module) -> None:
        self._head = _core.Rules(["lm_head"], {})
        self._tied = _tied(model)

    def reason(self, path: str, module: nn.Module) -> str:
        if self._head.decide(path) == _SKIP:
            return "output head (default skip)"
        tied = id(getattr(module, "weight", None)) in self._tied
        return "tied weight" if tied else ""


def _is_router(model: nn.Module, path: str, module: nn.Module) -> bool:
    """Whether a module chooses experts: tiny, and its errors change which expert is asked."""
    *parents, name = path.split(".")
    beside = model.get_submodule(".".join(parents)) if path else model
    return (
        type(module).__name__.endswith("Router")  # as transformers calls them
        or "router" in parents
        or (name in ("gate", "router") and hasattr(beside, "experts"))
    )


def _plan_experts(
    plan: Plan,
    path: str,
    module: nn.Module,
    request: Request,
    conversions: Conversions,
    choice: Choice | None,
    reason: str,
) -> None:
    try:
        fused = describe(module)
    except FormatError as error:
        _keep(plan, path, module, reason, unsupported=str(error))
        return
    names = expert_names(conversions, path, fused)
    choices: dict[str, Choice | None] = {}
    dense: list[Row] = []
    for name, role in projection_roles(fused, names):
        named, why = _ruled(request, f"{path}.{name}")
        if named is None and not why:
            named, why = choice, reason
        choices[name] = named
        if named is None:
            weight = module.get_parameter(fused.parameter(role))
            dense.append(_kept(f"{path}.{name}.weight", module, weight, fused.shape(role), why))
    if any(choices.values()):
        plan.experts[path] = Experts(names=names, choices=choices)
        plan.kept.extend(dense)
        _keep(plan, path, module, "bias", besides={fused.parameter(role) for role in fused.roles})
    else:
        _keep(plan, path, module, dense[0].reason)


def expert_names(conversions: Conversions, path: str, fused: Fused) -> tuple[str, ...]:
    """What files call gate, up and down projection of the experts at `path`."""
    merged = [fused.parameter("up"), fused.parameter("down")]
    found = [name for parameter in merged for name in conversions.expert_names(path, parameter)]
    return tuple(found) if len(found) == len(fused.roles) else fused.default_names


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


def _keep(
    plan: Plan,
    path: str,
    module: nn.Module,
    reason: str,
    *,
    besides: Collection[str] = (),
    unsupported: str = "",
) -> None:
    """Put down the parameters of a module that stay as they are, but for those in `besides`."""
    for name, parameter in module.named_parameters(prefix=path, recurse=False):
        if name.rpartition(".")[2] in besides:
            continue
        lacking = parameter.dim() > 1 and not reason and bool(unsupported)
        why = unsupported if lacking else reason or "not a weight"
        if parameter.dim() < 2:
            why = "one-dimensional"
        row = _kept(name, module, parameter, tuple(parameter.shape), why)
        (plan.unsupported if lacking else plan.kept).append(row)


def _kept(
    name: str, module: nn.Module, parameter: nn.Parameter, shape: tuple[int, ...], reason: str
) -> Row:
    size = parameter.dtype.itemsize * math.prod(shape)
    return Row(
        name=name,
        kind=type(module).__name__,
        shape=shape,
        format=str(parameter.dtype).removeprefix("torch."),
        reason=reason,
        bytes_before=size,
        bytes_after=size,
    )
