"""bitsandbytes' key scheme for the tensors of one quantized weight.

Of a 4-bit weight `M.weight`: the packed codes, `M.weight.absmax`, `M.weight.quant_map`, with
nested scales `M.weight.nested_absmax` and `M.weight.nested_quant_map`, and the JSON text
`M.weight.quant_state.bitsandbytes__nf4`. Of an int8 weight: `M.weight`, `M.SCB`,
`M.weight_format`. Formats that bitsandbytes does not have use the 4-bit scheme with
`quant_state.nybble__<format>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from nybble import _core, reference
from nybble.errors import CheckpointError

if TYPE_CHECKING:
    from nybble.qtensor import QTensor


def parameter_name(prefix: str) -> str:
    """The parameter that a prefix names: itself, or `weight` of a module."""
    return prefix + "weight" if not prefix or prefix.endswith(".") else prefix


def _module_prefix(name: str) -> str:
    return name[: -len("weight")] if name.endswith("weight") else name + "."


def to_state_dict(q: QTensor, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of `q` under their file names."""
    name = parameter_name(prefix)
    if q.format == "int8":
        module = _module_prefix(name)
        return {
            name: q.packed,
            module + "SCB": q.absmax,
            module + "weight_format": torch.tensor(0, dtype=torch.uint8, device=q.device),
        }
    tensors = {name: q.packed.reshape(-1, 1), f"{name}.absmax": q.absmax}
    if q.quant_map is not None:
        # A copy, since those who write files refuse tensors that share memory.
        tensors[f"{name}.quant_map"] = q.quant_map.clone()
    offset = None
    if q.nested_absmax is not None and q.nested_offset is not None:
        tensors[f"{name}.nested_absmax"] = q.nested_absmax
        tensors[f"{name}.nested_quant_map"] = reference.codebook("dynamic8", q.device).clone()
        offset = q.nested_offset.item()
    dtype = str(q.dtype).removeprefix("torch.")
    text = _core.render_quant_state(q.format, q.blocksize, dtype, list(q.shape), offset).encode()
    key = f"{name}.quant_state.{_core.quant_state_key(q.format)}"
    tensors[key] = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(q.device)
    return tensors


