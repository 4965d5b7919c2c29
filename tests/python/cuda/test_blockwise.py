"""Quantization and dequantization on the emulated GPU have the bits of the CPU backend."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from emulated import CODES, NAMES, at, poisoned, scales_of, values_of
from encoder import encoder, pivots_and_order
from hypothesis import HealthCheck, given, settings
from params import (
    STRUCTS,
    Dequantize4,
    Dequantize8,
    Emulator,
    Mean,
    NonFinite,
    Quantize4,
    Quantize8,
    pieces,
)

import nybble as nb
from strategies import FOUR_BIT, SPEC, dtypes, for_format, kinds, same_bits, seeds, tensor

FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
NOWHERE = 2**64 - 1
lengths = st.one_of(st.integers(1, 700), st.sampled_from([4096, 4097, 9000, 16384 + 31]))
four_bit = st.sampled_from(FOUR_BIT).flatmap(
    lambda name: st.tuples(
        st.just(name),
        st.sampled_from(SPEC[name]["blocksizes"]),
        st.booleans() if SPEC[name]["nestable"] else st.just(False),
    )
)


def quantize4(
    emulator: Emulator, x: torch.Tensor, format: str, blocksize: int, *, zero: bool = False
) -> tuple[torch.Tensor, torch.Tensor, int]:
    n = x.numel()
    packed = poisoned((n + 1) // 2, torch.uint8)
    e8m0 = format == "mxfp4"
    scales = poisoned(-(-n // blocksize), torch.uint8 if e8m0 else torch.float32)
    first = torch.tensor([-1])
    params = Quantize4(
        x=at(x), packed=at(packed), scales=at(scales), n=n,
        log2_blocksize=int(math.log2(blocksize)),
        scale=int(e8m0), nonfinite=NonFinite(first=at(first), zero=zero), encoder=encoder(format),
    )  # fmt: skip
    emulator.launch(f"quantize4_{NAMES[x.dtype]}", params, pieces(n, max(1024, 8 * blocksize)))
    return packed, scales, int(first) % 2**64


def quantize8(
    emulator: Emulator,
    x: torch.Tensor,
    format: str,
    blocksize: int,
    subtract: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    n = x.numel()
    pivots, order = pivots_and_order(format)
    codes = poisoned(n, torch.uint8)
    absmax = poisoned(-(-n // blocksize), torch.float32)
    orders = torch.tensor(order, dtype=torch.uint8)
    params = Quantize8(
        x=at(x), subtract=at(subtract), pivots=at(pivots), order=at(orders), codes=at(codes),
        absmax=at(absmax), n=n, log2_blocksize=int(math.log2(blocksize)),
    )  # fmt: skip
    emulator.launch(f"quantize8_{NAMES[x.dtype]}", params, pieces(n, 8 * blocksize))
    return codes, absmax


def dequantize4(
    emulator: Emulator, q: nb.QTensor, dtype: torch.dtype, first: int, n: int
) -> torch.Tensor:
    out = poisoned(n, dtype)
    scales, kept = scales_of(q)
    params = Dequantize4(packed=at(q.packed), out=at(out), first=first, n=n, scales=scales)
    params.values[:] = values_of(q.format)
    emulator.launch(f"dequantize4_{NAMES[dtype]}", params, pieces(n, 8192, 2))
    del kept
    return out


@FIXTURE
@given(settings_=four_bit, n=lengths, dtype=dtypes, seed=seeds, kind=kinds)
def test_quantize4_has_the_bytes_of_the_cpu(
    emulator: Emulator, settings_: Any, n: int, dtype: torch.dtype, seed: int, kind: str
) -> None:
    format, blocksize, _ = settings_
    x = tensor((n,), dtype, seed, kind)
    want = nb.quantize(x, format, blocksize=blocksize)
    packed, scales, first = quantize4(emulator, x, format, blocksize)
    assert same_bits(packed, want.packed)
    assert same_bits(scales, want.absmax)
    assert first == NOWHERE


@pytest.mark.parametrize("format", FOUR_BIT)
def test_values_at_and_beside_every_pivot_are_encoded_like_on_the_cpu(
    loaded: Emulator, format: str
) -> None:
    pivots = pivots_and_order(format)[0][:15]
    infinity = torch.full_like(pivots, math.inf)
    near = torch.stack((pivots, pivots.nextafter(infinity), pivots.nextafter(-infinity)))
    # The largest value comes first, so that the scale is 1.
    largest = torch.tensor([max(values_of(format)), 0.0])
    x = torch.cat((largest, near[0], largest[1:], torch.zeros(14)))
    blocks = []
    for row in near:
        blocks.append(torch.cat((largest, row, torch.zeros(15))))
        blocks.append(torch.cat((largest, -row, torch.zeros(15))))
    x = torch.cat(blocks)
    want = nb.quantize(x, format, blocksize=32)
    packed, scales, _ = quantize4(loaded, x, format, 32)
    assert same_bits(packed, want.packed)
    assert same_bits(scales, want.absmax)


@pytest.mark.parametrize("format", FOUR_BIT)
@pytest.mark.parametrize("scale", [1e-45, 1e-41, 3e-39, 1e38])
def test_the_smallest_and_largest_numbers_are_encoded_like_on_the_cpu(
    loaded: Emulator, format: str, scale: float
) -> None:
    x = (
        torch.randn(320, generator=torch.Generator().manual_seed(3)).clamp(-3, 3).double() * scale
    ).float()
    want = nb.quantize(x, format, blocksize=32)
    packed, scales, _ = quantize4(loaded, x, format, 32)
    assert same_bits(packed, want.packed)
    assert same_bits(scales, want.absmax)


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("blocksize", [32, 64, 1024])
def test_the_first_value_that_is_not_finite_is_named_or_stored_as_zero(
    emulator: Emulator, dtype: torch.dtype, bad: float, blocksize: int
) -> None:
    x = tensor((5003,), dtype, 5)
    x[[4711, 1300, 5002]] = bad
    assert quantize4(emulator, x, "nf4", blocksize)[2] == 1300
    packed, scales, first = quantize4(emulator, x, "nf4", blocksize, zero=True)
    want = nb.quantize(x, "nf4", blocksize=blocksize, nonfinite="zero")
    assert first == 1300
    assert same_bits(packed, want.packed)
    assert same_bits(scales, want.absmax)


@FIXTURE
@given(settings_=four_bit, n=lengths, dtype=dtypes, seed=seeds, kind=kinds, data=st.data())
def test_dequantize4_has_the_bits_of_the_cpu_from_any_start(
    emulator: Emulator, settings_: Any, n: int, dtype: torch.dtype, seed: int, kind: str, data: Any
) -> None:
    format, blocksize, nested = settings_
    x = tensor((n,), torch.float32, seed, kind)
    q = nb.quantize(x, format, blocksize=blocksize, nested=nested)
    first = 32 * data.draw(st.integers(0, (n - 1) // 32), label="first / 32")
    count = data.draw(st.integers(1, n - first), label="n")
    want = q.dequantize(dtype)[first : first + count]
    assert same_bits(dequantize4(emulator, q, dtype, first, count), want)


@pytest.mark.parametrize("nested", [False, True])
def test_positions_beyond_32_bits_are_found(loaded: Emulator, nested: bool) -> None:
    # The tensor's start lies so far before its last part that only 64-bit positions reach it.
    q = nb.quantize(tensor((4096,), torch.float32, 6), "nf4", blocksize=64, nested=nested)
    first = 2**36
    scales, kept = scales_of(q)
    if nested:
        scales.codes -= first // 64
        scales.nested_absmax -= first // 64 // 256 * 4
    else:
        scales.absmax -= first // 64 * 4
    out = poisoned(4096, torch.float32)
    packed = q.packed.data_ptr() - first // 2
    params = Dequantize4(packed=packed, out=at(out), first=first, n=4096, scales=scales)
    params.values[:] = values_of("nf4")
    loaded.launch("dequantize4_f32", params, 1)
    del kept
    assert same_bits(out, q.dequantize(torch.float32))


@FIXTURE
@given(
    format=st.sampled_from(["dynamic8", "dynamic8u"]),
    blocksize=st.sampled_from(SPEC["dynamic8"]["blocksizes"]),
    n=lengths, dtype=dtypes, seed=seeds, kind=kinds,
)  # fmt: skip
def test_eight_bit_codes_have_the_bits_of_the_cpu_both_ways(
    emulator: Emulator,
    format: str,
    blocksize: int,
    n: int,
    dtype: torch.dtype,
    seed: int,
    kind: str,
) -> None:
    x = for_format(tensor((n,), dtype, seed, kind), format)
    want = nb.quantize(x, format, blocksize=blocksize)
    codes, absmax = quantize8(emulator, x, format, blocksize)
    assert same_bits(codes, want.packed)
    assert same_bits(absmax, want.absmax)
    out = poisoned(n, dtype)
    values = torch.tensor(values_of(format), dtype=torch.float32)
    params = Dequantize8(
        codes=at(codes), values=at(values), absmax=at(absmax), out=at(out), n=n,
        log2_blocksize=int(math.log2(blocksize)),
    )  # fmt: skip
    emulator.launch(f"dequantize8_{NAMES[dtype]}", params, pieces(n, 1024))
    assert same_bits(out, want.dequantize(dtype))


SUMS = [1, 3, 7, 8, 9, 31, 32, 33, 511, 512, 513, 5000, 8191, 8192, 16384 + 5, 70001, 300000]


def mean(emulator: Emulator, x: torch.Tensor) -> torch.Tensor:
    out = poisoned((), torch.float32)
    emulator.launch("mean_f32", Mean(x=at(x), out=at(out), n=x.numel()), 1, 1024)
    return out


@pytest.mark.parametrize("n", SUMS)
def test_the_mean_has_the_bits_of_torch(loaded: Emulator, n: int) -> None:
    x = torch.rand(n, generator=torch.Generator().manual_seed(n)) * 0.1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert same_bits(mean(loaded, x), x.mean())
    finally:
        torch.set_num_threads(threads)


def test_the_mean_of_many_scales_takes_wider_levels(loaded: Emulator) -> None:
    # 2^20 + 3 * 32 rows: levels of 32 rows instead of 16.
    n = (2**20 + 3) * 32 + 13
    x = torch.rand(n, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert same_bits(mean(loaded, x), x.mean())
    finally:
        torch.set_num_threads(threads)


@FIXTURE
@given(
    format=st.sampled_from([name for name in FOUR_BIT if SPEC[name]["nestable"]]),
    n=st.integers(1, 40000), dtype=dtypes, seed=seeds, kind=kinds,
)  # fmt: skip
def test_nested_scales_made_of_three_kernels_are_those_of_the_cpu(
    loaded: Emulator, format: str, n: int, dtype: torch.dtype, seed: int, kind: str
) -> None:
    x = tensor((n,), dtype, seed, kind)
    want = nb.quantize(x, format, blocksize=64, nested=True)
    packed, scales, _ = quantize4(loaded, x, format, 64)
    offset = mean(loaded, scales)
    codes, absmax = quantize8(loaded, scales, "dynamic8", 256, subtract=offset)
    assert want.nested_absmax is not None
    assert want.nested_offset is not None
    assert same_bits(packed, want.packed)
    assert same_bits(offset, want.nested_offset)
    assert same_bits(codes, want.absmax)
    assert same_bits(absmax, want.nested_absmax)


def test_structs_are_as_long_as_the_kernels_think(loaded: Emulator) -> None:
    for struct in STRUCTS:
        assert ctypes.sizeof(struct) == loaded.sizeof(struct.__name__), struct
    assert CODES.keys() == NAMES.keys()
