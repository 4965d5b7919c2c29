"""Positions beyond 32 bits: the end of a tensor that is far too large to be there.

Only the last blocks of a launch run, and pointers are moved back so far that what those blocks
touch is memory of the test. Results are those of the same kernel on that part alone, bit for bit.
`mean_f32` and `int8_outliers` are one block that reads everything; they are not tested here.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from emulated import at, poisoned, scales_of, values_of
from encoder import encoder, pivots_and_order
from params import (
    Compare,
    Dequantize4,
    Dequantize8,
    Emulator,
    Int8Dequantize,
    Int8Flags,
    Int8Linear,
    Int8Rows,
    IntegerLinear4,
    IntegerRows,
    Linear4,
    Linear8,
    NonFinite,
    Quantize4,
    Quantize8,
    RunStats,
)

import nybble as nb
from nybble import _core
from strategies import tensor

F16 = torch.float16
FAR = 2**36  # elements before those that are there
MOST_Y = 65_535
FORMS = [("nf4", 64, False), ("nf4", 64, True), ("mxfp4", 32, False)]


@dataclass
class Case:
    """A launch that is small, and what makes it the end of a large one.

    Attributes:
        out: What the kernel writes.
        before: Bytes by which each pointer is moved back; fields of `scales` have a dot.
        larger: By how much each size grows.
        grids: The grid of the small launch, and of the large one.
        first: The first block along x that runs; None for the last.
    """

    kernel: str
    params: Any
    out: list[Any]
    before: dict[str, int]
    larger: dict[str, int]
    grids: tuple[tuple[int, int], tuple[int, int]]
    first: int | None = None
    kept: list[Any] = field(default_factory=list)


def check(emulator: Emulator, case: Case) -> None:
    """Whether the large launch writes what the small one wrote."""

    def content() -> list[bytes]:
        return [
            ctypes.string_at(out.data_ptr(), out.nbytes)
            if isinstance(out, torch.Tensor)
            else bytes(out)
            for out in case.out
        ]

    unwritten = content()
    emulator.launch(case.kernel, case.params, case.grids[0][0], grid_y=case.grids[0][1])
    want = content()
    assert all(map(bytes.__ne__, want, unwritten))
    for out, before in zip(case.out, unwritten, strict=True):
        address = out.data_ptr() if isinstance(out, torch.Tensor) else ctypes.addressof(out)
        ctypes.memmove(address, before, len(before))
    for name, size in case.before.items():
        *inner, last = name.split(".")
        holder = getattr(case.params, inner[0]) if inner else case.params
        address = getattr(holder, last)
        assert address is not None
        setattr(holder, last, address - size)
    for name, more in case.larger.items():
        setattr(case.params, name, getattr(case.params, name) + more)
    emulator.launch_last(case.kernel, case.params, *case.grids[1], first=case.first)
    assert content() == want


def scales_before(q: nb.QTensor, elements: int) -> dict[str, int]:
    """How far the pointers of scales are moved back."""
    blocks = elements // q.blocksize
    if q.nested:
        return {"scales.codes": blocks, "scales.nested_absmax": blocks // 256 * 4}
    return {"scales.codes": blocks} if q.format == "mxfp4" else {"scales.absmax": 4 * blocks}


@pytest.mark.parametrize(("format", "blocksize", "nested"), FORMS)
def test_dequantize4(loaded: Emulator, format: str, blocksize: int, nested: bool) -> None:
    q = nb.quantize(tensor((5000,), torch.float32, 1), format, blocksize=blocksize, nested=nested)
    out = poisoned(5000, F16)
    scales, kept = scales_of(q)
    params = Dequantize4(packed=at(q.packed), out=at(out), n=5000, scales=scales)
    params.values[:] = values_of(format)
    before = {"packed": FAR // 2, "out": 2 * FAR, **scales_before(q, FAR)}
    grids = ((1, 1), (FAR // 8192 + 1, 1))
    check(
        loaded, Case("dequantize4_f16", params, [out], before, {"n": FAR}, grids, None, [q, kept])
    )


@pytest.mark.parametrize(("format", "blocksize"), [("nf4", 64), ("mxfp4", 32)])
def test_quantize4(loaded: Emulator, format: str, blocksize: int) -> None:
    x = tensor((2001,), F16, 2)
    e8m0 = format == "mxfp4"
    packed = poisoned(1001, torch.uint8)
    scales = poisoned(-(-2001 // blocksize), torch.uint8 if e8m0 else torch.float32)
    params = Quantize4(
        x=at(x), packed=at(packed), scales=at(scales), n=2001, scale=int(e8m0),
        log2_blocksize=blocksize.bit_length() - 1, encoder=encoder(format),
    )  # fmt: skip
    before = {
        "x": 2 * FAR,
        "packed": FAR // 2,
        "scales": scales.element_size() * (FAR // blocksize),
    }
    grids = ((1, 1), (FAR // 2048 + 1, 1))
    check(loaded, Case("quantize4_f16", params, [packed, scales], before, {"n": FAR}, grids))


def test_a_value_that_is_not_finite_has_its_position(loaded: Emulator) -> None:
    x = tensor((2048,), F16, 2)
    x[77] = torch.inf
    packed, scales = poisoned(1024, torch.uint8), poisoned(32, torch.float32)
    first = torch.tensor([-1])
    params = Quantize4(
        x=at(x) - 2 * FAR, packed=at(packed) - FAR // 2, scales=at(scales) - FAR // 64 * 4,
        n=FAR + 2048, log2_blocksize=6, encoder=encoder("nf4"),
        nonfinite=NonFinite(first=at(first)),
    )  # fmt: skip
    loaded.launch_last("quantize4_f16", params, FAR // 2048 + 1)
    assert int(first) == FAR + 77


def test_eight_bits_both_ways(loaded: Emulator) -> None:
    x = tensor((2001,), F16, 2)
    pivots, order = pivots_and_order("dynamic8")
    orders = torch.tensor(order, dtype=torch.uint8)
    codes, absmax = poisoned(2001, torch.uint8), poisoned(32, torch.float32)
    params = Quantize8(
        x=at(x), pivots=at(pivots), order=at(orders), codes=at(codes), absmax=at(absmax), n=2001,
        log2_blocksize=6,
    )  # fmt: skip
    before = {"x": 2 * FAR, "codes": FAR, "absmax": FAR // 64 * 4}
    grids = ((1, 1), (FAR // 2048 + 1, 1))
    check(loaded, Case("quantize8_f16", params, [codes, absmax], before, {"n": FAR}, grids))
    out = poisoned(1000, F16)
    values = torch.tensor(values_of("dynamic8"), dtype=torch.float32)
    back = Dequantize8(
        codes=at(codes), values=at(values), absmax=at(absmax), out=at(out), n=1000,
        log2_blocksize=6,
    )  # fmt: skip
    before = {"codes": FAR, "absmax": FAR // 64 * 4, "out": 2 * FAR}
    grids = ((1, 1), (FAR // 1024 + 1, 1))
    check(loaded, Case("dequantize8_f16", back, [out], before, {"n": FAR}, grids))


def test_rows_of_int8(loaded: Emulator) -> None:
    rows, columns = FAR // 4096, 4096
    x = tensor((2, columns), F16, 3)
    codes, absmax = poisoned((2, columns), torch.int8), poisoned(2, torch.float32)
    params = Int8Rows(x=at(x), codes=at(codes), absmax=at(absmax), rows=2, columns=columns)
    before = {"x": 2 * FAR, "codes": FAR, "absmax": 4 * rows}
    case = Case(
        "int8_rows_f16", params, [codes, absmax], before, {"rows": rows}, ((2, 1), (rows + 2, 1)),
        rows,
    )  # fmt: skip
    check(loaded, case)
    out = poisoned((2, columns), F16)
    back = Int8Dequantize(codes=at(codes), absmax=at(absmax), out=at(out), rows=2, columns=columns)
    before = {"codes": FAR, "absmax": 4 * rows, "out": 2 * FAR}
    # Threads of the named grid have elements far apart; this one gives each of them one.
    grids = ((32, 1), (FAR // 256 + 32, 1))
    case = Case(
        "int8_dequantize_f16", back, [out], before, {"rows": rows}, grids, FAR // 256
    )  # fmt: skip
    check(loaded, case)


def test_columns_of_outliers(loaded: Emulator) -> None:
    rows, columns = 64 * (MOST_Y - 1), 2048
    x, flags = tensor((64, columns), F16, 3) * 50, torch.zeros(columns, dtype=torch.uint8)
    params = Int8Flags(x=at(x), flags=at(flags), rows=64, columns=columns, threshold=2.0)
    before = {"x": 2 * rows * columns}
    grids = ((8, 1), (8, MOST_Y))
    check(loaded, Case("int8_flags_f16", params, [flags], before, {"rows": rows}, grids, 0))


def linear4(m: int, n: int, k: int, how: tuple[str, int, bool], **more: int) -> Any:
    format, blocksize, nested = how
    q = nb.quantize(tensor((n, k), torch.float32, 4), format, blocksize=blocksize, nested=nested)
    x, bias, y = tensor((m, k), F16, 5), tensor((n,), F16, 6), poisoned((m, n), F16)
    scales, kept = scales_of(q)
    params = Linear4(
        x=at(x), packed=at(q.packed), bias=at(bias), y=at(y), m=m, n=n, k=k, scales=scales,
        bias_dtype=1, **more,
    )  # fmt: skip
    params.values[:] = values_of(format)
    return params, y, q, [q, x, bias, kept]


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize(
    ("kernel", "rows", "k"),
    [
        ("linear4_small8", 16, 1024),
        ("linear4_small16", 16, 1024),
        ("linear4_small32", 16, 1024),
        ("linear4_mid", 128, 1024),
        ("linear4_mid", 64, 1024),
        ("linear4_gemv", 8, 1024),
    ],
)
def test_a_weight_with_many_rows(
    loaded: Emulator, kernel: str, rows: int, k: int, how: tuple[str, int, bool]
) -> None:
    shape = {"rows": rows, "tokens": 32} if "mid" in kernel else {}
    params, y, q, kept = linear4(1, rows, k, how, **shape)
    more = FAR // k
    before = {"packed": FAR // 2, "bias": 2 * more, "y": 2 * more, **scales_before(q, FAR)}
    grids = ((1, 1), (more // rows + 1, 1))
    check(loaded, Case(f"{kernel}_f16", params, [y], before, {"n": more}, grids, None, kept))


@pytest.mark.parametrize(
    ("kernel", "each", "n", "k"), [("linear4_mid", 128, 1024, 1024), ("linear4_gemv", 4, 64, 32768)]
)
def test_many_rows_of_activations(loaded: Emulator, kernel: str, each: int, n: int, k: int) -> None:
    rows = 128 if "mid" in kernel else 8
    params, y, _, kept = linear4(each, n, k, FORMS[0], rows=rows, tokens=each)
    more = each * (MOST_Y - 1)
    assert more * k > 2**32
    before = {"x": 2 * more * k, "y": 2 * more * n}
    grids = ((n // rows, 1), (n // rows, MOST_Y))
    check(loaded, Case(f"{kernel}_f16", params, [y], before, {"m": more}, grids, 0, kept))


@pytest.mark.parametrize("format", ["int8", "dynamic8"])
@pytest.mark.parametrize("side", ["n", "m"])
def test_byte_codes(loaded: Emulator, format: str, side: str) -> None:
    m, n, k = (1, 8, 1024) if side == "n" else (4, 8, 32768)
    q = nb.quantize(tensor((n, k), torch.float32, 4), format)
    x, y = tensor((m, k), F16, 5), poisoned((m, n), F16)
    values = None if format == "int8" else torch.tensor(values_of(format), dtype=torch.float32)
    params = Linear8(
        x=at(x), codes=at(q.packed), values=at(values), absmax=at(q.absmax), y=at(y), m=m, n=n,
        k=k, log2_blocksize=6 if values is not None else 0,
    )  # fmt: skip
    assert values is None or q.blocksize == 64
    if side == "n":
        more = FAR // k
        scales = more if format == "int8" else FAR // 64
        before = {"codes": FAR, "absmax": 4 * scales, "y": 2 * more}
        grid = (more // 8 + 1, 1)
    else:
        more = 4 * (MOST_Y - 1)
        before = {"x": 2 * more * k, "y": 2 * more * n}
        grid = (1, MOST_Y)
    case = Case("linear8_gemv_f16", params, [y], before, {side: more}, ((1, 1), grid), None, [q, x])
    check(loaded, case)


@pytest.mark.parametrize("side", ["n", "m"])
def test_products_of_integers(loaded: Emulator, side: str) -> None:
    m, n, k, group = 8, 8, 16384, 256
    x = tensor((m, k), F16, 7)
    codes, factors = poisoned((m, k), torch.int8), poisoned((m, k // group), torch.float32)
    rows = IntegerRows(
        x=at(x), codes=at(codes), factors=at(factors), rows=m, columns=k, log2_group=8
    )
    more = FAR // k
    before = {"x": 2 * FAR, "codes": FAR, "factors": 4 * (FAR // group)}
    small = m * k // group // 8
    grids = ((small, 1), (small + FAR // group // 8, 1))
    first = FAR // group // 8
    case = Case(
        "integer_rows_f16", rows, [codes, factors], before, {"rows": more}, grids, first
    )  # fmt: skip
    check(loaded, case)
    if side == "n":
        m = 1
    q = nb.quantize(tensor((n, k), torch.float32, 4), "nf4")
    y = poisoned((m, n), F16)
    scales, kept = scales_of(q)
    integers, step = _core.integers("nf4")
    params = IntegerLinear4(
        codes=at(codes), factors=at(factors), packed=at(q.packed), y=at(y), m=m, n=n, k=k,
        scales=scales, step=step, log2_group=8,
    )  # fmt: skip
    params.integers[:] = integers
    if side == "n":
        before = {"packed": FAR // 2, "y": 2 * more, **scales_before(q, FAR)}
        grid = (more // 8 + 1, 1)
    else:
        more = 8 * (MOST_Y - 1)
        before = {"codes": more * k, "factors": 4 * (more * k // group), "y": 2 * more * n}
        grid = (1, MOST_Y)
    name = "integer_linear4_f16"
    check(loaded, Case(name, params, [y], before, {side: more}, ((1, 1), grid), None, [q, kept]))


@pytest.mark.parametrize("side", ["n", "m"])
def test_llm_int8(loaded: Emulator, side: str) -> None:
    m, n, k = (1, 8, 1024) if side == "n" else (8, 8, 16384)
    weight = nb.quantize(tensor((n, k), torch.float32, 1), "int8")
    codes = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    scales, y = torch.rand(m), poisoned((m, n), F16)
    params = Int8Linear(
        codes=at(codes), x_absmax=at(scales), weight=at(weight.packed), absmax=at(weight.absmax),
        y=at(y), m=m, n=n, k=k,
    )  # fmt: skip
    if side == "n":
        more = FAR // k
        before = {"weight": FAR, "absmax": 4 * more, "y": 2 * more}
        grid = (more // 8 + 1, 1)
    else:
        more = 8 * (MOST_Y - 1)
        before = {"codes": more * k, "x_absmax": 4 * more, "y": 2 * more * n}
        grid = (1, MOST_Y)
    name = "int8_linear_small_f16"
    check(loaded, Case(name, params, [y], before, {side: more}, ((1, 1), grid), None, [weight]))


def test_integer_sums_of_a_large_product(loaded: Emulator) -> None:
    m, n = 2, 4096
    sums = torch.randint(-(2**20), 2**20, (m, n), dtype=torch.int32)
    scales, absmax, y = torch.rand(m), torch.rand(n), poisoned((m, n), F16)
    params = Int8Linear(
        sums=at(sums), x_absmax=at(scales), absmax=at(absmax), y=at(y), m=m, n=n, k=64
    )
    more = FAR // n
    before = {"sums": 4 * FAR, "x_absmax": 4 * more, "y": 2 * FAR}
    grids = ((32, 1), (32 + FAR // 256, 1))
    check(loaded, Case("int8_finish_f16", params, [y], before, {"m": more}, grids, FAR // 256))


@pytest.mark.parametrize(("format", "blocksize", "nested"), FORMS)
def test_statistics(loaded: Emulator, format: str, blocksize: int, nested: bool) -> None:
    run = 1024
    x = tensor((3 * run - 5,), F16, 8)
    q = nb.quantize(x, format, blocksize=blocksize, nested=nested)
    decoded = q.dequantize(torch.float32)
    out = (RunStats * 3)()
    ctypes.memset(out, 0xFF, ctypes.sizeof(out))
    scales, kept = scales_of(q)
    params = Compare(
        x=at(x), decoded=at(decoded), out=ctypes.addressof(out), n=x.numel(), run=run,
        block=blocksize, scales=scales, outlier_factor=4.0,
    )  # fmt: skip
    before = {
        "x": 2 * FAR,
        "decoded": 4 * FAR,
        "out": FAR // run * ctypes.sizeof(RunStats),
        **scales_before(q, FAR),
    }
    grids = ((3, 1), (FAR // run + 3, 1))
    case = Case(
        "compare_f16", params, [out], before, {"n": FAR}, grids, FAR // run, [q, kept]
    )  # fmt: skip
    check(loaded, case)
