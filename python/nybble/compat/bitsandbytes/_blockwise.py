"""8-bit blockwise codes: `quantize_blockwise` and its reverse."""

from __future__ import annotations

import functools

import torch

import nybble
from nybble import ops, reference
from nybble.compat.bitsandbytes import _codebooks
from nybble.compat.bitsandbytes._quant_state import QuantState, has_dynamic_code
from nybble.errors import FormatError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_DYNAMIC = "dynamic8"


@functools.cache
def _blocksizes() -> frozenset[int]:
    """Block sizes that nybble's own kernels take."""
    return frozenset(reference.spec(_DYNAMIC)["blocksizes"])


def check_float(dtype: torch.dtype | None, verb: str) -> None:
    """Raise unless `dtype` is one that can be quantized, or returned to."""
    if dtype not in FLOATS:
        raise FormatError(f"blockwise {verb} supports float32, float16 and bfloat16, got {dtype}")


def _check_blocksize(blocksize: int | None) -> int:
    if blocksize is None or blocksize <= 0:
        raise FormatError(f"blocksize must be positive, got {blocksize}")
    return blocksize


def deliver(result: torch.Tensor, out: torch.Tensor | None, *, cast: bool = False) -> torch.Tensor:
    """The result itself, or `out` filled with it.

    Raises:
        FormatError: `out` has another shape or device, or (unless `cast`) another dtype.
    """
    if out is None:
        return result
    if out.shape != result.shape or out.device != result.device:
        raise FormatError(
            f"out has shape {tuple(out.shape)} on {out.device}, the result is"
            f" {tuple(result.shape)} on {result.device}"
        )
    if out.dtype != result.dtype and not cast:
        raise FormatError(f"out is {out.dtype}, the result is {result.dtype}")
    return out.copy_(result)


def quantize_blockwise(
    A: torch.Tensor,
    code: torch.Tensor | None = None,
    absmax: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[torch.Tensor, QuantState]:
    """Quantize to one uint8 code an element, with a scale for each block.

    Args:
        A: float32, float16 or bfloat16, any shape.
        code: Value of each code, 2 to 256 floats in any order; None for the signed dynamic map
            (arXiv:2110.02861).
        absmax: Takes the scales if given.
        out: uint8 of the shape of `A`; takes the codes if given.
        blocksize: Consecutive elements that share a scale.
        nested: Quantize the scales too, with the same block size.

    Returns:
        Codes of the shape of `A`, and the state that `dequantize_blockwise` needs.

    Raises:
        FormatError: Dtype, block size, table or a value that cannot be quantized.
    """
    blocksize = _check_blocksize(blocksize)
    check_float(A.dtype, "quantization")
    if code is None:
        code = reference.codebook(_DYNAMIC, A.device)
        own = blocksize in _blocksizes()
    else:
        _codebooks.check_code(code)
        own = False
    code = code.to(A.device, copy=True)
    if own:
        q = nybble.quantize(A, _DYNAMIC, blocksize=blocksize)
        codes, scales = q.packed.reshape(A.shape), q.absmax
    else:
        codes, scales = _codebooks.encode(A, code, blocksize)
    state = QuantState(absmax=scales, code=code, blocksize=blocksize, dtype=A.dtype)
    if nested:
        offset = scales.mean()
        inner, state2 = quantize_blockwise(scales - offset, blocksize=blocksize)
        state = QuantState(
            absmax=inner,
            code=code,
            blocksize=blocksize,
            dtype=A.dtype,
            offset=offset,
            state2=state2,
        )
    if absmax is not None:
        state.absmax = deliver(state.absmax, absmax, cast=True)
    return deliver(codes, out, cast=True), state


def dequantize_blockwise(
    A: torch.Tensor,
    quant_state: QuantState | None = None,
    absmax: torch.Tensor | None = None,
    code: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> torch.Tensor:
    """Decode what `quantize_blockwise` made: `code[A] * absmax` in float32, rounded once.

    Args:
        A: uint8 codes, any shape.
        quant_state: The state; if given, it says everything else.
        absmax: Scales; needed without a state.
        code: Value of each code; None for the signed dynamic map.
        out: Takes the result if given; of the dtype of the state.
        blocksize: Consecutive elements that share a scale.
        nested: Whether scales are nested is read from the state; True needs one that is.

    Returns:
        Values of the shape of `A`, in the dtype of the state; float32 without one.

    Raises:
        FormatError: Neither state nor scales, a dtype that is not uint8, or lengths that disagree.
    """
    if quant_state is None:
        if absmax is None:
            raise FormatError("dequantize_blockwise needs quant_state or absmax, got neither")
        if code is None:
            code = reference.codebook(_DYNAMIC, A.device)
        quant_state = QuantState(absmax=absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    if nested and not quant_state.nested:
        raise FormatError("nested=True, but the state has no nested scales")
    if A.dtype != torch.uint8:
        raise FormatError(f"codes are uint8, got {A.dtype}")
    size = _check_blocksize(quant_state.blocksize)
    check_float(quant_state.dtype, "dequantization")
    assert quant_state.dtype is not None
    scales = block_scales(quant_state).to(A.device)
    blocks = -(-A.numel() // size)
    if scales.numel() != blocks:
        raise FormatError(
            f"{A.numel()} codes in blocks of {size} need {blocks} scales, got {scales.numel()}"
        )
    if has_dynamic_code(quant_state) and size in _blocksizes():
        how = (_DYNAMIC, size, list(A.shape), quant_state.dtype)
        values = ops.dequantize(A.contiguous(), scales, None, None, *how)
    else:
        if quant_state.code is None:
            raise FormatError("the state has no code, the table of values")
        table = quant_state.code.to(A.device)
        values = _codebooks.decode(A, scales, table, size, quant_state.dtype)
    return deliver(values, out)


def block_scales(state: QuantState) -> torch.Tensor:
    """The float32 scale of each block of a state, nested ones decoded."""
    if state.state2 is None:
        return state.absmax.float()
    assert state.offset is not None
    decoded = dequantize_blockwise(state.absmax, state.state2)
    return (decoded + state.offset.to(decoded.device)).float()
