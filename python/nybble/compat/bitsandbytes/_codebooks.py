"""Blockwise codes of any table of values, in plain torch.

For tables that are no format of nybble. Rounding is the nearest value, and halfway the lower one,
as in nybble's own formats (and as bitsandbytes' CUDA kernels search; its CPU library looks codes
up in a table of 65,536 steps, which misses the nearest value now and then, and zero always).
"""

from __future__ import annotations

import torch

from nybble.errors import FormatError


def _blocks(flat: torch.Tensor, blocksize: int) -> torch.Tensor:
    padding = -flat.numel() % blocksize
    return torch.nn.functional.pad(flat, (0, padding)).reshape(-1, blocksize)


def check_code(code: torch.Tensor) -> None:
    """Raise unless `code` is a table that uint8 codes can index."""
    if code.dim() != 1 or not 2 <= code.numel() <= 256 or not code.is_floating_point():
        raise FormatError(
            "a code is 2 to 256 floating point values in one dimension, got"
            f" {tuple(code.shape)} of {code.dtype}"
        )


def encode(
    x: torch.Tensor, code: torch.Tensor, blocksize: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (uint8, shape of `x`) and scales (float32 [blocks]) for a table of values.

    Args:
        x: Floating point, any shape.
        code: Values by code, in any order.
        blocksize: Consecutive elements that share a scale.

    Raises:
        FormatError: A value is not finite.
    """
    blocks = _blocks(x.detach().flatten().float(), blocksize)
    absmax = blocks.abs().amax(dim=1) if blocks.numel() else blocks.new_zeros(0)
    if not bool(torch.isfinite(absmax).all()):
        block = int(torch.nonzero(~torch.isfinite(absmax))[0])
        raise FormatError(
            f"block {block} (elements {block * blocksize} and on) has a value that is not finite;"
            " repair the tensor first"
        )
    ordered, order = torch.sort(code.float(), stable=True)
    pivots = (ordered[:-1] + ordered[1:]) / 2
    reciprocal = 1 / absmax
    # A reciprocal that overflows belongs to a block of zeros or of subnormals.
    scaled = torch.where(
        torch.isfinite(reciprocal)[:, None],
        blocks * reciprocal[:, None],
        blocks / absmax.clamp(min=torch.finfo(torch.float32).smallest_normal * 2**-23)[:, None],
    )
    position = torch.bucketize(scaled, pivots)
    codes = order[position].flatten()[: x.numel()].to(torch.uint8)
    return codes.reshape(x.shape), absmax


def decode(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`code[codes] * absmax` in float32, rounded once to `dtype`; the shape of `codes`."""
    values = code.float()[codes.flatten().long()]
    blocks = _blocks(values, blocksize) * absmax.float()[:, None]
    return blocks.flatten()[: codes.numel()].to(dtype).reshape(codes.shape)
