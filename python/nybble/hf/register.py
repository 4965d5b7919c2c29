"""Make nybble known to transformers."""

from __future__ import annotations

from transformers.quantizers import auto

from nybble.hf.config import METHOD, SERVED_METHOD, NybbleConfig, ServedConfig
from nybble.hf.quantizer import NybbleHfQuantizer

CONFIGS = {METHOD: NybbleConfig, SERVED_METHOD: ServedConfig}


def register() -> None:
    """Register the methods; again does nothing."""
    for method, config in CONFIGS.items():
        if method not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
            auto.register_quantization_config(method)(config)
        if method not in auto.AUTO_QUANTIZER_MAPPING:
            auto.register_quantizer(method)(NybbleHfQuantizer)
