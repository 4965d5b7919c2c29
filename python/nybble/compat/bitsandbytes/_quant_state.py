"""`QuantState`: what belongs to the codes of one tensor, under bitsandbytes' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nybble import reference
from nybble.compat.bitsandbytes.utils import pack_dict_to_tensor, unpack_tensor_to_dict
from nybble.errors import CheckpointError

_PACKED_PREFIX = "bitsandbytes__"
_TENSORS = ("absmax", "quant_map")
_FIELDS = (*_TENSORS, "quant_type", "blocksize", "dtype", "shape")
_NESTED = ("nested_absmax", "nested_quant_map", "nested_blocksize", "nested_dtype", "nested_offset")


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _is_dynamic(code: torch.Tensor) -> bool:
    if code.device.type == "meta" or code.dtype != torch.float32 or code.numel() != 256:
        return False
    return torch.equal(code, reference.codebook("dynamic8", code.device))


def _close(a: Any, b: Any) -> bool:
    """Whether two optional tensors agree to 1e-6."""
    if a is None or b is None:
        return a is b
    same_kind = a.dtype == b.dtype and a.shape == b.shape
    return same_kind and bool(torch.allclose(a, b.to(a.device), atol=1e-6))


class QuantState:
    """Scales, table, block size, shape and dtype of one quantized tensor.

    Attributes:
        absmax: Scale of each block: float32 [blocks], or uint8 codes if nested.
        shape: Shape of the tensor; None for 8-bit blockwise codes, which have it themselves.
        code: Value of each code, float32 [16] or [256].
        blocksize: Consecutive elements that share a scale.
        quant_type: `nf4` or `fp4`; None for 8-bit blockwise codes.
        dtype: Dtype that dequantizing returns to.
        offset: float32 mean of the scales if they are nested, else None.
        state2: State of the scales if they are nested, else None.
        nested: Whether they are.
    """

    valid_quant_types = ("fp4", "nf4")
    valid_qs_type_keys = [_PACKED_PREFIX + name for name in valid_quant_types]  # noqa: RUF012
    valid_qs_keys = ["quant_state", *_FIELDS, *_NESTED]  # noqa: RUF012

    def __init__(
        self,
        absmax: torch.Tensor,
        shape: torch.Size | None = None,
        code: torch.Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: torch.Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.dtype = dtype
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.offset = offset
        self.state2 = state2
        self.nested = state2 is not None

    @property
    def code(self) -> torch.Tensor | None:
        """Value of each code."""
        return self._code

    @code.setter
    def code(self, code: torch.Tensor | None) -> None:
        # Looked at once, here, so that a forward pass need not compare tables.
        self._dynamic = code is not None and _is_dynamic(code)
        self._code = code

    def __getattr__(self, name: str) -> Any:
        """The packed text under its key, which FSDP looks up as an attribute."""
        if name.startswith(_PACKED_PREFIX):
            packed = self.as_dict(packed=True)
            if f"quant_state.{name}" in packed:
                return packed[f"quant_state.{name}"]
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __getitem__(self, index: Any) -> Any:
        """The state as the list that bitsandbytes used before it had this class.

        `[absmax, shape, dtype, blocksize, [offset, state2] or None, quant_type]`.
        """
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    @classmethod
    def from_dict(
        cls, qs_dict: Mapping[str, Any], device: torch.device | str | int | None
    ) -> QuantState:
        """Make a state of the companions of a weight in a file; the reverse of `as_dict`.

        Args:
            qs_dict: Entries by name, with or without a prefix up to the last dot. The text is
                either spread out or packed into one uint8 tensor `quant_state.bitsandbytes__nf4`.
                It is not changed.
            device: Where the tensors go.

        Raises:
            CheckpointError: Entries are missing, unknown or of a wrong kind.
        """
        texts = [
            key
            for key, value in qs_dict.items()
            if "quant_state" in key and isinstance(value, torch.Tensor)
        ]
        entries = {
            key.rpartition(".")[2]: value for key, value in qs_dict.items() if key not in texts
        }
        if "quant_type" not in entries:
            if len(texts) != 1 or texts[0].rpartition(".")[2] not in cls.valid_qs_type_keys:
                raise CheckpointError(
                    "expected one packed quant_state with a key that ends in one of"
                    f" {cls.valid_qs_type_keys}, or its entries unpacked; found"
                    f" {texts or 'neither'} among {sorted(qs_dict)}"
                )
            entries.update(unpack_tensor_to_dict(qs_dict[texts[0]]))
        nested = "nested_absmax" in entries
        _check_entries(entries, (*_FIELDS, *_NESTED) if nested else _FIELDS, cls.valid_qs_keys)
        offset = state2 = None
        if nested:
            offset = torch.tensor(float(entries["nested_offset"]), dtype=torch.float32).to(device)
            state2 = cls(
                absmax=entries["nested_absmax"].to(device),
                blocksize=entries["nested_blocksize"],
                code=entries["nested_quant_map"].to(device),
                dtype=_dtype(entries["nested_dtype"]),
            )
        shape = entries["shape"]
        return cls(
            quant_type=entries["quant_type"],
            absmax=entries["absmax"].to(device),
            blocksize=entries["blocksize"],
            code=entries["quant_map"].to(device),
            dtype=_dtype(entries["dtype"]),
            shape=None if shape is None else torch.Size(shape),
            offset=offset,
            state2=state2,
        )

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The entries by name, as files have them.

        Args:
            packed: Put everything that is no tensor as JSON into one uint8 tensor
                `quant_state.bitsandbytes__<quant_type>`, so that only tensors remain. A state
                without `quant_type` is not packed.
        """
        entries: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": _name(self.dtype),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.state2 is not None:
            assert self.state2.code is not None
            assert self.offset is not None
            entries |= {
                "nested_absmax": self.state2.absmax,
                "nested_blocksize": self.state2.blocksize,
                # Its own memory: safetensors drops one of two tensors that share theirs.
                "nested_quant_map": self.state2.code.clone(),
                "nested_dtype": _name(self.state2.dtype),
                "nested_offset": self.offset.item(),
            }
        if not packed or self.quant_type is None:
            return entries
        tensors = {key: value for key, value in entries.items() if isinstance(value, torch.Tensor)}
        others = {key: value for key, value in entries.items() if key not in tensors}
        text = pack_dict_to_tensor(others)
        return {**tensors, f"quant_state.{_PACKED_PREFIX}{self.quant_type}": text}

    def to_dict(self, packed: bool = False) -> dict[str, Any]:
        """The same as `as_dict`."""
        return self.as_dict(packed)

    def to(self, device: torch.device | str | int | None) -> None:
        """Move the tensors, in place."""
        self.absmax = self.absmax.to(device)
        self.code = None if self.code is None else self.code.to(device)
        self.offset = None if self.offset is None else self.offset.to(device)
        if self.state2 is not None:
            self.state2.to(device)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return False
        return (
            all(
                getattr(self, name) == getattr(other, name)
                for name in ("shape", "dtype", "blocksize", "quant_type", "state2")
            )
            and _close(self.absmax, other.absmax)
            and _close(self.code, other.code)
            and _close(self.offset, other.offset)
        )

    __hash__ = None  # type: ignore[assignment]


