"""4-bit storage of any parameter of a module, by torch's parametrizations.

For parameters outside of linear layers, such as the experts of mixture-of-experts models. The
whole parameter is decoded when it is read, once during a forward pass.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from nybble.compat.bitsandbytes._four_bit import dequantize_4bit, quantize_4bit
from nybble.compat.bitsandbytes._offered import explain_missing
from nybble.compat.bitsandbytes._quant_state import QuantState

__all__ = [
    "Bnb4bitParametrization",
    "replace_parameter_4bit",
    "replace_parameter_4bit_prequantized",
]


class Bnb4bitParametrization(nn.Module):
    """Decodes 4-bit codes into the parameter that they stand for."""

    def __init__(self, quant_state: QuantState) -> None:
        """Keep the state of the codes."""
        super().__init__()
        self.quant_state = quant_state

    @torch.no_grad()
    def forward(self, quantized_param: torch.Tensor) -> torch.Tensor:
        """Codes to values of the shape and dtype of the state."""
        return dequantize_4bit(quantized_param, self.quant_state)


def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: Literal["nf4", "fp4"] = "nf4",
    blocksize: int | None = None,
) -> None:
    """Quantize a parameter; reading it decodes it, and a state dict has it in 4 bits.

    Args:
        module: Module that has the parameter.
        param_name: Name of the parameter in it.
        compress_statistics: Quantize the scales too.
        quant_type: `nf4` or `fp4`.
        blocksize: None for 64.

    Raises:
        AttributeError: The module has no such attribute.
        TypeError: It is no parameter.
    """
    parameter = _parameter(module, param_name)
    codes, state = quantize_4bit(
        parameter.data,
        blocksize=blocksize,
        compress_statistics=compress_statistics,
        quant_type=quant_type,
    )
    setattr(module, param_name, nn.Parameter(codes, requires_grad=False))
    _parametrize(module, param_name, state)


def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: dict[str, Any], device: torch.device
) -> None:
    """The same for a parameter that holds codes already.

    Args:
        module: Module that has the parameter.
        param_name: Name of the parameter in it.
        qs_dict: Companions of the codes, as `QuantState.from_dict` takes them.
        device: Where the companions go.

    Raises:
        AttributeError: The module has no such attribute.
        TypeError: It is no parameter.
        CheckpointError: The companions do not describe a weight.
    """
    _parameter(module, param_name)
    _parametrize(module, param_name, QuantState.from_dict(qs_dict, device=device))


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    parameter = getattr(module, name, None)
    if not hasattr(module, name):
        known = [key for key, _ in module.named_parameters(recurse=False)]
        raise AttributeError(f"the module has no parameter '{name}'; it has {known}")
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(f"'{name}' is {type(parameter).__name__}, not a parameter")
    return parameter


def _stage(module: nn.Module, name: str) -> Bnb4bitParametrization:
    stages: Any = module.parametrizations[name]  # type: ignore[index]
    return next(stage for stage in stages if isinstance(stage, Bnb4bitParametrization))


def _save(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    *,
    name: str,
) -> None:
    """A hook that gives the codes of a parameter their plain name, and adds their companions."""
    held = f"{prefix}parametrizations.{name}.original"
    if held in state_dict:
        state_dict[prefix + name] = state_dict.pop(held)
        companions = _stage(module, name).quant_state.as_dict(packed=True)
        state_dict.update({f"{prefix}{name}.{key}": v for key, v in companions.items()})


def _load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any, name: str) -> None:
    """The reverse of `_save`."""
    plain = prefix + name
    companions = {key: v for key, v in state_dict.items() if key.startswith(plain + ".")}
    if plain not in state_dict or not companions:
        return
    for key in companions:
        del state_dict[key]
    state_dict[f"{prefix}parametrizations.{name}.original"] = state_dict.pop(plain)
    device = module.parametrizations[name].original.device  # type: ignore[index, union-attr]
    copied = {key: value.clone() for key, value in companions.items()}
    _stage(module, name).quant_state = QuantState.from_dict(copied, device=device)


class _DecodedOnce:
    """Hooks that keep decoded parameters during a forward pass of the module."""

    def __init__(self) -> None:
        self.entered: list[AbstractContextManager[None]] = []

    def enter(self, *_: Any) -> None:
        context = parametrize.cached()
        context.__enter__()
        self.entered.append(context)

    def leave(self, *_: Any) -> None:
        # Called after a failed forward too, perhaps one that failed before `enter`.
        if self.entered:
            self.entered.pop().__exit__(None, None, None)


def _parametrize(module: nn.Module, name: str, state: QuantState) -> None:
    parametrize.register_parametrization(module, name, Bnb4bitParametrization(state), unsafe=True)
    once = _DecodedOnce()
    module.register_state_dict_post_hook(partial(_save, name=name))  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(partial(_load, name=name))  # type: ignore[no-untyped-call]
    module.register_forward_pre_hook(once.enter)
    module.register_forward_hook(once.leave, always_call=True)


__getattr__ = explain_missing(__name__, __all__)
