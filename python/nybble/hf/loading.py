"""The steps that transformers takes with each weight while it loads and saves a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D

from nybble import _core, functional
from nybble import reference as definition
from nybble.errors import CheckpointError, Error
from nybble.nn.linear import QuantizedLinear
from nybble.nn.place import hold_weight, weight_shape
from nybble.nn.quantized import QuantizedModule
from nybble.qtensor import QTensor

if TYPE_CHECKING:
    from nybble.hf.quantizer import NybbleHfQuantizer

# Names, after that of the module, under which the parts of a blockwise weight are stored.
COMPANIONS = [
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    *(
        f"weight.quant_state.{_core.quant_state_key(row['name'])}"
        for row in functional.formats()
        if row["decode"] != "dense" and not definition.is_row_wise(row["name"])
    ),
]
STORED_NAMES = ["weight", *COMPANIONS, "SCB", "weight_format"]


class _Operation(ConversionOps):  # type: ignore[misc]
    def __init__(self, hf_quantizer: NybbleHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer
        self.dtype: torch.dtype | None = None  # that the tensor would have, were it dense

    def __deepcopy__(self, memo: dict[int, Any]) -> _Operation:
        # transformers copies an operation for each weight; they all belong to one quantizer.
        return type(self)(self.hf_quantizer)


class Quantize(_Operation):
    """Quantize a dense weight into its module as soon as it is read."""

    def convert(
        self, input_dict: Mapping[str, Any], model: nn.Module, **_: Any
    ) -> dict[str, torch.Tensor]:
        """Take `{parameter: weight}`; the result is what the module then holds."""
        held: dict[str, torch.Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            module = model.get_submodule(name.rpartition(".")[0])
            assert isinstance(module, QuantizedModule)
            if getattr(module, "transposed", False):
                weight = weight.T
            reference = self.hf_quantizer.reference if weight.device.type == "cpu" else None
            try:
                module.requantize_(weight, reference=reference)
            except Error as error:
                raise type(error)(f"'{name}': {error}") from error
            module.dtype = weight.dtype
            module._is_hf_initialized = True  # type: ignore[assignment]
            held[name] = module.weight
        return held


class Deserialize(_Operation):
    """Put a stored quantized weight into its module; let dense weights pass.

    The file decides: a weight that is quantized there makes its module a quantized one, and one
    that is dense there makes it a dense one, whatever the skip list says.
    """

    def convert(
        self,
        input_dict: Mapping[str, Any],
        model: nn.Module,
        full_layer_name: str,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """Take the tensors of one parameter under `STORED_NAMES`."""
        tensors = {
            name: value[0] if isinstance(value, list) else value
            for name, value in input_dict.items()
        }
        path = full_layer_name.rpartition(".")[0]
        if len(tensors) == 1:
            return {name: self._dense(model, path, value) for name, value in tensors.items()}
        q = _read(tensors, full_layer_name, self.hf_quantizer.repair)
        return {"weight": place(model, path, q, self.hf_quantizer.compute).weight}

    def _dense(self, model: nn.Module, path: str, weight: torch.Tensor) -> torch.Tensor:
        module = model.get_submodule(path)
        dtype = self.dtype
        if isinstance(module, QuantizedModule):
            if not weight.is_floating_point():
                raise CheckpointError(
                    f"'{path}.weight' is {weight.dtype} without companions that say how to decode"
                    " it; they are missing from the checkpoint. Download it again"
                )
            make_dense(model, path, module)
            dtype = module.dtype
        if weight.is_floating_point() and dtype is not None and dtype.is_floating_point:
            weight = weight.to(dtype)
        return weight

    @property
    def reverse_op(self) -> ConversionOps:
        """What saving does: modules write the tensors themselves."""
        return Serialize()


class Serialize(ConversionOps):  # type: ignore[misc]
    """Leave tensors as they are."""

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Return the input."""
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        """The same."""
        return self


def make_dense(model: nn.Module, path: str, module: QuantizedModule) -> nn.Module:
    """Put an empty dense module in the place of a quantized one; the bias stays."""
    rows, columns = module.shape
    dense: nn.Module
    with torch.device("meta"):
        if not isinstance(module, QuantizedLinear):
            dense = nn.Embedding(rows, columns, dtype=module.dtype)
        elif module.transposed:
            dense = Conv1D(rows, columns).to(module.dtype)
        else:
            dense = nn.Linear(columns, rows, bias=False, dtype=module.dtype)
    if isinstance(module, QuantizedLinear):
        dense.register_parameter("bias", module.bias)
    model.set_submodule(path, dense.train(module.training))
    return dense


def _read(tensors: dict[str, torch.Tensor], name: str, repair: bool) -> QTensor:
    try:
        return QTensor.from_state_dict(tensors, repair=repair)
    except Error as error:
        raise CheckpointError(f"'{name}': {error}") from error


def place(model: nn.Module, path: str, q: QTensor, compute: str | None = None) -> QuantizedModule:
    """Let the module at this place hold `q`; one of another kind is replaced.

    `compute` is for a module that was dense.
    """
    shape = weight_shape(model.get_submodule(path))
    if shape != tuple(q.shape):
        raise CheckpointError(
            f"'{path}.weight' has shape {list(q.shape)} in the checkpoint and"
            f" {list(shape)} in the model; the config is not this checkpoint's"
        )
    module = hold_weight(model, path, q, compute=compute)
    module._is_hf_initialized = True  # type: ignore[assignment]
    return module
