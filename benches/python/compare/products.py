"""Products with 4-bit weights, ours and those of every peer that is installed."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator

import torch

from compare import ours
from compare.cell import Entry, Run, entry
from compare.machine import dense
from compare.weights import BF16, Unavailable, Weight, relative_error, short

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
ROWS = (1, 4, 16, 64, 512)

#: Module and function for each peer; a peer that is not installed is left out with a note.
_PEERS = (
    ("peer_torch", "dense"),
    ("peer_torch", "int4"),
    ("peer_bitsandbytes", "four_bit"),
    ("peer_ggml", "weights"),
    ("peer_onnxruntime", "four_bit"),
    ("peer_openvino", "four_bit"),
)

#: A product whose relative error is larger is not one of these weights.
_WRONG = 0.2


def products(run: Run) -> None:
    """M = 1 to 512 for every shape; one thread: the first shape at M = 1."""
    single = run.threads == 1
    shapes = SHAPES[:1] if run.quick or single else SHAPES
    rows: tuple[int, ...] = (1,) if single else ROWS
    if not ours.takes(ours.nb.linear, "compute"):
        run.notes.append('nb.linear has no argument `compute`: compute="int8" is not measured')
    for number, shape in enumerate(shapes):
        torch.manual_seed(0)
        weight = torch.randn(*shape) * 0.02
        weights = [*ours.four_bit(weight), *_peers(run, weight, first=number == 0)]
        for candidate in weights:
            _check(run, candidate, weight)
        for m in rows:
            _cell(run, weights, shape, m, first=number == 0)
        del weights
        gc.collect()


def _peers(run: Run, weight: torch.Tensor, *, first: bool) -> Iterator[Weight]:
    """Those that are installed; for other shapes than the first not all of their variants."""
    for module, function in _PEERS:
        make = getattr(importlib.import_module(f"compare.{module}"), function)
        try:
            if first:
                yield from make(weight)
            elif module == "peer_bitsandbytes":
                yield from make(weight, ("nf4",))
            elif module == "peer_ggml":
                yield from make(weight, ("q4_0", "q4_K"))
            elif module == "peer_onnxruntime":
                yield from make(weight, (128,))
            elif function == "dense":
                yield from make(weight)
        except Unavailable as reason:
            if first:
                run.notes.append(str(reason))


def _check(run: Run, weight: Weight, dense: torch.Tensor) -> None:
    if weight.repeated:
        return
    error = relative_error(weight, dense, weight.dtypes[0])
    if not error < _WRONG:
        run.notes.append(f"{weight.name}: products are off by {error:.2f}")


def _cell(run: Run, weights: list[Weight], shape: tuple[int, int], m: int, *, first: bool) -> None:
    entries: list[Entry] = []
    for weight in weights:
        for dtype in weight.dtypes if m <= weight.limit else ():
            # Formats differ in their table only: large products are measured with nf4.
            ours_but_nf4 = weight.package == "nybble" and not weight.name.startswith("nf4")
            if (m > 1 and ours_but_nf4 and (dtype != BF16 or not first)) or (
                m >= 64 and (ours_but_nf4 or "nested" in weight.name)
            ):
                continue
            if weight.package == "bitsandbytes" and dtype != BF16 and m > 1:
                continue
            x = torch.randn(m, shape[1]).to(dtype)
            entries.append(
                entry(
                    weight.name,
                    weight.package,
                    weight.bind(x),
                    dtype=short(dtype),
                    nbytes=weight.nbytes,
                    warm=weight.copies if m <= 16 else 2,
                    per_call=weight.per_call,
                )
            )
    beside = [run.limits.read] if m <= 4 else []
    if m >= 16:
        t32, t16 = dense()
        beside = [t16, t32] if m == 512 else [t16]
    run.measure(
        "products",
        entries,
        beside=beside,
        shape="x".join(map(str, shape)),
        m=m,
        elements=shape[0] * shape[1],
    )
