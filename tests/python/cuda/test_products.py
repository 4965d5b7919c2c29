"""Products on the emulated GPU stay within the bounds of their definition."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from emulated import CODES, NAMES, at, poisoned, scales_of, values_of
from hypothesis import HealthCheck, given, settings
from params import Emulator, Linear4, Linear8, pieces

import nybble as nb
from strategies import FOUR_BIT, SPEC, dtypes, for_format, kinds, seeds, tensor

FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
HALVES = [torch.float16, torch.bfloat16]
# Rows of the weight and of x that a thread block of linear4_mid may have.
BLOCKS = [(128, 128), (128, 80), (128, 64), (128, 8), (64, 32), (64, 16)]
four_bit = st.sampled_from(FOUR_BIT).flatmap(
    lambda name: st.tuples(
        st.just(name),
        st.sampled_from(SPEC[name]["blocksizes"]),
        st.booleans() if SPEC[name]["nestable"] else st.just(False),
    )
)


def linear4(
    emulator: Emulator,
    kernel: str,
    x: torch.Tensor,
    q: nb.QTensor,
    bias: torch.Tensor | None,
    block: tuple[int, int] = (128, 128),
) -> torch.Tensor:
    """`block`: rows of the weight and of x of a thread block of `linear4_mid`."""
    (m, k), n = x.shape, q.shape[0]
    y = poisoned((m, n), x.dtype)
    scales, kept = scales_of(q)
    params = Linear4(
        x=at(x), packed=at(q.packed), bias=at(bias), y=at(y), m=m, n=n, k=k, scales=scales,
        bias_dtype=0 if bias is None else CODES[bias.dtype], rows=block[0], tokens=block[1],
    )  # fmt: skip
    params.values[:] = values_of(q.format)
    name = f"{kernel}_{NAMES[x.dtype]}"
    if "mid" in kernel:
        emulator.launch(name, params, pieces(n, block[0]), grid_y=pieces(m, block[1], 2))
    elif "small" in kernel:
        emulator.launch(name, params, pieces(n, 16))
    else:
        emulator.launch(name, params, pieces(n, 8), grid_y=pieces(m, 4, 2))
    del kept
    return y


def linear8(
    emulator: Emulator, x: torch.Tensor, q: nb.QTensor, bias: torch.Tensor | None
) -> torch.Tensor:
    (m, k), n = x.shape, q.shape[0]
    y = poisoned((m, n), x.dtype)
    values = None if q.format == "int8" else torch.tensor(values_of(q.format), dtype=torch.float32)
    params = Linear8(
        x=at(x), codes=at(q.packed), values=at(values), absmax=at(q.absmax), bias=at(bias), y=at(y),
        m=m, n=n, k=k, log2_blocksize=0 if values is None else q.blocksize.bit_length() - 1,
        bias_dtype=0 if bias is None else CODES[bias.dtype],
    )  # fmt: skip
    name = f"linear8_gemv_{NAMES[x.dtype]}"
    emulator.launch(name, params, pieces(n, 8), grid_y=pieces(m, 4, 2))
    return y


def assert_close(
    y: torch.Tensor, x: torch.Tensor, q: nb.QTensor, bias: torch.Tensor | None, table: float
) -> None:
    """Whether each output is as far off as its roundings allow.

    Values of the table are rounded to half precision where tensor cores take them (`table`, half a
    unit, relative to the term). Hardware may cut off what it adds instead of rounding, a unit of
    float32 for each of k terms; the sums over warps and the scales add a few more. The result is
    rounded once.
    """
    weight = q.dequantize(torch.float32).double()
    want, size = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if bias is not None:
        want, size = want + bias.double(), size + bias.double().abs()
    before = (table + (x.shape[1] + 16) * 2.0**-23) * size
    slack = before + torch.finfo(y.dtype).eps / 2 * (want.abs() + before)
    smallest = torch.finfo(y.dtype).tiny * torch.finfo(y.dtype).eps
    assert not y.isnan().any()
    assert ((y.double() - want).abs() <= slack + smallest).all()


def half_unit(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps) / 2


def operands(
    m: int, n: int, k: int, dtype: torch.dtype, seed: int, kind: str, how: Any, bias: Any
) -> tuple[torch.Tensor, nb.QTensor, torch.Tensor | None]:
    format, blocksize, nested = how
    weight = tensor((n, k), torch.float32, seed, kind)
    q = nb.quantize(weight, format, blocksize=blocksize, nested=nested)
    x = tensor((m, k), dtype, seed + 1) * 50
    addend = None if bias is None else tensor((n,), bias, seed + 2)
    return x, q, addend


@FIXTURE
@given(
    tokens=st.sampled_from([8, 16, 32]), m=st.integers(1, 32), n=st.integers(1, 70),
    steps=st.integers(1, 40), dtype=st.sampled_from(HALVES), seed=seeds,
    kind=st.sampled_from(["normal", "constant", "zero", "steps"]), how=four_bit,
    bias=st.sampled_from([None, *NAMES]),
)  # fmt: skip
def test_few_tokens_on_tensor_cores(
    emulator: Emulator, tokens: int, m: int, n: int, steps: int, dtype: torch.dtype, seed: int,
    kind: str, how: Any, bias: Any,
) -> None:  # fmt: skip
    x, q, addend = operands(min(m, tokens), n, 64 * steps, dtype, seed, kind, how, bias)
    y = linear4(emulator, f"linear4_small{tokens}", x, q, addend)
    assert_close(y, x, q, addend, half_unit(dtype))


@FIXTURE
@given(
    m=st.integers(1, 270), n=st.integers(1, 300), steps=st.integers(1, 9),
    dtype=st.sampled_from(HALVES), seed=seeds,
    kind=st.sampled_from(["normal", "constant", "zero", "steps"]), how=four_bit,
    bias=st.sampled_from([None, *NAMES]), block=st.sampled_from(BLOCKS),
)  # fmt: skip
def test_more_tokens_on_tensor_cores(
    emulator: Emulator, m: int, n: int, steps: int, dtype: torch.dtype, seed: int, kind: str,
    how: Any, bias: Any, block: tuple[int, int],
) -> None:  # fmt: skip
    x, q, addend = operands(m, n, 64 * steps, dtype, seed, kind, how, bias)
    y = linear4(emulator, "linear4_mid", x, q, addend, block)
    assert_close(y, x, q, addend, half_unit(dtype))


@FIXTURE
@given(
    m=st.integers(1, 9), n=st.integers(1, 30), k=st.one_of(st.integers(1, 300), st.just(1024)),
    dtype=dtypes, seed=seeds, kind=kinds, how=four_bit, bias=st.sampled_from([None, *NAMES]),
)  # fmt: skip
def test_any_row_length_in_f32(
    emulator: Emulator, m: int, n: int, k: int, dtype: torch.dtype, seed: int, kind: str, how: Any,
    bias: Any,
) -> None:  # fmt: skip
    x, q, addend = operands(m, n, k, dtype, seed, kind, how, bias)
    y = linear4(emulator, "linear4_gemv", x, q, addend)
    assert_close(y, x, q, addend, 0.0)


@FIXTURE
@given(
    m=st.integers(1, 9), n=st.integers(1, 30),
    k=st.one_of(st.integers(1, 200), st.sampled_from([16, 512, 1040])), dtype=dtypes, seed=seeds,
    kind=kinds, format=st.sampled_from(["int8", "dynamic8", "dynamic8u"]),
    blocksize=st.sampled_from([32, 64, 4096]), bias=st.sampled_from([None, *NAMES]),
)  # fmt: skip
def test_weights_of_byte_codes_in_f32(
    emulator: Emulator, m: int, n: int, k: int, dtype: torch.dtype, seed: int, kind: str,
    format: str, blocksize: int, bias: Any,
) -> None:  # fmt: skip
    weight = for_format(tensor((n, k), torch.float32, seed, kind), format)
    q = nb.quantize(weight, format, blocksize=None if format == "int8" else blocksize)
    x = tensor((m, k), dtype, seed + 1) * 50
    addend = None if bias is None else tensor((n,), bias, seed + 2)
    assert_close(linear8(emulator, x, q, addend), x, q, addend, 0.0)


def test_every_signed_byte_is_multiplied_exactly(loaded: Emulator) -> None:
    codes = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).reshape(1, 256)
    absmax = torch.tensor([127.0])
    q = nb.QTensor(
        packed=codes, absmax=absmax, format="int8", shape=torch.Size((1, 256)),
        dtype=torch.float32, blocksize=256,
    )  # fmt: skip
    y = linear8(loaded, torch.eye(256), q, None)
    assert torch.equal(y.flatten(), codes.flatten().float())


@pytest.mark.parametrize(
    "kernel", ["linear4_small8", "linear4_small32", "linear4_mid", "linear4_gemv"]
)
def test_every_order_of_threads_gives_the_same_bits(loaded: Emulator, kernel: str) -> None:
    x, q, bias = operands(
        7, 45, 64 * 19, torch.bfloat16, 4, "normal", ("nf4", 64, True), torch.float32
    )
    results = []
    for seed in range(5):
        loaded.order(seed)
        results.append(linear4(loaded, kernel, x, q, bias))
    loaded.order(0)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("kernel", ["linear4_small8", "linear4_mid", "linear4_gemv"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_with_its_token(loaded: Emulator, kernel: str, bad: float) -> None:
    x, q, _ = operands(5, 33, 640, torch.float16, 8, "normal", ("int4", 64, False), None)
    x[2, 77] = bad
    y = linear4(loaded, kernel, x, q, None)
    finite = y.isfinite().all(dim=1)
    assert finite.tolist() == [True, True, False, True, True]


def test_a_bf16_product_is_nearer_than_a_product_with_decoded_weights(loaded: Emulator) -> None:
    weight = torch.randn(48, 4096, generator=torch.Generator().manual_seed(1)) * 0.05
    q = nb.quantize(weight, "nf4")
    x = torch.randn(8, 4096, generator=torch.Generator().manual_seed(2)).bfloat16()
    want = x.double() @ q.dequantize(torch.float32).double().T

    def error(y: torch.Tensor) -> float:
        return float((y.double() - want).norm() / want.norm())

    ours = error(linear4(loaded, "linear4_small8", x, q, None))
    decoded = error(torch.nn.functional.linear(x, q.dequantize(torch.bfloat16)))
    assert ours <= decoded
