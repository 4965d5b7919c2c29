"""How tensors are handed to Rust: (address, number of elements, dtype name).

The caller keeps the tensor alive during the call. Only contiguous memory has one address; Rust
reads what is in the CPU's, and hands what is on a CUDA device to kernels.
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
    torch.int32: "int32",
    torch.int64: "int64",
}


def memory(tensor: torch.Tensor) -> Memory:
    """Describe a contiguous tensor.

    Raises:
        DtypeError: Rust has no such element type.
    """
    return tensor.data_ptr(), tensor.numel(), name_of(tensor.dtype)


def name_of(dtype: torch.dtype) -> str:
    """The name by which Rust knows a dtype.

    Raises:
        DtypeError: Rust has no such element type.
    """
    name = _NAMES.get(dtype)
    if name is None:
        known = ", ".join(str(known) for known in _NAMES)
        raise DtypeError(f"tensors of {dtype} are not supported; use one of {known}")
    return name


def optional_memory(tensor: torch.Tensor | None) -> Memory | None:
    """Describe a tensor that may be absent."""
    return None if tensor is None else memory(tensor)
