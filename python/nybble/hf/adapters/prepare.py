"""Make a model with quantized layers ready for training adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nybble.errors import FormatError
from nybble.nn.quantized import QuantizedModule

# Methods of transformers models, newest first, and the keyword for the options of checkpointing.
_ENABLE = {
    "activation_checkpointing_enable": "activation_checkpointing_kwargs",
    "gradient_checkpointing_enable": "gradient_checkpointing_kwargs",
}


def prepare_for_qlora(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
) -> nn.Module:
    """Freeze a model, cast what is small, and turn gradient checkpointing on.

    Call it before `peft.get_peft_model`. It does what PEFT's `prepare_model_for_kbit_training`
    does for bitsandbytes' layers; that function, called on a model with nybble's layers, does no
    harm, but leaves gradient checkpointing off without saying so.

    Codes and scales of quantized layers are never touched. Checkpointing acts only in training
    mode: call `model.train()`, as trainers do.

    Args:
        model: A transformers model, or any module if checkpointing is off; changed in place.
        use_gradient_checkpointing: Recompute activations in the backward pass instead of keeping
            them.
        gradient_checkpointing_kwargs: Passed to `torch.utils.checkpoint.checkpoint`; None for
            `{"use_reentrant": False}`.
        dtype: Dtype to which the remaining float16 and bfloat16 parameters (norms, biases,
            embeddings, output head) are cast, so that sums over many layers stay exact. For
            float32 that costs two bytes more for each of them: about 2 GB for embeddings and head
            of 128k x 4096. None leaves them as they are; adapters are float32 all the same.

    Returns:
        `model`.

    Raises:
        FormatError: No layer is quantized, or the model has no gradient checkpointing; nothing
            was changed then.
    """
    if not any(isinstance(module, QuantizedModule) for module in model.modules()):
        raise FormatError(
            f"{type(model).__name__} has no quantized layer; quantize it first"
            " (nybble.quantize_model), or train it without this preparation"
        )
    if use_gradient_checkpointing:
        _check_checkpointing(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if dtype is not None and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.to(dtype)
    if use_gradient_checkpointing:
        _checkpoint(model, {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})})
    return model


def _check_checkpointing(model: Any) -> None:
    name = type(model).__name__
    remedy = "pass use_gradient_checkpointing=False, or checkpoint its layers yourself"
    if not any(hasattr(model, method) for method in _ENABLE):
        methods = " or ".join(f"{method}()" for method in _ENABLE)
        raise FormatError(f"{name} has no {methods} as transformers models have; {remedy}")
    if not getattr(model, "supports_gradient_checkpointing", True):
        raise FormatError(f"{name} does not support gradient checkpointing; {remedy}")


def _checkpoint(model: Any, options: dict[str, Any]) -> None:
    """Turn checkpointing on, with inputs that want gradients so that no kind of it stops early."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    elif hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(_require_grad)
    method = next(name for name in _ENABLE if hasattr(model, name))
    getattr(model, method)(**{_ENABLE[method]: options})


def _require_grad(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    del module, inputs
    output.requires_grad_(True)
