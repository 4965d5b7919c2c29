"""Dictionaries as tensors, the form in which safetensors files hold the text of a weight."""

from __future__ import annotations

import json
from typing import Any

import torch

from nybble.compat.bitsandbytes._offered import explain_missing
from nybble.errors import CheckpointError

__all__ = [
    "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "pack_dict_to_tensor",
    "unpack_tensor_to_dict",
]

# Values of `weight_format` in files; only row-major weights are still written or read.
LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {"row": 0, "col32": 1, "col_turing": 2, "col_ampere": 3}
INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {
    value: name for name, value in LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.items()
}


def pack_dict_to_tensor(source_dict: dict[str, Any]) -> torch.Tensor:
    """The dictionary as JSON in UTF-8, one uint8 a byte."""
    return torch.frombuffer(bytearray(json.dumps(source_dict), "utf-8"), dtype=torch.uint8)


def unpack_tensor_to_dict(tensor_data: torch.Tensor) -> dict[str, Any]:
    """The reverse of `pack_dict_to_tensor`.

    Raises:
        CheckpointError: The bytes are not a JSON object.
    """
    try:
        unpacked = json.loads(bytes(tensor_data.cpu().tolist()))
    except ValueError as error:
        raise CheckpointError(f"a packed quant_state is not JSON: {error}") from None
    if not isinstance(unpacked, dict):
        raise CheckpointError(
            f"a packed quant_state should be a JSON object, found {type(unpacked).__name__}"
        )
    return unpacked


__getattr__ = explain_missing(__name__, __all__)