def has_dynamic_code(state: Any) -> bool:
    """Whether the table of a state, ours or bitsandbytes' own, is that of `dynamic8`."""
    return state._dynamic if isinstance(state, QuantState) else _is_dynamic(state.code)


def _check_entries(entries: Mapping[str, Any], needed: tuple[str, ...], known: list[str]) -> None:
    missing = [key for key in needed if key not in entries]
    unknown = [key for key in entries if key not in known]
    if missing or unknown:
        raise CheckpointError(
            f"the quant_state of a weight lacks {missing or 'nothing'} and has unknown entries"
            f" {unknown or 'none'}; it needs {list(needed)}"
        )
    for key in needed:
        if key.endswith(("absmax", "quant_map")) and not isinstance(entries[key], torch.Tensor):
            raise CheckpointError(
                f"'{key}' should be a tensor, found {type(entries[key]).__name__}"
            )
    if entries["absmax"].dim() > 1:
        raise CheckpointError(
            f"absmax has shape {tuple(entries['absmax'].shape)}; bitsandbytes leaves it so when it"
            " saves after a forward on some CPUs. Read the file with"
            " nybble.open_checkpoint(path, repair=True), or save it again from the source"
        )


def _dtype(name: str) -> torch.dtype:
    names = {_name(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    if name not in names:
        raise CheckpointError(
            f"the dtype of a quantized weight is one of {list(names)}, got {name}"
        )
    return names[name]
