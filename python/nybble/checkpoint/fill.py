"""Put the tensors of a checkpoint into a model, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from nybble import reference
from nybble.checkpoint.buffers import compute_buffers, stored_on_meta
from nybble.checkpoint.open import Checkpoint, Entry
from nybble.checkpoint.scaffold import Scaffold
from nybble.errors import CheckpointError, FormatError
from nybble.integer import check_compute
from nybble.nn.choice import is_linear
from nybble.nn.conversion import Conversions
from nybble.nn.experts import QuantizedExperts
from nybble.nn.place import hold_weight, weight_shape
from nybble.nn.quantized import QuantizedModule, empty_quantized

if TYPE_CHECKING:
    from nybble.qtensor import QTensor


def fill(
    model: nn.Module,
    checkpoint: Checkpoint,
    compute_dtype: torch.dtype | None,
    compute: str | None,
    device: torch.device | str | int | None = None,
) -> None:
    """Fill a model; see `load_model`.

    Raises:
        CheckpointError: The checkpoint does not fit. Nothing was changed then.
    """
    check_compute(compute, "int8")  # the name, before any work
    how = (compute_dtype, compute)
    device = None if device is None else torch.device(device)
    conversions = Conversions(model)
    places = _places(model, checkpoint, conversions)
    scaffold = Scaffold(
        model, conversions, {place: checkpoint.entry(name) for name, place in places.items()}
    )
    try:
        _check(model, checkpoint, places)
    except CheckpointError:
        scaffold.take_down()
        raise
    ties = _ties(model)
    for name, place in places.items():
        value = checkpoint[name]
        owner, parameter = _owner(model, place)
        if isinstance(owner, QuantizedExperts) and parameter in owner.fused.parameters:
            path = place.removesuffix(parameter)
            for piece_name, piece in owner.pieces(parameter, value):
                _put(model, path + piece_name, piece, how, device)
        else:
            _put(model, place, value, how, device)
    _tie_again(model, ties)
    scaffold.finish()
    compute_buffers(model, device)


def _places(model: nn.Module, checkpoint: Checkpoint, conversions: Conversions) -> dict[str, str]:
    """The name in the model of each tensor of a checkpoint: its own, or what transformers says."""
    known = {name for name, _ in _tensors(model)}
    return {name: name if name in known else conversions.renamed(name) for name in checkpoint}


def _check(model: nn.Module, checkpoint: Checkpoint, places: dict[str, str]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(model)}
    problems: list[str] = []
    given: set[str] = set()
    for name, place in places.items():
        entry = checkpoint.entry(name)
        owner, parameter = _owner(model, place) if _has_owner(model, place) else (None, "")
        if isinstance(owner, QuantizedExperts) and parameter in owner.fused.parameters:
            path = place.removesuffix(parameter)
            try:
                pieces = owner.pieces(parameter, _outline(entry))
                given.update(path + piece for piece, _ in pieces)
            except (CheckpointError, FormatError) as error:
                problems.append(f"'{name}': {error}")
            continue
        given.add(place)
        if place not in shapes or owner is None:
            problems.append(f"'{name}' has no place in {type(model).__name__}")
            continue
        problems += _misfits(name, entry, owner, shapes[place])
    names = {name: [name] for name, _ in model.named_parameters()}
    names.update({group[0]: group for group in _ties(model)})
    names.update({name: [name] for name in stored_on_meta(model)})
    problems += [f"'{name}' is missing" for name, group in names.items() if given.isdisjoint(group)]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{checkpoint.path} does not fit the model: {'; '.join(problems[:5])}{more}"
        )


def _misfits(name: str, entry: Entry, owner: nn.Module, expected: tuple[int, ...]) -> list[str]:
    """What is wrong with one tensor of a checkpoint."""
    if entry.format is not None and not isinstance(owner, QuantizedModule):
        if not (is_linear(owner) or isinstance(owner, nn.Embedding)):
            return [f"'{name}' is quantized, but {type(owner).__name__} cannot be"]
        expected = weight_shape(owner)
    if entry.shape != expected:
        return [f"'{name}' has shape {list(entry.shape)}, the model {list(expected)}"]
    return []


def _outline(entry: Entry) -> torch.Tensor | QTensor:
    """A tensor on the meta device with the layout of a parameter in a file."""
    if entry.format is None:
        return torch.empty(entry.shape, device="meta")
    blocksize = None if reference.is_row_wise(entry.format) else entry.blocksize
    dtype = getattr(torch, entry.dtype)
    return empty_quantized(entry.shape, entry.format, blocksize, entry.nested, dtype, "meta")


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers under every name, quantized weights with the shape they decode to."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            if isinstance(module, QuantizedModule) and name == "weight":
                tensor = torch.empty(module.shape, device="meta")
            yield prefix + name, tensor


def _has_owner(model: nn.Module, name: str) -> bool:
    module: nn.Module | None = model
    for part in name.split(".")[:-1]:
        module = None if module is None else module._modules.get(part)
    return module is not None


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _put(
    model: nn.Module,
    name: str,
    value: torch.Tensor | QTensor,
    how: tuple[torch.dtype | None, str | None],
    device: torch.device | None,
) -> None:
    module, attribute = _owner(model, name)
    held = getattr(module, attribute)
    assert isinstance(held, torch.Tensor)
    to = device if held.device.type == "meta" else held.device
    if isinstance(value, torch.Tensor):
        # What is held is filled, and moved with that.
        _fill(model, name, value if held.device.type != "meta" or to is None else value.to(to))
        return
    if to is not None:
        value = value.to(to)
    hold_weight(model, name.rpartition(".")[0], value, *how)


def _fill(model: nn.Module, name: str, value: torch.Tensor) -> None:
    module, attribute = _owner(model, name)
    if isinstance(module, QuantizedModule) and attribute == "weight":
        # A weight without memory says nothing of where the new one belongs.
        held = module.weight.device
        module.requantize_(value if held.type == "meta" else value.to(held))
        return
    target = getattr(module, attribute)
    if target.device.type != "meta":
        with torch.no_grad():
            target.copy_(value)
    elif isinstance(target, nn.Parameter):
        setattr(module, attribute, nn.Parameter(value, requires_grad=target.requires_grad))
    else:
        module._buffers[attribute] = value


def _ties(model: nn.Module) -> list[list[str]]:
    """Groups of names of one parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _tie_again(model: nn.Module, ties: list[list[str]]) -> None:
    """Give a parameter back to all its names, where loading has replaced it under one."""
    for group in ties:
        owners = [(*_owner(model, name), name) for name in group]
        held = [getattr(module, attribute) for module, attribute, _ in owners]
        loaded = next((p for p in held if p.device.type != "meta"), held[0])
        for (module, attribute, _), parameter in zip(owners, held, strict=True):
            if parameter.device.type == "meta" and not isinstance(module, QuantizedModule):
                setattr(module, attribute, loaded)
