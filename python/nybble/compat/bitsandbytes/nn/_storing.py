"""Saving and loading of layers with quantized weights, in bitsandbytes' key scheme."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nybble.compat.bitsandbytes._quant_state import QuantState
from nybble.compat.bitsandbytes.nn.params import Int8Params, Params4bit
from nybble.compat.bitsandbytes.utils import INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING
from nybble.errors import CheckpointError, FormatError

_QUANT_STATE = ".quant_state.bitsandbytes__"


class _Stored(nn.Module):
    """What the two kinds share: take the weight out of a state dict, leave the rest to torch."""

    weight: torch.Tensor

    def _weight_shape(self) -> tuple[int, int]:
        """Shape of the weight before it is quantized."""
        raise NotImplementedError

    def _companions(self, state_dict: Any, prefix: str) -> dict[str, torch.Tensor]:
        """Tensors that belong to the weight, by their full names."""
        raise NotImplementedError

    def _quantized(
        self, name: str, data: torch.Tensor, companions: dict[str, torch.Tensor]
    ) -> nn.Parameter:
        """A parameter of the tensors of a file, on their device."""
        raise NotImplementedError

    def _adopt(self, parameter: nn.Parameter) -> None:
        """Put a quantized parameter in place, keeping the object if its memory can be taken."""
        old = self.weight
        alike = type(old) is type(parameter) and old.requires_grad == parameter.requires_grad
        if alike and old.device == parameter.device:
            self.weight.data = parameter.data
            self.weight.__dict__.update(parameter.__dict__)
        else:
            self.weight = parameter

    def _is_quantized(self) -> bool:
        raise NotImplementedError

    def _check(self, name: str, shape: tuple[int, ...] | torch.Size | None) -> None:
        if shape is None or tuple(shape) != self._weight_shape():
            raise CheckpointError(
                f"'{name}' has shape {None if shape is None else tuple(shape)}, this layer stores"
                f" {self._weight_shape()}"
            )

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take codes with their companions, or a weight of floats."""
        name = prefix + "weight"
        companions = self._companions(state_dict, prefix)
        others = {key: value for key, value in state_dict.items() if key not in companions}
        if name in others and (companions or self._is_quantized()):
            assign = bool(local_metadata.get("assign_to_params_buffers", False))
            try:
                self._load_weight(name, others[name], companions, assign)
            except (CheckpointError, FormatError) as error:
                error_msgs.append(str(error))
            others[name] = self.weight  # already in place
        super()._load_from_state_dict(
            others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _load_weight(
        self, name: str, data: torch.Tensor, companions: dict[str, torch.Tensor], assign: bool
    ) -> None:
        device = self.weight.device
        if not companions and (not data.is_floating_point() or data.shape != self._weight_shape()):
            raise CheckpointError(
                f"'{name}' is {data.dtype} {tuple(data.shape)} without scales; a weight of"
                f" floats {self._weight_shape()} or its companions are needed"
            )
        if device.type == "meta" and not assign:
            raise CheckpointError(
                f"this layer is on the meta device; pass assign=True to load '{name}'"
            )
        if not assign:
            # A loaded layer must not share memory with the state dict that it came from.
            data = data.detach().to(device, copy=True)
            companions = {key: value.to(device, copy=True) for key, value in companions.items()}
        parameter = self._quantized(name, data, companions)
        if assign:
            self.weight = parameter
        else:
            self._adopt(parameter)


class Stored4bit(_Stored):
    """Saves `weight` with `weight.absmax`, `weight.quant_map` and so on beside it."""

    quant_state: QuantState | None
    quant_storage: torch.dtype

    def _is_quantized(self) -> bool:
        return getattr(self.weight, "quant_state", None) is not None

    def _companions(self, state_dict: Any, prefix: str) -> dict[str, torch.Tensor]:
        name = prefix + "weight"
        if not any(key.startswith(name + _QUANT_STATE) for key in state_dict):
            return {}
        return {key: value for key, value in state_dict.items() if key.startswith(name + ".")}

    def _quantized(
        self, name: str, data: torch.Tensor, companions: dict[str, torch.Tensor]
    ) -> nn.Parameter:
        if not companions:
            settings = {k: v for k, v in self.weight.__dict__.items() if k != "bnb_quantized"}
            return Params4bit(data, **settings)._quantize(data.device)
        device = data.device
        parameter = Params4bit.from_prequantized(data, companions, device=device)
        state = parameter.quant_state
        assert state is not None
        self._check(name, state.shape)
        parameter.module = self
        self.quant_state = state
        return parameter

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = getattr(self.weight, "quant_state", None)
        if state is not None:
            for key, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value


class Stored8bit(_Stored):
    """Saves `weight` with `SCB` and `weight_format` beside it."""

    def _is_quantized(self) -> bool:
        return isinstance(self.weight, Int8Params) and self.weight.is_quantized8

    def _companions(self, state_dict: Any, prefix: str) -> dict[str, torch.Tensor]:
        keys = (prefix + "SCB", prefix + "weight_format")
        return {key: state_dict[key] for key in keys if key in state_dict}

    def _quantized(
        self, name: str, data: torch.Tensor, companions: dict[str, torch.Tensor]
    ) -> nn.Parameter:
        if not companions:
            return Int8Params(data, requires_grad=False)._quantize(data.device)  # type: ignore[no-any-return]
        scales = next((v for key, v in companions.items() if key.endswith("SCB")), None)
        layout = next((v for key, v in companions.items() if key.endswith("weight_format")), None)
        if layout is not None and int(layout) != 0:
            known = INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.get(int(layout), "unknown")
            raise CheckpointError(
                f"'{name}' has weight_format {int(layout)} ({known}); only 0 (row) can be"
                " read; save the model again with a current bitsandbytes"
            )
        self._check(name, data.shape)
        if scales is None or data.dtype != torch.int8 or scales.numel() != data.shape[0]:
            raise CheckpointError(
                f"'{name}', int8 {tuple(data.shape)}, needs {data.shape[0]} scales in SCB, found"
                f" {'none' if scales is None else scales.numel()} for a weight of {data.dtype}"
            )
        return Int8Params(data, requires_grad=False, CB=data, SCB=scales.float().flatten())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._is_quantized():
            assert isinstance(self.weight, Int8Params)
            if self.weight.SCB is not None:
                destination[prefix + "SCB"] = self.weight.SCB
                destination[prefix + "weight_format"] = torch.tensor(0, dtype=torch.uint8)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move the scales after the codes: torch keeps the parameter, and takes only its data."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        weight = self.weight
        if isinstance(weight, Int8Params) and weight.is_quantized8:
            weight.CB = weight.data
            if weight.SCB is not None and weight.device.type != "meta":
                weight.SCB = weight.SCB.to(weight.device)
        return self
