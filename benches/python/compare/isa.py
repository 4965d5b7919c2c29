"""The few products by which instruction sets are compared; runs once for each of them."""

from __future__ import annotations

import torch

from compare import ours
from compare.cell import Run, entry
from compare.machine import dense
from compare.weights import BF16, F32, short

_SHAPE = (4096, 4096)


def isa(run: Run) -> None:
    """nf4 at M = 1 and 512, beside the limits that the other process measures too."""
    torch.manual_seed(0)
    (weight,) = (
        weight
        for weight in ours.four_bit(torch.randn(*_SHAPE) * 0.02, ("nf4",))
        if weight.name == "nf4"
    )
    for m in (1, 512):
        entries = [
            entry(
                weight.name,
                weight.package,
                weight.bind(torch.randn(m, _SHAPE[1]).to(dtype)),
                dtype=short(dtype),
                nbytes=weight.nbytes,
                warm=weight.copies if m == 1 else 2,
            )
            for dtype in (BF16, F32)
        ]
        run.measure(
            "isa",
            entries,
            beside=[run.limits.read] if m == 1 else dense(),
            shape="x".join(map(str, _SHAPE)),
            m=m,
            elements=_SHAPE[0] * _SHAPE[1],
        )
