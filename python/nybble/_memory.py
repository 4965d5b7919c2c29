"""How tensors are handed to Rust: (address, number of elements, dtype name).

The caller keeps the tensor alive during the call. Only contiguous CPU memory has an address
that Rust can read.
"""

from __future__ import annotations

import torch

from nybble.errors import DtypeError

Memory = tuple[int, int, str]

_NAMES: dict[torch.dtype, str] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.int64: "int64",
}


def memory(tensor: torch.Tensor) -> Memory:
    """Describe a contiguous CPU tensor.

    Raises:
        DtypeError: Rust has no such element type.
    """
    name = _NAMES.get(tensor.dtype)
    if name is None:
        known = ", ".join(str(dtype) for dtype in _NAMES)
        raise DtypeError(f"tensors of {tensor.dtype} are not supported; use one of {known}")
    return tensor.data_ptr(), tensor.numel(), name


def optional_memory(tensor: torch.Tensor | None) -> Memory | None:
    """Describe a tensor that may be absent."""
    return None if tensor is None else memory(tensor)
