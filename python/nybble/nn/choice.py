"""How one layer is to be quantized, and which modules are layers that can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nybble import integer, reference
from nybble.nn.embedding import embedding_class
from nybble.nn.linear import linear_class
from nybble.nn.quantized import QuantizedModule


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How one layer is to be quantized."""

    format: str
    blocksize: int | None
    nested: bool
    compute_dtype: torch.dtype | None
    compute: str | None
    reference: str | None

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return reference.spec(self.format)["bits"]

    @property
    def quantizes(self) -> bool:
        """Whether the format is another one than a dense dtype."""
        return reference.spec(self.format)["decode"] != "dense"

    @property
    def computable(self) -> str | None:
        """`compute`, where the codes of the format are integers; None elsewhere."""
        return integer.where_possible(self.compute, self.format)

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
    return linear_class(choice.bits).from_linear(
        module, **choice.options(), compute=choice.computable
    )


@replaces(nn.Embedding)
def _embedding(module: nn.Embedding, choice: Choice) -> QuantizedModule:
    return embedding_class(choice.bits).from_embedding(module, **choice.options())


def replacement_of(module: nn.Module) -> Replacement | None:
    """How a module is quantized; None if it is no layer that can be."""
    kind = type(module)
    if kind in _REPLACEMENTS:
        return _REPLACEMENTS[kind]
    # transformers' Conv1D is a linear layer with a transposed weight. It is told by name, so
    # that nybble does not import transformers.
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return _REPLACEMENTS[nn.Linear]
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a dense linear layer that `quantize_model` can replace."""
    return replacement_of(module) is _REPLACEMENTS[nn.Linear]
