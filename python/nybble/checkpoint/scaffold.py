"""Fused experts of a model, taken apart while a checkpoint is loaded that has them one by one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from nybble import reference
from nybble.checkpoint.open import Entry
from nybble.errors import FormatError
from nybble.nn.conversion import Conversions
from nybble.nn.experts import QuantizedExperts, experts_class
from nybble.nn.fused import describe, holds_experts
from nybble.nn.plan import expert_names


class Scaffold:
    """Experts modules that stand in for fused ones while a model is filled.

    Their layers are views of the fused parameters. Experts that are quantized in the checkpoint
    keep such a module. Those that are dense there get the original module back, which was filled
    through the views.
    """

    def __init__(
        self, model: nn.Module, conversions: Conversions, entries: Mapping[str, Entry]
    ) -> None:
        """Put modules in place.

        Args:
            model: The model.
            conversions: What transformers does with names.
            entries: What the checkpoint has, by the names of the model.
        """
        self._model = model
        self._originals: dict[str, nn.Module] = {}
        for path, module in list(model.named_modules()):
            if not path or not holds_experts(module):
                continue
            found = {name: entry for name, entry in entries.items() if name.startswith(f"{path}.")}
            formats = [entry.format for entry in found.values() if entry.format is not None]
            if not formats and found.keys() <= {f"{path}.{name}" for name in module.state_dict()}:
                continue
            try:
                names = expert_names(conversions, path, describe(module))
            except FormatError:
                continue  # its tensors have no place then, which is said to the user
            bits = reference.spec(formats[0])["bits"] if formats else None
            kind = QuantizedExperts if bits is None else experts_class(bits)
            self._originals[path] = module
            model.set_submodule(path, kind(module, names, _views))

    def take_down(self) -> None:
        """Put every original back."""
        for path, original in self._originals.items():
            self._model.set_submodule(path, original)

    def finish(self) -> None:
        """Put back the originals whose experts are dense, filled; the others let go of theirs."""
        for path, original in self._originals.items():
            experts = self._model.get_submodule(path)
            assert isinstance(experts, QuantizedExperts)
            if type(experts) is not QuantizedExperts:
                _let_go(experts)
                continue
            if experts.fused.is_meta(original):
                first = next(experts.projection(0, "down").parameters())
                for name, tensor in experts.dequantize(first.dtype).items():
                    wanted = original.get_parameter(name).requires_grad
                    original._parameters[name] = nn.Parameter(tensor, requires_grad=wanted)
            self._model.set_submodule(path, original)


def _views(_: str, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach())
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))
    return layer


def _let_go(experts: QuantizedExperts) -> None:
    """Copy what is still a view, so that the fused parameters can be freed."""
    for _, _, _, layer in experts.projections():
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.untyped_storage().nbytes() > parameter.nbytes:
                copy = parameter.detach().clone(memory_format=torch.contiguous_format)
                layer._parameters[name] = nn.Parameter(copy, parameter.requires_grad)
