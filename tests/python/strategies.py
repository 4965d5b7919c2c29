"""Tensors and settings for property tests."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import torch

import nybble as nb

QUANTIZED = [row for row in nb.formats() if row["decode"] != "dense"]
NAMES = [row["name"] for row in QUANTIZED]
FOUR_BIT = [row["name"] for row in QUANTIZED if row["bits"] == 4]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SPEC = {row["name"]: row for row in QUANTIZED}

shapes = st.lists(st.integers(0, 70), max_size=3).map(tuple)
matrices = st.tuples(st.integers(1, 70), st.integers(1, 140))
dtypes = st.sampled_from(FLOATS)
seeds = st.integers(0, 2**31)
kinds = st.sampled_from(["normal", "heavy", "constant", "zero", "tiny", "steps"])


def tensor(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, kind: str = "normal"
) -> torch.Tensor:
    """Values of one kind; always finite in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = {
        "normal": lambda: x * 0.02,
        "heavy": lambda: (x**5).clamp(-6e4, 6e4),
        "constant": lambda: torch.full(shape, 0.37),
        "zero": lambda: torch.zeros(shape),
        "tiny": lambda: x * 1e-6,
        "steps": lambda: (x * 4).round() / 4,
    }[kind]()
    return x.to(dtype)


@st.composite
def settings_of(draw: Any, names: list[str] = NAMES) -> dict[str, Any]:
    """A format with a block size and nesting that it has."""
    name = draw(st.sampled_from(names))
    sizes = SPEC[name]["blocksizes"]
    return {
        "format": name,
        "blocksize": draw(st.sampled_from(sizes)) if sizes else None,
        "nested": draw(st.booleans()) if SPEC[name]["nestable"] else False,
    }


def for_format(x: torch.Tensor, name: str) -> torch.Tensor:
    """Values that the format is made for: the unsigned one takes no negative values."""
    return x.abs() if name == "dynamic8u" else x


def assert_product(
    got: torch.Tensor, x: torch.Tensor, q: nb.QTensor, bias: torch.Tensor | None = None
) -> None:
    """Whether `got` is x @ W.T + bias within the roundings of its dtype.

    Each weight, each product's sum and the result may be rounded once to the dtype, and float32
    sums of n terms lose at most n roundings: the bound is relative to the sum of magnitudes.
    """
    weight = q.dequantize(torch.float32).double()
    want, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if bias is not None:
        want, size = want + bias.double(), size + bias.double().abs()
    slack = 2 * torch.finfo(got.dtype).eps + x.shape[-1] * 2.0**-23
    assert got.dtype == x.dtype
    smallest = torch.finfo(got.dtype).tiny * torch.finfo(got.dtype).eps
    assert bool(((got.double() - want).abs() <= slack * size + smallest).all())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )
