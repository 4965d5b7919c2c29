"""How names in files differ from names in a transformers model: transformers' own table.

transformers 5 merges the experts of a layer into parameters of rank 3 when it loads a model, and
renames some modules. What it does for which model is in `transformers.conversion_mapping`; it is
read from there, and only if the model is one of transformers'.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

# `mlp.experts.*.gate_proj.weight`: one tensor for each expert.
_SINGLE = re.compile(r"experts\\?\.\*\\?\.(\w+)\\?\.weight$")


class Conversions:
    """The conversions of every transformers model inside a module."""

    def __init__(self, model: nn.Module) -> None:
        #: Path of a transformers model, and the conversions of names below it.
        self._parts = [(f"{path}." if path else "", found) for path, found in _mappings(model)]

    def renamed(self, name: str) -> str:
        """The name in the model of a tensor that a file calls `name`; merging left aside."""
        prefix, conversions = self._part(name)
        for conversion in conversions:
            if not hasattr(conversion, "operations"):
                name = prefix + conversion.rename_source_key(name.removeprefix(prefix))[0]
        return name

    def expert_names(self, path: str, parameter: str) -> list[str]:
        """What files call the projections that are merged into a parameter of rank 3.

        Args:
            path: The experts module, such as `model.layers.0.mlp.experts`.
            parameter: Its parameter, such as `gate_up_proj`.

        Returns:
            Names such as `["w1", "w3"]`, in the order in which they are merged; empty if
            transformers merges nothing into it.
        """
        prefix, conversions = self._part(path)
        target = f"{path}.{parameter}".removeprefix(prefix)
        for conversion in conversions:
            if not _merges_experts(conversion) or len(conversion.target_patterns) != 1:
                continue
            scope = conversion.scope_prefix or ""
            ending = conversion.target_patterns[0].replace("\\", "")
            if target.endswith(ending) and scope in target:
                return [_SINGLE.findall(source)[0] for source in conversion.source_patterns]
        return []

    def _part(self, name: str) -> tuple[str, list[Any]]:
        return next(((p, found) for p, found in self._parts if name.startswith(p)), ("", []))


def _merges_experts(conversion: Any) -> bool:
    operations = [type(operation).__name__ for operation in getattr(conversion, "operations", ())]
    return operations[:1] == ["MergeModulelist"] and all(
        _SINGLE.search(source) for source in conversion.source_patterns
    )


def _mappings(model: nn.Module) -> Iterator[tuple[str, list[Any]]]:
    """Paths of the outermost transformers models, and the conversions of each."""
    if "transformers" not in sys.modules:  # then nothing here is one
        return
    from transformers import PreTrainedModel

    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # transformers 4: names are those of the files
        return
    seen: list[str] = []
    for path, module in model.named_modules():
        inside = any(not outer or path.startswith(f"{outer}.") for outer in seen)
        if not inside and isinstance(module, PreTrainedModel):
            seen.append(path)
            yield path, list(get_model_conversion_mapping(module))
