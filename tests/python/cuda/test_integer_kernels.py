"""Products of integers with four-bit weights on the emulated GPU: those of the definition."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from emulated import CODES, NAMES, at, poisoned, scales_of
from hypothesis import HealthCheck, given, settings
from params import Emulator, IntegerLinear4, IntegerRows, pieces

import nybble as nb
from nybble import _core, integer
from strategies import FOUR_BIT, SPEC, dtypes, kinds, same_bits, seeds, tensor

FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
GROUP = integer.GROUP


def rows(emulator: Emulator, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = -(-x.shape[1] // GROUP)
    codes = poisoned(x.shape, torch.int8)
    factors = poisoned((x.shape[0], groups), torch.float32)
    params = IntegerRows(
        x=at(x), codes=at(codes), factors=at(factors), rows=x.shape[0], columns=x.shape[1],
        log2_group=GROUP.bit_length() - 1,
    )  # fmt: skip
    emulator.launch(f"integer_rows_{NAMES[x.dtype]}", params, pieces(factors.numel(), 8, 2))
    return codes, factors


def linear(
    emulator: Emulator, x: torch.Tensor, q: nb.QTensor, bias: torch.Tensor | None
) -> torch.Tensor:
    codes, factors = rows(emulator, x)
    (m, k), n = x.shape, q.shape[0]
    y = poisoned((m, n), x.dtype)
    scales, kept = scales_of(q)
    integers, step = _core.integers(q.format)
    params = IntegerLinear4(
        codes=at(codes), factors=at(factors), packed=at(q.packed), bias=at(bias), y=at(y), m=m,
        n=n, k=k, scales=scales, step=step, log2_group=GROUP.bit_length() - 1,
        bias_dtype=0 if bias is None else CODES[bias.dtype],
    )  # fmt: skip
    params.integers[:] = integers
    name = f"integer_linear4_{NAMES[x.dtype]}"
    emulator.launch(name, params, pieces(n, 8), grid_y=pieces(m, 8, 2))
    del kept
    return y


@FIXTURE
@given(m=st.integers(1, 4), k=st.integers(1, 700), dtype=dtypes, seed=seeds, kind=kinds)
def test_groups_of_activations_have_the_codes_of_rows_of_int8(
    emulator: Emulator, m: int, k: int, dtype: torch.dtype, seed: int, kind: str
) -> None:
    x = tensor((m, k), dtype, seed, kind)
    codes, factors = rows(emulator, x)
    for group in range(factors.shape[1]):
        part = slice(group * GROUP, (group + 1) * GROUP)
        want = nb.quantize(x[:, part].contiguous(), "int8")
        assert same_bits(codes[:, part].contiguous(), want.packed)
        inverse = torch.tensor(1 / 127, dtype=torch.float32)
        assert torch.equal(factors[:, group], want.absmax * inverse)


@FIXTURE
@given(
    m=st.integers(1, 18), n=st.integers(1, 30),
    k=st.one_of(st.integers(1, 300), st.sampled_from([256, 320, 1120])), dtype=dtypes, seed=seeds,
    kind=st.sampled_from(["normal", "constant", "zero", "steps"]),
    how=st.sampled_from(FOUR_BIT).flatmap(
        lambda name: st.tuples(
            st.just(name), st.sampled_from(SPEC[name]["blocksizes"]),
            st.booleans() if SPEC[name]["nestable"] else st.just(False),
        )
    ),
    bias=st.sampled_from([None, *NAMES]),
)  # fmt: skip
def test_products_are_those_of_the_definition(
    emulator: Emulator, m: int, n: int, k: int, dtype: torch.dtype, seed: int, kind: str, how: Any,
    bias: torch.dtype | None,
) -> None:  # fmt: skip
    format, blocksize, nested = how
    weight = tensor((n, k), torch.float32, seed, kind)
    q = nb.quantize(weight, format, blocksize=blocksize, nested=nested)
    x = tensor((m, k), dtype, seed + 1) * 50
    addend = None if bias is None else tensor((n,), bias, seed + 2)
    y = linear(emulator, x, q, addend)
    # Integer sums are exact. Each of at most k pieces is rounded a few times in f32, the result
    # once; the definition in f64 but for the factors, which have the same bits.
    wide = integer._rounded(x).double()
    integers = integer._values(q.format, x.device).double()[
        nb.reference.unpack(q.packed, n * k).long()
    ]
    scales = nb.reference.decode_scales(q.absmax, q.nested_absmax, q.nested_offset)
    blocks = nb.reference._blocks(integers, q.blocksize) * scales[:, None].double()
    decoded = blocks.flatten()[: n * k].reshape(n, k)
    want, size = wide @ decoded.T, wide.abs() @ decoded.abs().T
    if addend is not None:
        want, size = want + addend.double(), size + addend.double().abs()
    before = (k + 16) * 2.0**-23 * size
    slack = before + torch.finfo(dtype).eps / 2 * (want.abs() + before)
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    assert not y.isnan().any()
    assert ((y.double() - want).abs() <= slack + smallest).all()


def test_every_code_becomes_its_integer(loaded: Emulator) -> None:
    for format in FOUR_BIT:
        integers, step = _core.integers(format)
        blocksize = SPEC[format]["blocksizes"][0]
        codes = torch.arange(16, dtype=torch.uint8).repeat(4)
        packed = codes[0::2] << 4 | codes[1::2]
        ones = torch.full((64 // blocksize,), 1.0)
        absmax = ones if SPEC[format]["scale_dtype"] == "float32" else ones.to(torch.uint8) + 126
        q = nb.QTensor(
            packed=packed, absmax=absmax, format=format, shape=torch.Size((1, 64)),
            dtype=torch.float32, blocksize=blocksize,
        )  # fmt: skip
        x = torch.eye(64)[:16] * 127
        y = linear(loaded, x, q, None)
        want = torch.tensor(integers, dtype=torch.float32) * step
        assert torch.allclose(y.flatten(), want * 127, rtol=1e-6), format


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("k", [640, 77])
def test_what_is_not_finite_makes_its_token_nan(loaded: Emulator, bad: float, k: int) -> None:
    x = tensor((5, k), torch.float16, 8)
    x[2, 70] = bad
    q = nb.quantize(tensor((9, k), torch.float32, 9), "nf4")
    y = linear(loaded, x, q, None)
    assert y[2].isnan().all()
    assert y[[0, 1, 3, 4]].isfinite().all()
