"""Buffers that no checkpoint has.

A model that was built on the meta device has no memory for them either. Models of transformers
compute theirs in `_init_weights`; what is left is said, since the model cannot run without it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nybble.nn.quantized import QuantizedModule

_LOG = logging.getLogger("nybble")
# What transformers' own initialization passes over.
_LOADED = "_is_hf_initialized"


def stored_on_meta(model: nn.Module) -> Iterator[str]:
    """Names of buffers that a checkpoint has and the model has no memory for."""
    for path, module in model.named_modules():
        if not isinstance(module, QuantizedModule):
            for name in _on_meta(module):
                if name not in module._non_persistent_buffers_set:
                    yield f"{path}.{name}" if path else name


def compute_buffers(model: nn.Module, device: torch.device | None) -> None:
    """Give buffers that are not stored memory on `device` and the values of the model's own."""
    left = []
    for path, module in model.named_modules():
        names = _on_meta(module)
        if names and not isinstance(module, QuantizedModule):
            _compute(model, path, module, names, device or torch.device("cpu"))
            left += [f"{path}.{name}" if path else name for name in _on_meta(module)]
    if left:
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        _LOG.warning(
            "%s",
            f"{type(model).__name__}: {', '.join(left[:5])}{more} stay on the meta device: no"
            " checkpoint has these buffers. Give them values, or build the model with its buffers"
            " in memory, as accelerate's init_empty_weights does",
        )


def _on_meta(module: nn.Module) -> list[str]:
    return [name for name, held in module._buffers.items() if held is not None and held.is_meta]


def _compute(
    model: nn.Module, path: str, module: nn.Module, names: list[str], device: torch.device
) -> None:
    owner = _initializer(model, path)
    # Code from elsewhere may write over weights that were just loaded.
    native = type(owner).__module__.startswith("transformers.")
    if owner is None or (not native and next(module.parameters(), None) is not None):
        return
    before = {name: module._buffers[name] for name in names}
    fresh = {
        name: torch.empty_like(held, device=device)
        for name, held in before.items()
        if held is not None
    }
    others = [
        tensor
        for tensor in (*module.parameters(), *module.buffers())
        if not tensor.is_meta and not hasattr(tensor, _LOADED)
    ]
    module._buffers.update(fresh)
    for tensor in others:
        setattr(tensor, _LOADED, True)
    try:
        with torch.no_grad():
            owner._init_weights(module)
    finally:
        for tensor in others:
            delattr(tensor, _LOADED)
        for name, given in fresh.items():
            if module._buffers[name] is given and given._version == 0:
                module._buffers[name] = before[name]  # nobody has written to it


def _initializer(model: nn.Module, path: str) -> Any:
    """The nearest module above that knows how to initialize; models can be parts of models."""
    while True:
        owner = model.get_submodule(path)
        if hasattr(owner, "_init_weights"):
            return owner
        if not path:
            return None
        path = path.rpartition(".")[0]
