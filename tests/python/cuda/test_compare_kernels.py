"""Statistics on the emulated GPU have the bits of the CPU's sums."""

from __future__ import annotations

import ctypes
import math

import hypothesis.strategies as st
import pytest
import torch
from emulated import NAMES, at, scales_of
from hypothesis import HealthCheck, given, settings
from params import Compare, Emulator, RunStats, Scales

import nybble as nb
from strategies import dtypes, for_format, kinds, seeds, settings_of, tensor

FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def compare(
    emulator: Emulator, x: torch.Tensor, q: nb.QTensor, run: int, grid: int = 2
) -> list[RunStats]:
    decoded = q.dequantize(torch.float32)
    block = q.blocksize or x.shape[-1]
    out = (RunStats * -(-x.numel() // run))()
    ctypes.memset(out, 0xFF, ctypes.sizeof(out))
    scales, kept = (Scales(absmax=at(q.absmax)), []) if q.format == "int8" else scales_of(q)
    params = Compare(
        x=at(x), decoded=at(decoded), out=ctypes.addressof(out), n=x.numel(), run=run, block=block,
        scales=scales, outlier_factor=4.0,
    )  # fmt: skip
    emulator.launch(f"compare_{NAMES[x.dtype]}", params, grid)
    del kept
    return list(out)


@FIXTURE
@given(
    how=settings_of(), shape=st.tuples(st.integers(1, 40), st.integers(1, 300)), dtype=dtypes,
    seed=seeds, kind=kinds,
)  # fmt: skip
def test_figures_are_those_of_the_cpu(
    emulator: Emulator, how: dict, shape: tuple[int, int], dtype: torch.dtype, seed: int, kind: str
) -> None:
    x = for_format(tensor(shape, dtype, seed, kind), how["format"])
    q = nb.quantize(x, **how)
    block = q.blocksize or shape[1]
    # One run, as on the CPU, whose sums these are.
    (one,) = compare(emulator, x, q, -(-x.numel() // block) * block)
    want = nb.error(x, q)
    squares, decoded, products, errors = one.sums
    assert errors / x.numel() == want.mse
    assert one.outliers == want.outliers
    assert one.max_abs == want.max_abs
    assert (one.absmax_min, one.absmax_max) == (want.absmax_min, want.absmax_max)
    if errors > 0 and squares > 0:
        assert math.isclose(-10 * math.log10(errors / squares), want.sqnr_db, rel_tol=1e-14)
    if errors > 0 and squares * decoded > 0:
        assert math.isclose(products / math.sqrt(squares * decoded), want.cosine, rel_tol=1e-14)


def test_runs_add_up_to_the_whole(loaded: Emulator) -> None:
    x = tensor((50, 100), torch.bfloat16, 3, "heavy")
    q = nb.quantize(x, "nf4", blocksize=64)
    whole, parts = compare(loaded, x, q, 5056), compare(loaded, x, q, 640, grid=3)
    assert len(parts) == 8
    for i in range(4):
        total = sum(part.sums[i] for part in parts)
        assert math.isclose(total, whole[0].sums[i], rel_tol=1e-13)
    assert sum(part.outliers for part in parts) == whole[0].outliers > 0
    assert max(part.max_abs for part in parts) == whole[0].max_abs
    assert min(part.absmax_min for part in parts) == whole[0].absmax_min


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_figures_too(loaded: Emulator, bad: float) -> None:
    x = tensor((4, 64), torch.float32, 5)
    q = nb.quantize(x, "nf4")
    x[2, 17] = bad
    (one,) = compare(loaded, x, q, 256)
    want = nb.error(x, q)
    assert one.max_abs == want.max_abs
    assert one.outliers == want.outliers
    assert (one.absmax_min, one.absmax_max) == (want.absmax_min, want.absmax_max)
    assert not math.isfinite(one.sums[3])
    assert not math.isfinite(want.mse)
