"""What a call costs beside the arithmetic: a layer so small that there is hardly any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import nybble as nb
from compare import peer_bitsandbytes
from compare.cell import Run, entry
from compare.weights import BF16, Unavailable

_FEATURES = 64
_CALLS = 200


def overhead(run: Run) -> None:
    """64x64 at M = 1 in bfloat16, 200 calls at a time."""
    torch.manual_seed(0)
    dense = torch.nn.Linear(_FEATURES, _FEATURES, bias=False, dtype=BF16)
    x = torch.randn(1, _FEATURES, dtype=BF16)
    q = nb.quantize(dense.weight, "nf4")
    layer = nb.nn.Linear4bit.from_qtensor(q).eval()
    ways: list[tuple[str, str, Callable[[], Any]]] = [
        ("empty op", "torch", _empty_op(x)),
        ("F.linear bf16", "torch", lambda: torch.nn.functional.linear(x, dense.weight)),
        ("nn.Linear.forward bf16", "torch", lambda: dense(x)),
        ("nb.linear nf4", "nybble", lambda: nb.linear(x, q)),
        ("Linear4bit.forward nf4", "nybble", lambda: layer(x)),
    ]
    try:
        peer = peer_bitsandbytes.layer4(dense.weight.float(), "nf4", BF16).eval()
        ways.append(("Linear4bit.forward nf4", "bitsandbytes", lambda: peer(x)))
    except Unavailable as reason:
        run.notes.append(str(reason))
    entries = [
        entry(name, package, _repeated(way), dtype="bf16", per_call=_CALLS)
        for name, package, way in ways
    ]
    shape = f"{_FEATURES}x{_FEATURES}"
    run.measure("overhead", entries, shape=shape, m=1, elements=_FEATURES**2)


def _repeated(way: Callable[[], Any]) -> Callable[[int], None]:
    def call(_: int) -> None:
        for _ in range(_CALLS):
            way()

    return call


def _empty_op(x: torch.Tensor) -> Callable[[], Any]:
    """A custom op in Python that returns what it already has."""
    result = x.clone()
    library = torch.library.Library("compare", "DEF")
    library.define("nothing(Tensor x) -> Tensor")
    library.impl("nothing", lambda _: result, "CPU")
    return lambda _library=library: torch.ops.compare.nothing(x)
