"""Which options of PEFT's LoRA a quantized layer can follow."""

from __future__ import annotations

from typing import Any

from nybble.errors import FormatError

# Ways to start LoRA that leave the base weight alone and do not need it dense.
_INITS = (True, False, "gaussian", "eva")

# Variants of LoRA that PEFT has for dense layers only, or that nothing here tests.
_VARIANTS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)


def check_supported(config: Any) -> None:
    """Refuse what a quantized layer cannot do, before anything is changed.

    Raises:
        FormatError: The option, and what to do.
    """
    init = config.init_lora_weights
    if not (isinstance(init, bool) or init in _INITS):
        raise FormatError(
            f"init_lora_weights={init!r} needs or rewrites the dense weight, and this layer is"
            f" quantized; use one of {', '.join(map(repr, _INITS))}, or start the adapter on the"
            " dense model, save it, and quantize the rest of the weight"
        )
    for name in _VARIANTS:
        if getattr(config, name, None):
            raise FormatError(
                f"{name} does not work on quantized layers; leave it out (plain LoRA, rslora and"
                " use_dora work), or put the adapter on the dense model"
            )
