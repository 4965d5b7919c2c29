"""A quantized tensor: codes, scales and what is needed to decode them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from nybble import ops, reference, state
from nybble.cuda import place
from nybble.errors import DtypeError, FormatError
from nybble.products import Memo


@dataclass(frozen=True, kw_only=True, eq=False)
class QTensor:
    """One quantized tensor. Frozen; `to` and `dequantize` return new objects.

    Attributes:
        packed: Codes. uint8, flat, two codes a byte with the first element in the high half for
            4-bit formats and one code a byte for `dynamic8`; int8 of the tensor's own shape for
            `int8`.
        absmax: Scales, flat. float32, or uint8 where the scales are codes themselves (nested
            ones, and the exponents of `mxfp4`).
        format: Name of the format, as in `nybble.formats()`.
        shape: Shape of the tensor that was quantized.
        dtype: Its dtype, to which `dequantize()` returns.
        blocksize: Elements that share a scale; for `int8` the length of a row.
        nested_absmax: float32 scale of each 256 scales, or None.
        nested_offset: 0-d float32 mean of the scales, or None.
        numpy: Whether it was made from a numpy array, and decodes to one.
        memo: What products remember of it.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    format: str
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int
    nested_absmax: torch.Tensor | None = None
    nested_offset: torch.Tensor | None = None
    numpy: bool = False
    memo: Memo = field(default_factory=Memo, init=False, repr=False)

    @property
    def nested(self) -> bool:
        """Whether the scales are quantized themselves (double quantization)."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.packed.device

    @property
    def quant_map(self) -> torch.Tensor | None:
        """The value of each code, float32 [16] or [256]; None for `int8`."""
        if reference.spec(self.format)["codebook"] is None:
            return None
        return reference.codebook(self.format, self.device)

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The tensors, in the order in which the ops take them."""
        return self.packed, self.absmax, self.nested_absmax, self.nested_offset

    @property
    def how(self) -> tuple[str, int, list[int]]:
        """Format, block size and shape, in the order in which the ops take them."""
        return self.format, self.blocksize, list(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(part.nbytes for part in self.parts if part is not None)

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes and scales for each element; 0 for an empty tensor."""
        elements = self.shape.numel()
        return 8 * self.nbytes / elements if elements else 0.0

    def numel(self) -> int:
        """The number of elements."""
        return self.shape.numel()

    def dequantize(self, dtype: Any = None, out: torch.Tensor | None = None) -> Any:
        """Decode: value = codebook[code] * scale in float32, rounded once to `dtype`.

        Args:
            dtype: torch or numpy floating point type; None for the type it had, or that of `out`.
            out: Contiguous tensor of the original shape on the same device, which is overwritten.
                To fill memory that is there already saves what fresh memory costs, which for a
                large tensor is more than the arithmetic.

        Returns:
            `out` if that is given. Else a tensor of the original shape on the same device; a numpy
            array if this was made from one or `dtype` is a numpy type.

        Raises:
            DtypeError: `dtype` is not float32, float16 or bfloat16, or not the type of `out`.
            FormatError: `out` has another shape or is not contiguous.
            DeviceError: `out` is on another device.
        """
        if out is not None:
            if not isinstance(out, torch.Tensor):
                raise DtypeError(f"out must be a torch tensor, got {type(out).__name__}")
            if dtype is not None and _target(dtype, self)[0] != out.dtype:
                raise DtypeError(f"dequantize to {dtype} was asked for, but out is {out.dtype}")
            ops.dequantize_out(*self.parts, *self.how, out)
            return out
        target, as_numpy = _target(dtype, self)
        out = ops.dequantize(*self.parts, *self.how, target)
        return out.cpu().numpy() if as_numpy else out

    def to(self, device: torch.device | str | int) -> QTensor:
        """The same bits on another device, whose kernels are loaded if it is a CUDA device."""
        moved = [None if part is None else part.to(device) for part in self.parts]
        packed, absmax, nested_absmax, nested_offset = moved
        assert packed is not None
        assert absmax is not None
        place.follow(packed)
        return replace(
            self,
            packed=packed,
            absmax=absmax,
            nested_absmax=nested_absmax,
            nested_offset=nested_offset,
        )

    def cpu(self) -> QTensor:
        """The same bits in host memory."""
        return self.to("cpu")

    def cuda(self, device: int | None = None) -> QTensor:
        """The same bits on a CUDA device."""
        return self.to("cuda" if device is None else f"cuda:{device}")

    def state_dict(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The tensors under bitsandbytes' key scheme.

        Args:
            prefix: Full name of the parameter (`layers.0.q_proj.weight`), or, if empty or ending
                in a dot, of its module.
        """
        return state.to_state_dict(self, prefix)

    @classmethod
    def from_state_dict(
        cls, tensors: Mapping[str, torch.Tensor], prefix: str = "", *, repair: bool = False
    ) -> QTensor:
        """Find one quantized tensor among `tensors`; the reverse of `state_dict`.

        Args:
            tensors: Tensors under bitsandbytes' key scheme.
            prefix: As for `state_dict`.
            repair: As for `nybble.open_checkpoint`.

        Raises:
            CheckpointError: A companion is missing, or lengths, types or names disagree.
        """
        return cls(**state.from_state_dict(tensors, prefix, repair))

    def __repr__(self) -> str:
        nested = ", nested" if self.nested else ""
        blocks = "" if self.format == "int8" else f", blocksize={self.blocksize}"
        return (
            f"QTensor({self.format}, shape={tuple(self.shape)}, dtype={self.dtype}{blocks}{nested},"
            f" {self.bits_per_weight:.2f} bits/weight, device={self.device})"
        )


_NUMPY_TYPES = {np.dtype(np.float32): torch.float32, np.dtype(np.float16): torch.float16}


def _target(dtype: Any, q: QTensor) -> tuple[torch.dtype, bool]:
    if dtype is None:
        return q.dtype, q.numpy
    if isinstance(dtype, torch.dtype):
        return dtype, False
    try:
        return _NUMPY_TYPES[np.dtype(dtype)], True
    except (KeyError, TypeError):
        raise FormatError(
            f"cannot dequantize to {dtype!r}; use torch.float32, float16 or bfloat16, or numpy's"
            " float32 or float16"
        ) from None
