"""nybble's weights, in every variant that the installed version offers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

import nybble as nb
from compare.weights import BF16, F16, F32, Weight, copies_of

FORMATS = ("nf4", "fp4", "int4", "mxfp4")


def takes(function: Callable[..., Any], argument: str) -> bool:
    """Whether this version has the argument."""
    return argument in inspect.signature(function).parameters


def copied(q: nb.QTensor, count: int | None = None) -> list[nb.QTensor]:
    """Copies of a quantized tensor, together larger than a cache."""
    count = count or copies_of(nbytes(q))
    fresh = [replace(q, packed=q.packed.clone(), absmax=q.absmax.clone()) for _ in range(count - 1)]
    return [q, *fresh]


def nbytes(q: nb.QTensor) -> int:
    """Bytes that a product reads of it."""
    return sum(part.numel() * part.element_size() for part in q.parts if part is not None)


def bound(qs: list[nb.QTensor], **options: Any) -> Callable[[torch.Tensor], Callable[[int], Any]]:
    """`nb.linear` over the copies."""

    def bind(x: torch.Tensor) -> Callable[[int], Any]:
        return lambda i: nb.linear(x, qs[i % len(qs)], **options)

    return bind


def four_bit(dense: torch.Tensor, formats: tuple[str, ...] = FORMATS) -> Iterator[Weight]:
    """Every 4-bit format, plain and nested; nf4 also with int8 activations."""
    for format in formats:
        row = next(row for row in nb.formats() if row["name"] == format)
        for nested in (False, True) if row["nestable"] else (False,):
            q = nb.quantize(dense, format, nested=nested)
            qs = copied(q)
            yield Weight(
                name=f"{format} nested" if nested else format,
                package="nybble",
                dtypes=(BF16, F16, F32),
                nbytes=nbytes(q),
                copies=len(qs),
                bind=bound(qs),
            )
            if format == "nf4" and not nested and takes(nb.linear, "compute"):
                yield Weight(
                    name="nf4 compute=int8",
                    package="nybble",
                    dtypes=(BF16,),
                    nbytes=nbytes(q),
                    copies=len(qs),
                    bind=bound(qs, compute="int8"),
                    activations="int8",
                )


def eight_bit(dense: torch.Tensor, threshold: float | None) -> Weight:
    """`Linear8bit` with a threshold of LLM.int8()."""
    q = nb.quantize(dense, "int8")
    layers = []
    for copy in copied(q):
        layer = nb.nn.Linear8bit.from_qtensor(copy).eval()
        layer.threshold = threshold
        layers.append(layer)

    def bind(x: torch.Tensor) -> Callable[[int], Any]:
        return lambda i: layers[i % len(layers)](x)

    return Weight(
        name=f"Linear8bit threshold {threshold:g}" if threshold is not None else "Linear8bit",
        package="nybble",
        dtypes=(BF16, F32),
        nbytes=nbytes(q),
        copies=len(layers),
        bind=bind,
        activations="int8",
    )
