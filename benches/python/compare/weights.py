"""What a quantized weight of any library looks like to a section."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from compare.machine import BEYOND_CACHE

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Unavailable(Exception):  # noqa: N818 (not an error: a peer is not installed)
    """A peer cannot take part, and why."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight in one library's form, as often as it takes to be out of the cache.

    Attributes:
        name: In tables.
        package: Library; `nybble` for our own.
        dtypes: Of the activations that it takes.
        nbytes: Of one copy, with its scales.
        copies: Number of copies.
        bind: Takes activations [M, K], returns a call that multiplies by copy `i % copies`.
        per_call: Products that one such call computes.
        activations: What the library makes of the activations, where it is not their dtype.
        limit: Largest M that is worth measuring.
        repeated: Whether its bytes repeat a part of the weight, so that products differ.
    """

    name: str
    package: str
    dtypes: Sequence[torch.dtype]
    nbytes: int
    copies: int
    bind: Callable[[torch.Tensor], Callable[[int], Any]]
    per_call: int = 1
    activations: str = ""
    limit: int = 1 << 30
    repeated: bool = False


def copies_of(nbytes: int) -> int:
    """How many copies of so many bytes do not fit into a cache."""
    return max(1, math.ceil(BEYOND_CACHE / nbytes))


#: Makes the weights of one library from a dense float32 weight [N, K].
Maker = Callable[[torch.Tensor], Iterator[Weight]]


def relative_error(weight: Weight, dense: torch.Tensor, dtype: torch.dtype) -> float:
    """How far a product is from the dense one: what is timed must also be right."""
    x = torch.randn(2, dense.shape[1]).to(dtype)
    got = torch.as_tensor(weight.bind(x)(0)).float().reshape(2, -1)
    want = x.float() @ dense.T
    return float((got - want).norm() / want.norm())


def short(dtype: torch.dtype) -> str:
    """`bf16`, `fp16` or `fp32`."""
    return {F32: "fp32", F16: "fp16", BF16: "bf16"}[dtype]
