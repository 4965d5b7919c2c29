"""4-bit codes: `quantize_4bit` and its reverse, for nf4 and fp4."""

from __future__ import annotations

import difflib

import torch

import nybble
from nybble import ops, reference
from nybble.compat.bitsandbytes._blockwise import block_scales, check_float, deliver
from nybble.compat.bitsandbytes._maps import get_4bit_type
from nybble.compat.bitsandbytes._quant_state import QuantState, has_dynamic_code
from nybble.errors import FormatError

# The bytes of bitsandbytes' CPU path, the one of its two backends whose bytes are defined.
_REFERENCE = "bitsandbytes-cpu"
_DEFAULT_BLOCKSIZE = 64
_TYPES = QuantState.valid_quant_types
_STORAGE = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)

Parts = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None", "torch.Tensor | None"]


def check_4bit(blocksize: int | None, quant_type: str | None, dtype: torch.dtype | None) -> None:
    """Raise unless the description of a 4-bit tensor is one that there is.

    Raises:
        FormatError: Which of the three cannot be.
    """
    if quant_type not in _TYPES:
        close = difflib.get_close_matches(str(quant_type).lower(), _TYPES, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise FormatError(f"quant_type is 'nf4' or 'fp4', got {quant_type!r}{hint}")
    sizes = reference.spec(quant_type)["blocksizes"]
    if blocksize not in sizes:
        raise FormatError(f"blocksize is one of {sizes}, got {blocksize}")
    check_float(dtype, "4-bit quantization")


def quantize_4bit(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """Quantize to two codes a byte, the first element in the high half.

    Args:
        A: float32, float16 or bfloat16, any shape; blocks run over the flattened tensor.
        absmax: Takes the scales if given.
        out: Takes the codes if given.
        blocksize: 32, 64 (None), 128, ... 4096 consecutive elements that share a scale.
        compress_statistics: Quantize the scales too (double quantization, arXiv:2305.14314).
        quant_type: `nf4` or `fp4`.
        quant_storage: uint8, or a float type as which the same bytes pose.

    Returns:
        Codes [ceil(n / 2) / itemsize, 1] of `quant_storage`, and their state. The bytes are
        those of bitsandbytes on a CPU, on every device.

    Raises:
        FormatError: An option, dtype or value that cannot be.
    """
    blocksize = _DEFAULT_BLOCKSIZE if blocksize is None else blocksize
    check_4bit(blocksize, quant_type, A.dtype)
    if quant_storage not in _STORAGE:
        raise FormatError(f"quant_storage is one of {_STORAGE}, got {quant_storage}")
    q = nybble.quantize(
        A, quant_type, blocksize=blocksize, nested=bool(compress_statistics), reference=_REFERENCE
    )
    if q.packed.numel() % quant_storage.itemsize:
        raise FormatError(
            f"{A.numel()} elements make {q.packed.numel()} bytes, which are no whole number of"
            f" {quant_storage}; use quant_storage=torch.uint8"
        )
    state = QuantState(
        absmax=q.absmax,
        shape=A.shape,
        code=get_4bit_type(quant_type, device=A.device),
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=A.dtype,
        offset=q.nested_offset,
        state2=_nested_state(q),
    )
    if absmax is not None:
        state.absmax = deliver(state.absmax, absmax, cast=True)
    packed = q.packed.view(quant_storage).reshape(-1, 1)
    return deliver(packed, out, cast=True), state


def _nested_state(q: nybble.QTensor) -> QuantState | None:
    if q.nested_absmax is None:
        return None
    return QuantState(
        absmax=q.nested_absmax,
        code=reference.codebook("dynamic8", q.device).clone(),
        blocksize=reference.NESTED_BLOCKSIZE,
        dtype=torch.float32,
    )


def parts(packed: torch.Tensor, state: QuantState) -> Parts:
    """Codes and scales as nybble's ops take them, on the device of the codes.

    Nested scales go as they are if table and block size are those that the ops know; others are
    decoded first.
    """
    device, inner = packed.device, state.state2
    if inner is None:
        return packed, state.absmax.to(device, torch.float32), None, None
    if inner.blocksize == reference.NESTED_BLOCKSIZE and has_dynamic_code(inner):
        assert state.offset is not None
        nested_absmax = inner.absmax.to(device)
        return packed, state.absmax.to(device), nested_absmax, state.offset.to(device)
    return packed, block_scales(state).to(device), None, None


def how(state: QuantState) -> tuple[str, int, list[int]]:
    """Format, block size and shape, as nybble's ops take them."""
    if state.shape is None or state.blocksize is None or state.quant_type not in _TYPES:
        raise FormatError(
            "this state is not that of a 4-bit weight: it needs shape, blocksize and quant_type"
            f" nf4 or fp4, found {state.shape}, {state.blocksize} and {state.quant_type!r}"
        )
    return state.quant_type, state.blocksize, list(state.shape)


def dequantize_4bit(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> torch.Tensor:
    """Decode 4-bit codes: `code * absmax` in float32, rounded once.

    Args:
        A: Codes as `quantize_4bit` made them. In transposed form [1, bytes] the result is
            transposed too.
        quant_state: The state; if given, it says everything else.
        absmax: Scales; needed with `out` if there is no state.
        out: Takes the result if given; without a state its shape and dtype are used.
        blocksize: Used without a state; None for 64.
        quant_type: Used without a state.

    Returns:
        Values of the shape and dtype of the state.

    Raises:
        FormatError: Neither state nor (`absmax` and `out`), an option that cannot be, or lengths
            that disagree.
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise FormatError("dequantize_4bit needs quant_state, or both absmax and out")
        quant_state = QuantState(
            absmax=absmax,
            shape=out.shape,
            blocksize=_DEFAULT_BLOCKSIZE if blocksize is None else blocksize,
            quant_type=quant_type,
            dtype=out.dtype,
        )
    check_4bit(quant_state.blocksize, quant_state.quant_type, quant_state.dtype)
    packed = A.detach().contiguous()
    values = ops.dequantize(*parts(packed, quant_state), *how(quant_state), quant_state.dtype)
    values = deliver(values, out)
    # One byte is [1, 1] both ways; it stands for the weight as it is.
    transposed = A.dim() == 2 and A.shape[0] == 1 and A.shape[1] > 1
    return values.t() if transposed and values.dim() == 2 else values


def quantize_fp4(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """`quantize_4bit` with fp4."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def quantize_nf4(
    A: torch.Tensor,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[torch.Tensor, QuantState]:
    """`quantize_4bit` with nf4."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def dequantize_fp4(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
) -> torch.Tensor:
    """`dequantize_4bit` with fp4."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def dequantize_nf4(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int | None = None,
) -> torch.Tensor:
    """`dequantize_4bit` with nf4."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")
