"""A LoRA config that knows nybble's layers."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from torch import nn

from nybble.errors import FormatError
from nybble.hf.adapters.packages import peft
from nybble.hf.adapters.rewriting import keep_named_layers
from nybble.hf.adapters.support import check_supported
from nybble.hf.adapters.targets import (
    check_trained_whole,
    is_all_linear,
    linear_names,
    shortest_names,
    target_layers,
)
from nybble.nn.linear import QuantizedLinear

# How the classes of transformers end, and PEFT's name for the task.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def lora_config(
    model: nn.Module,
    r: int = 16,
    lora_alpha: float = 16,
    target_modules: str | Sequence[str] | None = None,
    **options: Any,
) -> Any:
    """A `peft.LoraConfig` for a model with quantized layers.

    Use it as any config of PEFT: `peft.get_peft_model(model, lora_config(model))`. PEFT alone does
    not know nybble's layers: `get_peft_model` with a `LoraConfig` that was not made here or passed
    through `register` fails with "Target module ... is not supported", and its "all-linear" does
    not see them. What the config adds is not saved with an adapter; `nybble.hf.load_adapter` adds
    it again. A saved adapter is an ordinary one and loads onto the dense model with PEFT alone.

    Args:
        model: The model that the adapter is for; it is only looked at.
        r: Rank.
        lora_alpha: The update is scaled by `lora_alpha / r` (`/ sqrt(r)` with `use_rslora`).
        target_modules: None or "all-linear" for every linear layer, quantized or not, except the
            output head and the layers of mixture-of-experts blocks; a list of names or ends of
            names; or a regular expression that matches a whole name. Experts can be named, except
            in models whose expert names PEFT rewrites (Mixtral, Qwen3-MoE, DeepSeek).
        options: Any other field of `LoraConfig`. Without `task_type` it is told from the class of
            the model, and without `fan_in_fan_out` from the layers.

    Returns:
        The `LoraConfig`.

    Raises:
        ImportError: PEFT is not installed.
        FormatError: An unknown option, a target that matches nothing, is no linear layer or would
            be rewritten by PEFT, or an option that quantized layers cannot follow.
    """
    lora = peft().LoraConfig
    base = base_model(model)
    _check_names(options, [field.name for field in dataclasses.fields(lora) if field.init])
    task = options.setdefault("task_type", _task(base))
    chosen = not is_all_linear(target_modules)
    if not chosen:
        target_modules = shortest_names(base, linear_names(base, task))
    config = lora(r=r, lora_alpha=lora_alpha, target_modules=target_modules, **options)
    targets = target_layers(base, config)
    check_trained_whole(base, config.modules_to_save or ())
    keep_named_layers(base, config, set(targets), chosen)
    if "fan_in_fan_out" not in options:
        config.fan_in_fan_out = all(_is_transposed(layer) for layer in targets.values())
    if any(isinstance(layer, QuantizedLinear) for layer in targets.values()):
        check_supported(config)
    return register(config)


def register(config: Any) -> Any:
    """Teach a `LoraConfig` made elsewhere nybble's layers; returns it."""
    from nybble.hf.adapters.lora import LoraLinear

    config._register_custom_module({QuantizedLinear: LoraLinear})
    return config


def base_model(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper, or the model itself."""
    if isinstance(model, peft().PeftModel):
        inner: nn.Module = model.get_base_model()
        return inner
    return model


def _check_names(options: dict[str, Any], known: Sequence[str]) -> None:
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise FormatError(f"LoraConfig has no option '{name}'{hint}")


def _task(model: nn.Module) -> str | None:
    """PEFT's name of what a transformers model is for; None where its class does not say."""
    name = type(model).__name__
    if name.endswith("ForConditionalGeneration"):
        config = getattr(model, "config", None)
        return "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else None
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)


def _is_transposed(layer: nn.Module) -> bool:
    """Whether the dense form of a linear layer has its weight as [in, out] (Conv1D)."""
    if isinstance(layer, QuantizedLinear):
        return layer.transposed
    return not isinstance(layer, nn.Linear)
