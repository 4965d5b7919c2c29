"""The product when a gradient flows, and the gradient of the activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import nybble as nb
from compare import ours, peer_bitsandbytes
from compare.cell import Run, entry
from compare.machine import dense
from compare.weights import BF16, F32, Unavailable, short

_SHAPE = (4096, 4096)


def gradients(run: Run) -> None:
    """nf4 at M = 1, 16 and 512: inference, training forward, and grad of x."""
    torch.manual_seed(0)
    weight = torch.randn(*_SHAPE) * 0.02
    qs = ours.copied(nb.quantize(weight, "nf4"))
    nbytes = ours.nbytes(qs[0])
    try:
        peers = [peer_bitsandbytes.layer4(weight, "nf4", BF16).train() for _ in qs]
    except Unavailable as reason:
        run.notes.append(str(reason))
        peers = []
    run.notes.append("gradients: times only; whether a weight is materialised is not measured")
    for m in (1, 16, 512):
        entries = []
        for dtype in (BF16, F32):
            x = torch.randn(m, _SHAPE[1]).to(dtype)
            how: dict[str, Any] = {"dtype": short(dtype), "nbytes": nbytes}
            ways: list[tuple[str, str, Callable[[torch.Tensor, int], torch.Tensor]]]
            ways = [("nf4", "nybble", lambda x, i: nb.linear(x, qs[i % len(qs)]))]
            if peers and dtype == BF16:
                ways.append(("nf4", "bitsandbytes", lambda x, i: peers[i % len(peers)](x)))
            if dtype == BF16 or m == 512:
                entries.append(entry("inference", "nybble", _inference(ways[0][2], x), **how))
            for _, package, way in ways:
                entries.append(entry("training forward", package, _forward(way, x), **how))
                entries.append(entry("grad of x", package, _backward(way, x, len(qs)), **how))
        run.measure(
            "gradients",
            entries,
            beside=[run.limits.read] if m == 1 else reversed(dense()),
            shape="x".join(map(str, _SHAPE)),
            m=m,
            elements=_SHAPE[0] * _SHAPE[1],
        )


_Way = Callable[[torch.Tensor, int], torch.Tensor]


def _inference(way: _Way, x: torch.Tensor) -> Callable[[int], Any]:
    return lambda i: way(x, i)


def _forward(way: _Way, x: torch.Tensor) -> Callable[[int], Any]:
    leaf = x.clone().requires_grad_()

    def call(i: int) -> Any:
        with torch.enable_grad():
            return way(leaf, i)

    return call


def _backward(way: _Way, x: torch.Tensor, copies: int) -> Callable[[int], Any]:
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        made = [way(leaf, i) for i in range(copies)]
    grad = torch.randn_like(made[0])

    def call(i: int) -> Any:
        return torch.autograd.grad(made[i % copies], leaf, grad, retain_graph=True)

    return call
