"""Names that PEFT rewrites: projections of experts, as transformers 4 had them.

For Mixtral, Qwen3-MoE, DeepSeek and other mixtures, PEFT takes every target that ends in the old
name of an expert's projection (`w1`, `gate_proj`) for a part of the fused parameters that
transformers 5 has, whatever layer the target is. Quantized experts have no fused parameters, and
an ordinary layer of that name (a shared expert, a dense layer) would silently get no adapter.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

from torch import nn

from nybble.errors import FormatError
from nybble.hf.adapters.targets import matches, named_layers, shortest_names

_LOG = logging.getLogger("nybble")


def keep_named_layers(model: nn.Module, config: Any, named: set[str], chosen: bool) -> None:
    """See to it that a config means the same layers after PEFT has rewritten its targets.

    Args:
        model: The base model.
        config: The `LoraConfig`; its targets are narrowed where "all-linear" was meant.
        named: Names of the layers that it means.
        chosen: Whether somebody named them; else "all-linear" was meant.

    Raises:
        FormatError: Layers that somebody named would not be those that get adapters.
    """
    changed = named ^ _after_rewriting(model, config, named)
    if not changed:
        return
    first = sorted(changed)[0]
    if chosen:
        raise FormatError(
            f"PEFT rewrites targets of this model ({_kind(model)}), so that '{first}' and"
            f" {len(changed) - 1} more layers would not be treated as named: it takes names such as"
            f" '{first.rpartition('.')[2]}' for parts of fused experts, which quantized experts do"
            " not have, and regular expressions for last names; name other layers, in a list"
        )
    config.target_modules = shortest_names(model, named - changed)
    _LOG.warning(
        "PEFT takes %d layers of this %s, such as '%s', for parts of fused experts; they get no"
        " adapter",
        len(changed),
        _kind(model),
        first,
    )


def _after_rewriting(model: nn.Module, config: Any, named: set[str]) -> set[str]:
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # a PEFT that does not rewrite, or not there
        return named
    rewritten = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(rewritten, model, conversions=None)
    except ValueError as error:
        raise FormatError(
            f"PEFT cannot use these targets on this model ({_kind(model)}): {error} Quantized"
            " experts have no fused parameters; name other layers"
        ) from error
    return {name for name, _ in named_layers(model) if matches(rewritten, name)}


def _kind(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    return str(getattr(config, "model_type", type(model).__name__))
