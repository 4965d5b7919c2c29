"""Functions that quantize and decode tensors, under bitsandbytes' names.

Shapes, defaults and bytes are those of `bitsandbytes.functional`; errors are nybble's, which
derive from the same built-in classes.
"""

from __future__ import annotations

from nybble.compat.bitsandbytes._blockwise import dequantize_blockwise, quantize_blockwise
from nybble.compat.bitsandbytes._four_bit import (
    dequantize_4bit,
    dequantize_fp4,
    dequantize_nf4,
    quantize_4bit,
    quantize_fp4,
    quantize_nf4,
)
from nybble.compat.bitsandbytes._int8 import (
    int8_double_quant,
    int8_linear_matmul,
    int8_mm_dequant,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)
from nybble.compat.bitsandbytes._maps import (
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    get_4bit_type,
)
from nybble.compat.bitsandbytes._offered import explain_missing
from nybble.compat.bitsandbytes._products import gemv_4bit
from nybble.compat.bitsandbytes._quant_state import QuantState

__all__ = [
    "QuantState",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
]

__getattr__ = explain_missing(__name__, __all__)