def flat_int8(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors with int8 codes as [n, 1], the number of rows being that of the scales.

    A loader that does not know the format could take codes of the weight's own shape for a dense
    weight, and cast them.
    """
    flat = dict(tensors)
    for key in tensors:
        name = key.removesuffix("SCB") + "weight"
        if key.endswith("SCB") and name in tensors:
            flat[name] = tensors[name].reshape(-1, 1)
    return flat


def is_quantized(tensors: Mapping[str, torch.Tensor], prefix: str) -> bool:
    """Whether `tensors` hold a quantized form of this parameter."""
    name = parameter_name(prefix)
    return _module_prefix(name) + "SCB" in tensors or _blob_key(tensors, name) is not None


def keys(tensors: Mapping[str, torch.Tensor], prefix: str) -> set[str]:
    """The keys among `tensors` that belong to this parameter, companions included."""
    name = parameter_name(prefix)
    module = _module_prefix(name)
    own = {name, module + "SCB", module + "weight_format"}
    companions = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.")
    starts = tuple(f"{name}.{companion}" for companion in companions)
    return {key for key in tensors if key in own or key.startswith(starts)}


def _blob_key(tensors: Mapping[str, torch.Tensor], name: str) -> str | None:
    start = f"{name}.quant_state."
    return next((key for key in tensors if key.startswith(start)), None)


def from_state_dict(
    tensors: Mapping[str, torch.Tensor], prefix: str, repair: bool = False
) -> dict[str, Any]:
    """The arguments of `QTensor` for one parameter, checked."""
    name = parameter_name(prefix)
    module = _module_prefix(name)
    if module + "SCB" in tensors:
        return _int8(tensors, name, module)
    key = _blob_key(tensors, name)
    if key is None:
        raise CheckpointError(
            f"'{name}' has no quant_state and no SCB among {len(tensors)} tensors; it is not"
            " quantized, or its companions are missing"
        )
    return _blockwise(tensors, name, key, repair)


def _get(tensors: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    if key not in tensors:
        raise CheckpointError(f"tensor '{key}' is missing; its weight cannot be decoded without it")
    return tensors[key]


def _int8(tensors: Mapping[str, torch.Tensor], name: str, module: str) -> dict[str, Any]:
    packed, absmax = _get(tensors, name), tensors[module + "SCB"]
    layout = tensors.get(module + "weight_format")
    if layout is not None and layout.device.type != "meta" and int(layout) != 0:
        raise CheckpointError(
            f"'{module}weight_format' is {int(layout)}: only 0 (row-major) can be read; save the"
            " model again with a current bitsandbytes"
        )
    if packed.dtype != torch.int8 or packed.dim() == 0:
        raise CheckpointError(f"'{name}' should be int8 with rows, found {packed.dtype}")
    rows = packed.shape[:-1].numel()
    if packed.shape[-1] == 1 and absmax.numel() and rows % absmax.numel() == 0:
        packed = packed.reshape(absmax.numel(), -1)  # as flat_int8 has it
        rows = absmax.numel()
    if absmax.dtype != torch.float32 or absmax.numel() != rows:
        raise CheckpointError(
            f"'{module}SCB' should be {rows} float32 values, found"
            f" {absmax.numel()} of {absmax.dtype}"
        )
    return {
        "packed": packed,
        "absmax": absmax.flatten(),
        "format": "int8",
        "shape": packed.shape,
        "dtype": torch.float16,
        "blocksize": packed.shape[-1],
    }


def _blockwise(
    tensors: Mapping[str, torch.Tensor], name: str, key: str, repair: bool
) -> dict[str, Any]:
    try:
        text = bytes(tensors[key].cpu().tolist())
        format, blocksize, dtype, shape, offset = _core.parse_quant_state(text, repair)
    except CheckpointError as error:
        raise CheckpointError(f"'{key}': {error}") from None
    if key != f"{name}.quant_state.{_core.quant_state_key(format)}":
        raise CheckpointError(f"'{key}' says quant_type '{format}'; key and text disagree")
    nested = offset is not None
    blocksize, packed_len, scales, nested_scales = _core.layout(format, shape, blocksize, nested)
    packed = _get(tensors, name)
    spare = packed.dtype.itemsize - 1  # bytes that fill the last element of a wider storage dtype
    packed = packed.flatten().view(torch.uint8)
    if packed_len < packed.numel() <= packed_len + spare:
        packed = packed[:packed_len]
    absmax = _get(tensors, f"{name}.absmax")
    if repair and not nested:
        absmax = _untransposed(absmax, shape, blocksize)
    _check(name, packed, torch.uint8, packed_len)
    _check(f"{name}.absmax", absmax, reference.scale_dtype(format, nested), scales)
    nested_absmax = nested_offset = None
    if nested:
        nested_absmax = _get(tensors, f"{name}.nested_absmax")
        _check(f"{name}.nested_absmax", nested_absmax, torch.float32, nested_scales)
        nested_offset = torch.tensor(offset, dtype=torch.float32, device=packed.device)
    return {
        "packed": packed,
        "absmax": absmax,
        "format": format,
        "shape": torch.Size(shape),
        "dtype": getattr(torch, dtype),
        "blocksize": blocksize,
        "nested_absmax": nested_absmax,
        "nested_offset": nested_offset,
    }


def _untransposed(absmax: torch.Tensor, shape: list[int], blocksize: int) -> torch.Tensor:
    """Undo what bitsandbytes does to scales on some CPUs: BF16 as `[blocks of a row, rows]`."""
    damaged = len(shape) == 2 and shape[1] % blocksize == 0 and absmax.dtype == torch.bfloat16
    if damaged and tuple(absmax.shape) == (shape[1] // blocksize, shape[0]):
        return absmax.T.float().flatten()
    return absmax


def _check(name: str, tensor: torch.Tensor, dtype: torch.dtype, elements: int) -> None:
    if tensor.dtype != dtype or tensor.numel() != elements or tensor.dim() > 1:
        raise CheckpointError(
            f"'{name}' should be {elements} values of {dtype} in one dimension, found"
            f" {tuple(tensor.shape)} of {tensor.dtype}"
        )
