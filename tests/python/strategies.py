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


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )
