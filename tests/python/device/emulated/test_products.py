"""Products are within the error of their sums, and take the kernel that they should."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given

import nybble as nb
from nybble import cuda, integer, products, reference
from nybble.cuda import place
from nybble.errors import DeviceError, FormatError
from strategies import (
    FOUR_BIT,
    assert_product,
    dtypes,
    for_format,
    matrices,
    seeds,
    settings_of,
    tensor,
)


class OnDevice(products.Memo):
    """Takes tensors of the CPU for those of the device."""

    def get(self, *weight):
        return place.weight(*weight)


@given(settings_of(), matrices, dtypes, seeds)
def test_linear_is_dequantize_and_matmul(how, shape, dtype, seed):
    q = nb.quantize(for_format(tensor(shape, dtype, seed), how["format"]), **how)
    for rows in (1, 9, 33, 130, 257):
        x = torch.randn(rows, shape[1]).to(dtype)
        for bias in (None, torch.randn(shape[0]).to(dtype)):
            got = cuda.products.linear(x, *q.parts, bias, *q.how)
            assert_product(got, x, q, bias)


@given(settings_of(), matrices, seeds)
def test_gradients_are_those_of_the_decoded_weight(how, shape, seed):
    q = nb.quantize(for_format(tensor(shape, torch.float32, seed), how["format"]), **how)
    grad = torch.randn(2, 3, shape[0])
    got = cuda.products.linear_backward(grad, *q.parts, *q.how)
    torch.testing.assert_close(got, reference.linear_backward(grad, *q.parts, *q.how))


def kernel(rows: int, columns: int, dtype: torch.dtype, launches) -> list[str]:
    q = nb.quantize(torch.randn(48, columns), blocksize=32)
    launches()
    cuda.products.linear(torch.randn(rows, columns).to(dtype), *q.parts, None, *q.how)
    return [launch["kernel"] for launch in launches()]


def test_few_rows_take_one_kernel_and_many_are_decoded(launches):
    half = torch.float16
    assert kernel(1, 128, half, launches) == ["linear4_small8_f16"]
    assert kernel(9, 128, half, launches) == ["linear4_small16_f16"]
    assert kernel(32, 128, half, launches) == ["linear4_small32_f16"]
    assert kernel(33, 128, half, launches) == ["linear4_mid_f16"]
    assert kernel(256, 128, half, launches) == ["linear4_mid_f16"]
    assert kernel(257, 128, half, launches) == ["dequantize4_f16"]
    assert kernel(8, 96, half, launches) == ["linear4_gemv_f16"]
    assert kernel(9, 96, half, launches) == ["dequantize4_f16"]
    assert kernel(1, 128, torch.float32, launches) == ["linear4_gemv_f32"]


def test_any_number_of_rows_can_be_multiplied_both_ways(launches):
    q = nb.quantize(torch.randn(48, 128), nested=True)
    weight = place.weight(*q.parts, *q.how)
    for rows in (3, 300):
        x = torch.randn(rows, 128).half()
        for fused, expected in ((True, "linear4"), (False, "dequantize4")):
            launches()
            got = cuda.products.product(weight, x, q.packed, None, *q.how, fused=fused)
            (launch,) = launches()
            assert launch["kernel"].startswith(expected)
            assert_product(got, x, q)


@pytest.mark.parametrize("format", ["int8", "dynamic8"])
@pytest.mark.parametrize("columns", [128, 77])
def test_few_rows_are_multiplied_with_byte_codes_as_they_are(format, columns, launches):
    q = nb.quantize(torch.randn(48, columns), format)
    bias = torch.randn(48).half()
    for rows, expected in ((1, "linear8_gemv_f16"), (8, "linear8_gemv_f16"), (9, "dequantize")):
        x = torch.randn(rows, columns).half()
        launches()
        got = cuda.products.linear(x, *q.parts, bias, *q.how)
        (launch,) = launches()
        assert expected in launch["kernel"]
        assert_product(got, x, q, bias)


def test_old_devices_multiply_bfloat16_without_tensor_cores(launches):
    old = os.environ["NYBBLE_FAKE_CAPABILITY"] == "75"
    expected = "linear4_gemv_bf16" if old else "linear4_small8_bf16"
    assert kernel(2, 128, torch.bfloat16, launches) == [expected]


@pytest.mark.parametrize("format", ["nf4", "dynamic8", "int8"])
@pytest.mark.parametrize("columns", [64, 33])
def test_a_weight_that_exceeds_the_scratch_is_decoded_in_parts(
    format, columns, launches, monkeypatch
):
    monkeypatch.setattr(cuda.products, "SCRATCH", 64 * columns * 2)
    q = nb.quantize(torch.randn(150, columns), format)
    x, bias = torch.randn(260, columns).bfloat16(), torch.randn(150)
    launches()
    assert_product(cuda.products.linear(x, *q.parts, bias, *q.how), x, q, bias.bfloat16())
    assert len(launches()) == 3
    grad = torch.randn(40, 150).bfloat16()
    got = cuda.products.linear_backward(grad, *q.parts, *q.how)
    assert len(launches()) == 3
    exact = grad.double() @ q.dequantize(torch.bfloat16).double()
    # Each part and their sum are rounded to bfloat16 once.
    scale = grad.double().abs() @ q.dequantize(torch.float32).double().abs()
    assert bool(((got.double() - exact).abs() <= 2 * 2.0**-8 * scale).all())


def test_scratch_is_bounded_whatever_the_shape():
    for format, size in (("nf4", 64), ("int8", 0), ("dynamic8", 64)):
        for shape in ((14336, 4096), (128256, 8192), (4096, 14336)):
            rows = cuda.products.rows_at_a_time(format, size or shape[1], shape, 2)
            assert 0 < rows * shape[1] * 2 <= cuda.products.SCRATCH == 32 << 20


def test_a_misaligned_input_is_copied_and_a_bias_is_widened():
    q = nb.quantize(torch.randn(48, 128))
    x = torch.randn(8 * 128 + 1).half()[1:].view(8, 128)
    assert x.data_ptr() % 16 != 0
    bias = torch.randn(48, dtype=torch.float64)
    assert_product(cuda.products.linear(x, *q.parts, bias, *q.how), x, q, bias.half())


def test_wrong_shapes_are_refused_before_any_kernel(launches):
    q = nb.quantize(torch.randn(8, 64))
    launches()
    with pytest.raises(RuntimeError, match="63"):
        cuda.products.linear(torch.randn(2, 63), *q.parts, None, *q.how)
    with pytest.raises(ValueError, match="bias"):
        cuda.products.linear(torch.randn(2, 64), *q.parts, torch.randn(9), *q.how)
    with pytest.raises(DeviceError, match="meta"):
        cuda.products.linear(torch.randn(2, 64, device="meta"), *q.parts, None, *q.how)
    assert launches() == []


@given(matrices, dtypes, seeds)
def test_llm_int8_is_within_its_rounding(shape, dtype, seed):
    q = nb.quantize(tensor(shape, torch.float32, seed), "int8")
    for rows in (3, 20):
        for threshold in (0.0, 2.0):
            x, bias = torch.randn(rows, shape[1]).to(dtype), torch.randn(shape[0])
            got = cuda.products.int8_linear(x, q.packed, q.absmax, bias, threshold)
            exact = reference.int8_linear(x.double(), q.packed, q.absmax, bias, threshold)
            # Sums in float32 and one rounding to the dtype.
            scale = x.double().abs() @ q.dequantize(torch.float32).double().abs().T + bias.abs()
            unit = torch.finfo(dtype).eps
            bound = (unit + shape[1] * 2.0**-23) * scale + 1e-6
            assert bool(((got.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_a_row_that_is_not_finite_gives_nan_without_waiting(rows, threshold):
    q = nb.quantize(torch.randn(24, 64), "int8")
    x = torch.randn(rows, 64)
    x[1, 7], x[2, 9] = torch.nan, -torch.inf
    got = cuda.products.int8_linear(x, q.packed, q.absmax, None, threshold)
    assert got[1:3].isnan().all()
    others = [row for row in range(rows) if row not in (1, 2)]
    assert got[others].isfinite().all()


@given(settings_of(FOUR_BIT), matrices, dtypes, seeds)
def test_products_of_integers_are_those_of_the_definition(how, shape, dtype, seed):
    q = nb.quantize(tensor(shape, torch.float32, seed), **how)
    for rows in (1, 9):
        x, bias = torch.randn(rows, shape[1]).to(dtype), torch.randn(shape[0])
        got = integer._integer_linear_cuda(x, *q.parts, bias, *q.how)
        exact = integer.definition(x.double(), *q.parts, bias, *q.how)
        scale = x.double().abs() @ q.dequantize(torch.float32).double().abs().T + bias.abs()
        # Sums in float32 and one rounding to the dtype, both here and in the definition. A rounded
        # weight may exceed the decoded one by the step of the table.
        bound = (torch.finfo(dtype).eps + shape[1] * 2.0**-22) * (1.2 * scale + 1) + 1e-6
        assert bool(((got.double() - exact).abs() <= bound).all())


def test_integers_take_two_kernels_for_any_number_of_rows(launches):
    q = nb.quantize(torch.randn(24, 512), "nf4", nested=True)
    for rows in (1, 70):
        launches()
        integer._integer_linear_cuda(torch.randn(rows, 512).half(), *q.parts, None, *q.how)
        names = [launch["kernel"] for launch in launches()]
        assert names == ["integer_rows_f16", "integer_linear4_f16"]
    kept = OnDevice()
    x = torch.randn(3, 512)
    results = [
        integer._integer_linear_cuda(x, *q.parts, None, *q.how, memo=m) for m in (kept, None)
    ]
    assert torch.equal(*results)
    empty = integer._integer_linear_cuda(torch.randn(0, 512), *q.parts, None, *q.how)
    assert empty.shape == (0, 24)
    bytes_ = nb.quantize(torch.randn(24, 64), "dynamic8")
    with pytest.raises(FormatError, match="integer codes"):
        integer._integer_linear_cuda(torch.randn(2, 64), *bytes_.parts, None, *bytes_.how)


def test_many_rows_of_integers_are_multiplied_by_torch(launches):
    q = nb.quantize(torch.randn(24, 64), "int8")
    x = torch.randn(20, 64)
    x[3, 5] = 90.0
    launches()
    got = cuda.products.int8_linear(x, q.packed, q.absmax, None, 6.0)
    names = [launch["kernel"] for launch in launches()]
    assert names == ["int8_flags_f32", "int8_outliers", "int8_rows_f32", "int8_finish_f32"]
    expected = reference.int8_linear(x, q.packed, q.absmax, None, 6.0)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    cuda.products.int8_linear(x[:5], q.packed, q.absmax, None, 0.0)
    names = [launch["kernel"] for launch in launches()]
    assert names == ["int8_rows_f32", "int8_linear_small_f32"]


def test_a_description_is_made_again_where_the_tensors_have_moved():
    q = nb.quantize(torch.randn(8, 64), nested=True)
    weight = place.weight(*q.parts, *q.how)
    nested = (q.nested_absmax.data_ptr(), q.nested_offset.data_ptr())
    assert weight.is_at(q.packed.data_ptr(), q.absmax.data_ptr(), nested)
    assert not weight.is_at(q.packed.data_ptr() + 1, q.absmax.data_ptr(), nested)
    assert not weight.is_at(q.packed.data_ptr(), q.absmax.data_ptr())


@pytest.mark.parametrize("rows", [2, 40])
def test_gradients_that_autograd_alone_follows_take_the_devices_kernels(rows, launches):
    q = nb.quantize(torch.randn(48, 128), nested=True)
    x = torch.randn(rows, 128, requires_grad=True)
    bias = torch.randn(48, requires_grad=True)
    launches()
    y = products._Followed.apply(x, *q.parts, bias, q.how, OnDevice())
    grad = torch.randn(rows, 48)
    y.backward(grad)
    assert len(launches()) == 2
    assert_product(y.detach(), x.detach(), q, bias.detach())
    torch.testing.assert_close(x.grad, grad @ q.dequantize(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad, grad.sum(0))
