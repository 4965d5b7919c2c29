"""Tables of values for 8-bit and 4-bit codes."""

from __future__ import annotations

import difflib
import statistics

import torch

from nybble import reference
from nybble.errors import FormatError

_ENTRIES = 256


def _padded(values: list[float]) -> torch.Tensor:
    """Sorted, with zeros up to 256 entries."""
    return torch.tensor(sorted([*values, *[0.0] * (_ENTRIES - len(values))]), dtype=torch.float32)


def create_linear_map(
    signed: bool = True, total_bits: int = 8, add_zero: bool = True
) -> torch.Tensor:
    """Evenly spaced values from -1 (0 if unsigned) to 1, float32 [256].

    Entries that fewer bits or `add_zero` leave over are zeros in the middle.
    """
    has_zero = signed and (add_zero or total_bits < 8)
    count = 2**total_bits - 1 if has_zero else 2**total_bits
    values = torch.linspace(-1.0 if signed else 0.0, 1.0, count)
    zeros = torch.zeros(_ENTRIES - count)
    return torch.cat((values[: count // 2], zeros, values[count // 2 :]))


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> torch.Tensor:
    """Quantiles of the normal distribution (QLoRA, arXiv:2305.14314), float32 [256].

    Args:
        offset: Probability of the outermost quantile.
        use_extra_value: 8 positive and 7 negative values beside zero (nf4), instead of 7 and 7.
            The remaining entries are zeros.
    """
    normal = statistics.NormalDist()

    def quantiles(count: int) -> list[float]:
        probabilities = torch.linspace(offset, 0.5, count)[:-1]
        return [normal.inv_cdf(probability) for probability in probabilities.tolist()]

    positive = quantiles(9 if use_extra_value else 8)
    values = _padded(positive + [-value for value in quantiles(8)])
    return values / values.max()


def create_fp8_map(
    signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8
) -> torch.Tensor:
    """Values of a small floating point type, largest 1, sorted, float32 [256].

    Raises:
        FormatError: The bits do not add up to `total_bits`.
    """
    if exponent_bits + precision_bits + int(signed) != total_bits:
        raise FormatError(
            f"{exponent_bits} exponent bits, {precision_bits} precision bits and"
            f" {int(signed)} sign bits do not make {total_bits} bits"
        )
    bias = 2 ** (exponent_bits - 1)
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**precision_bits):
            fraction = mantissa / 2**precision_bits
            # Exponent 0 holds the subnormals; larger exponents stand for smaller values here.
            subnormal = exponent == 0
            scale = 2.0**-bias if subnormal else 2.0 ** (1 + bias - exponent)
            value = (fraction if subnormal else 1 + fraction) * scale
            values += [value, -value] if signed else [value]
    table = _padded(values)
    return table / table.max()


def create_dynamic_map(
    signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8
) -> torch.Tensor:
    """Dynamic tree quantization (arXiv:1511.04561, arXiv:2110.02861), sorted, float32 [256].

    Each decade below 1 has twice the values of the one below it.

    Raises:
        FormatError: `max_exponent_bits` and `total_bits` do not fill the table.
    """
    spare = total_bits - 1 - max_exponent_bits
    values: list[float] = []

    def add_decade(intervals: float, exponent: int) -> None:
        bounds = torch.linspace(0.1, 1, int(intervals + 1), dtype=torch.float32)
        centres = (bounds[:-1] + bounds[1:]) / 2.0 * 10**exponent
        values.extend(centres.tolist())
        if signed:
            values.extend((-centres).tolist())

    for step in range(max_exponent_bits):
        add_decade(2.0 ** (step + spare + (not signed)), step - max_exponent_bits + 1)
    if spare > 0:  # bits that neither exponent nor indicator takes
        add_decade(2**spare - 1, 0)
    values += [0.0, 1.0]
    if len(values) != 2**total_bits:
        raise FormatError(
            f"max_exponent_bits={max_exponent_bits} with total_bits={total_bits} gives"
            f" {len(values)} values, not {2**total_bits}; total_bits - 1 exponent bits always fit"
        )
    return _padded(values)


# Values by code, before division by the largest magnitude.
_INT4 = [7.0, 6, 5, 4, 3, 2, 1, 0, -0.0, -1, -2, -3, -4, -5, -6, -7]
# AbnormalFloat for blocks of 64 (arXiv:2306.06965), highest first.
_AF4 = [
    *(1.0, 0.72424863, 0.55496234, 0.42563882, 0.31675666, 0.21961274, 0.12934483, 0.04273164),
    *(0.0, -0.04934812, -0.14982478, -0.25607552, -0.3736951, -0.51243739, -0.69441008, -1.0),
]
_TYPES = ("nf4", "fp4", "int4", "af4")


def get_4bit_type(
    typename: str, device: torch.device | str | int | None = None, blocksize: int = 64
) -> torch.Tensor:
    """The value of each 4-bit code, float32 [16].

    Args:
        typename: `nf4`, `fp4`, or one that has a table but no kernels: `int4`, `af4`.
        device: None for CUDA if it is there, else the CPU.
        blocksize: `af4` exists for 64 only.

    Raises:
        NotImplementedError: There is no such table.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if typename in ("nf4", "fp4"):
        return reference.codebook(typename, torch.device(device)).clone()
    if typename == "af4" and blocksize != 64:
        raise NotImplementedError(f"af4 is defined for blocksize 64, got {blocksize}")
    if typename not in _TYPES:
        close = difflib.get_close_matches(str(typename), _TYPES, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise NotImplementedError(f"no 4-bit type '{typename}'; there are {_TYPES}{hint}")
    table = torch.tensor(_INT4 if typename == "int4" else _AF4, device=device)
    return table / table.abs().max()
