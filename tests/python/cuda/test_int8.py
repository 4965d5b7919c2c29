"""LLM.int8() on the emulated GPU: codes with the bits of the CPU, products within bounds."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from emulated import CODES, NAMES, at, poisoned
from hypothesis import HealthCheck, given, settings
from params import (
    Emulator,
    Int8Dequantize,
    Int8Flags,
    Int8Linear,
    Int8Outliers,
    Int8Rows,
    NonFinite,
    Outliers,
    pieces,
)

import nybble as nb
from nybble import reference
from strategies import dtypes, kinds, same_bits, seeds, tensor

FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def rows(
    emulator: Emulator, x: torch.Tensor, flags: torch.Tensor | None = None, zero: bool = False
) -> tuple[torch.Tensor, torch.Tensor, int]:
    codes, absmax = poisoned(x.shape, torch.int8), poisoned(x.shape[0], torch.float32)
    first = torch.tensor([-1])
    params = Int8Rows(
        x=at(x), flags=at(flags), codes=at(codes), absmax=at(absmax), rows=x.shape[0],
        columns=x.shape[1], nonfinite=NonFinite(first=at(first), zero=zero),
    )  # fmt: skip
    emulator.launch(f"int8_rows_{NAMES[x.dtype]}", params, pieces(x.shape[0], 1))
    return codes, absmax, int(first)


def outliers(
    emulator: Emulator, x: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m, k = x.shape
    flags = torch.zeros(k, dtype=torch.uint8)
    params = Int8Flags(x=at(x), flags=at(flags), rows=m, columns=k, threshold=threshold)
    emulator.launch(
        f"int8_flags_{NAMES[x.dtype]}", params, pieces(k, 256, 2), grid_y=pieces(m, 64, 2)
    )
    columns, count = poisoned(k, torch.int32), poisoned(1, torch.int32)
    listed = Int8Outliers(
        flags=at(flags), columns=k, outliers=Outliers(columns=at(columns), count=at(count))
    )
    emulator.launch("int8_outliers", listed, 1, 1024)
    return flags, columns, count


@FIXTURE
@given(m=st.integers(1, 5), k=st.integers(1, 600), dtype=dtypes, seed=seeds, kind=kinds)
def test_rows_have_the_codes_of_the_cpu_and_come_back(
    emulator: Emulator, m: int, k: int, dtype: torch.dtype, seed: int, kind: str
) -> None:
    x = tensor((m, k), dtype, seed, kind)
    want = nb.quantize(x, "int8")
    codes, absmax, first = rows(emulator, x)
    assert same_bits(codes, want.packed)
    assert same_bits(absmax, want.absmax)
    assert first == -1
    out = poisoned(x.shape, dtype)
    params = Int8Dequantize(codes=at(codes), absmax=at(absmax), out=at(out), rows=m, columns=k)
    emulator.launch(f"int8_dequantize_{NAMES[dtype]}", params, pieces(m * k, 1024))
    assert same_bits(out, want.dequantize(dtype))


def test_the_smallest_rows_keep_their_ratios(loaded: Emulator) -> None:
    x = torch.tensor([[4e-45, -4e-45, 2.8e-45, 0.0], [0.0, -0.0, 0.0, 0.0]])
    want = nb.quantize(x, "int8")
    codes, absmax, _ = rows(loaded, x)
    assert same_bits(codes, want.packed)
    assert same_bits(absmax, want.absmax)


def test_values_that_are_not_finite_are_named_or_stored_as_zero(loaded: Emulator) -> None:
    x = tensor((4, 300), torch.float16, 1)
    x[2, 17], x[3, 5] = math.inf, math.nan
    assert rows(loaded, x)[2] == 617
    codes, absmax, first = rows(loaded, x, zero=True)
    want = nb.quantize(x, "int8", nonfinite="zero")
    assert first == 617
    assert same_bits(codes, want.packed)
    assert same_bits(absmax, want.absmax)


@FIXTURE
@given(m=st.integers(1, 150), k=st.integers(1, 2500), dtype=dtypes, seed=seeds)
def test_columns_of_outliers_are_listed_in_order_and_left_out(
    loaded: Emulator, m: int, k: int, dtype: torch.dtype, seed: int
) -> None:
    x = tensor((m, k), dtype, seed) * 50
    flags, columns, count = outliers(loaded, x, 3.0)
    want = (x.float().abs() >= 3.0).any(dim=0)
    assert torch.equal(flags.bool(), want)
    assert columns[: int(count)].tolist() == want.nonzero().flatten().tolist()
    inliers = x.masked_fill(want, 0.0)
    codes, absmax, _ = rows(loaded, x[:4].contiguous(), flags)
    expected = nb.quantize(inliers[:4].contiguous(), "int8")
    assert same_bits(codes, expected.packed)
    assert same_bits(absmax, expected.absmax)


@FIXTURE
@given(
    m=st.integers(1, 20), n=st.integers(1, 30),
    k=st.one_of(st.integers(1, 200), st.sampled_from([512, 1040])), dtype=dtypes, seed=seeds,
    threshold=st.sampled_from([0.0, 2.5]), bias=st.sampled_from([None, *NAMES]),
    finish=st.booleans(),
)  # fmt: skip
def test_products_are_those_of_the_definition(
    emulator: Emulator, m: int, n: int, k: int, dtype: torch.dtype, seed: int, threshold: float,
    bias: torch.dtype | None, finish: bool,
) -> None:  # fmt: skip
    x = tensor((m, k), dtype, seed) * 50
    weight = nb.quantize(tensor((n, k), torch.float32, seed + 1), "int8")
    addend = None if bias is None else tensor((n,), bias, seed + 2)
    flags = columns = count = None
    if threshold:
        flags, columns, count = outliers(emulator, x, threshold)
    codes, x_absmax, _ = rows(emulator, x, flags)
    y = poisoned((m, n), dtype)
    params = Int8Linear(
        x_absmax=at(x_absmax), weight=at(weight.packed), absmax=at(weight.absmax), bias=at(addend),
        y=at(y), m=m, n=n, k=k, bias_dtype=0 if bias is None else CODES[bias],
        outliers=Outliers(columns=at(columns), count=at(count)), x=at(x) if threshold else None,
    )  # fmt: skip
    if finish:
        sums = (codes.double() @ weight.packed.double().T).to(torch.int32)
        params.sums = at(sums)
        emulator.launch(f"int8_finish_{NAMES[dtype]}", params, pieces(m * n, 1024, 1))
    else:
        params.codes = at(codes)
        emulator.launch(
            f"int8_linear_small_{NAMES[dtype]}", params, pieces(n, 8), grid_y=pieces(m, 8, 2)
        )
    wide = x.double()
    want = reference.int8_linear(wide.float(), weight.packed, weight.absmax, addend, threshold)
    # Sums of integers are exact. A few roundings each for the scales, the outliers and the bias.
    decoded = weight.dequantize(torch.float32).double()
    size = wide.abs() @ decoded.abs().T + (0 if addend is None else addend.double().abs())
    slack = (k + 16) * 2.0**-23 * size + torch.finfo(dtype).eps / 2 * want.abs().double()
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    assert not y.isnan().any()
    assert ((y.double() - want.double()).abs() <= slack * 1.01 + smallest).all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("threshold", [0.0, 2.5])
@pytest.mark.parametrize("finish", [False, True])
def test_a_token_that_is_not_finite_is_nan_and_no_other(
    loaded: Emulator, bad: float, threshold: float, finish: bool
) -> None:
    x = tensor((5, 64), torch.float16, 3) * 50
    x[2, 17] = bad
    weight = nb.quantize(tensor((9, 64), torch.float32, 4), "int8")
    flags, columns, count = outliers(loaded, x, threshold) if threshold else (None, None, None)
    codes, x_absmax, _ = rows(loaded, x, flags)
    y = poisoned((5, 9), torch.float16)
    params = Int8Linear(
        x_absmax=at(x_absmax), weight=at(weight.packed), absmax=at(weight.absmax), y=at(y), m=5,
        n=9, k=64, outliers=Outliers(columns=at(columns), count=at(count)),
        x=at(x) if threshold else None,
    )  # fmt: skip
    sums = (codes.double() @ weight.packed.double().T).to(torch.int32)
    if finish:
        params.sums = at(sums)
    else:
        params.codes = at(codes)
    kernel = "int8_finish" if finish else "int8_linear_small"
    loaded.launch(f"{kernel}_f16", params, 1)
    assert y.isfinite().all(dim=1).tolist() == [True, True, False, True, True]
    assert y[2].isnan().all()


@pytest.mark.parametrize("dtype", NAMES)
def test_the_whole_chain_equals_the_op_on_the_cpu_for_whole_numbers(
    loaded: Emulator, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (3, 64), generator=generator).to(dtype)
    x[:, 0] = 127
    w = torch.randint(-127, 128, (5, 64), generator=generator).float()
    w[:, 0] = 127
    weight = nb.quantize(w, "int8")
    codes, absmax, _ = rows(loaded, x)
    assert torch.equal(codes.float(), x.float())
    y = poisoned((3, 5), dtype)
    params = Int8Linear(
        codes=at(codes), x_absmax=at(absmax), weight=at(weight.packed), absmax=at(weight.absmax),
        y=at(y), m=3, n=5, k=64,
    )  # fmt: skip
    loaded.launch(f"int8_linear_small_{NAMES[dtype]}", params, 1)
    want = (x.double() @ w.double().T).to(dtype)
    assert torch.allclose(y.double(), want.double(), rtol=1e-6 if dtype == torch.float32 else 8e-3)
