"""Plain 4-bit groups for peers that take weights as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]


def symmetric4(weight: torch.Tensor, group: int) -> tuple[Array, Array]:
    """Codes 0 to 15 (zero point 8), uint8 [N, K / group, group]; float32 scales [N, K / group]."""
    rows, columns = weight.shape
    groups = weight.numpy().reshape(rows, columns // group, group)
    at = np.abs(groups).argmax(-1)[..., None]
    scale = np.take_along_axis(groups, at, -1)[..., 0] / -8
    scale[scale == 0] = 1e-9
    codes = np.clip(np.rint(groups / scale[..., None]) + 8, 0, 15).astype(np.uint8)
    return codes, scale.astype(np.float32)


def low_first(codes: Array) -> Array:
    """Two codes a byte, the first in the low half."""
    packed: Array = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return np.ascontiguousarray(packed)
