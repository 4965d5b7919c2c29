"""Quantizing and decoding give the bits that the CPU gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

import nybble as nb
from nybble import cuda, reference
from nybble.errors import DeviceError, FormatError
from strategies import dtypes, for_format, matrices, same_bits, seeds, settings_of, tensor


@given(settings_of(), matrices, dtypes, seeds)
def test_quantize_gives_the_bytes_of_the_cpu(how, shape, dtype, seed):
    w = for_format(tensor(shape, dtype, seed), how["format"])
    q = nb.quantize(w, **how)
    got = cuda.ops.quantize(w, q.format, q.blocksize, q.nested, "exact", "error")
    for ours, theirs in zip(got, q.parts, strict=True):
        assert theirs is None or same_bits(ours, theirs)


@given(settings_of(), matrices, dtypes, seeds)
def test_dequantize_gives_the_bits_of_the_cpu(how, shape, dtype, seed):
    q = nb.quantize(for_format(tensor(shape, torch.float32, seed), how["format"]), **how)
    assert same_bits(cuda.ops.dequantize(*q.parts, *q.how, dtype), q.dequantize(dtype))
    out = torch.full(shape, torch.nan, dtype=dtype)
    cuda.ops.dequantize_out(*q.parts, *q.how, out)
    assert same_bits(out, q.dequantize(dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("format", ["nf4", "mxfp4", "dynamic8", "int8"])
def test_a_value_that_is_not_finite_is_an_error_with_its_position(format, value):
    w = torch.randn(40, 64)
    w[33, 5] = value
    w[35, 5] = value
    size = nb.quantize(torch.ones(40, 64), format).blocksize
    with pytest.raises(FormatError, match=f"position {33 * 64 + 5} ") as ours:
        cuda.ops.quantize(w, format, size, False, "exact", "error")
    with pytest.raises(FormatError) as theirs:
        nb.quantize(w, format)
    assert str(ours.value) == str(theirs.value)
    zeroed = cuda.ops.quantize(w, format, size, False, "exact", "zero")
    for part, expected in zip(zeroed, nb.quantize(w, format, nonfinite="zero").parts, strict=True):
        assert expected is None or same_bits(part, expected)


def test_what_bitsandbytes_writes_comes_from_the_cpu(launches):
    w = torch.randn(8, 64)
    got = cuda.ops.quantize(w, "nf4", 64, True, "bitsandbytes-cpu", "error")
    expected = nb.quantize(w, "nf4", nested=True, reference="bitsandbytes-cpu")
    assert all(same_bits(a, b) for a, b in zip(got, expected.parts, strict=True))
    assert launches() == []


def test_empty_tensors_are_quantized_and_decoded_without_a_launch(launches):
    for shape in ((0, 64), (3, 0)):
        for format in ("nf4", "int8", "dynamic8"):
            q = nb.quantize(torch.empty(shape), format)
            got = cuda.ops.quantize(
                torch.empty(shape), format, q.blocksize, False, "exact", "error"
            )
            assert same_bits(got[1], q.absmax)
            assert cuda.ops.dequantize(*q.parts, *q.how, torch.float32).shape == shape
    assert launches() == []


@pytest.mark.parametrize("format", ["nf4", "int8", "dynamic8", "mxfp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_embedding_decodes_only_the_rows_asked_for(format, nested, launches):
    if nested and format != "nf4":
        return
    q = nb.quantize(torch.randn(300, 128), format, nested=nested)
    ids = torch.tensor([[0, 299, 7], [7, 1, 1]])
    launches()
    got = cuda.ops.embedding(ids, *q.parts, *q.how, torch.bfloat16)
    assert same_bits(got, reference.embedding(ids, *q.parts, *q.how, torch.bfloat16))
    assert [launch["grid"] for launch in launches()] == ["1 1"]


@given(settings_of(), matrices, dtypes, seeds)
def test_figures_about_errors_are_those_of_the_cpu(how, shape, dtype, seed):
    x = for_format(tensor(shape, dtype, seed), how["format"])
    q = nb.quantize(x, **how)
    assert nb.functional.ErrorStats(**cuda.ops.error_stats(x, *q.parts, *q.how)) == nb.error(x, q)


@pytest.mark.parametrize("format", ["nf4", "int8", "dynamic8"])
def test_figures_of_several_runs_and_parts_are_those_of_the_cpu(format, launches, monkeypatch):
    # Three runs of about 65,536 elements, one at a time.
    monkeypatch.setattr(cuda.ops, "SCRATCH", 4 * 65536)
    x = tensor((300, 500), torch.bfloat16, 3, "heavy")
    q = nb.quantize(x, format)
    launches()
    got = cuda.ops.error_stats(x, *q.parts, *q.how)
    assert [launch["kernel"] for launch in launches() if "compare" in launch["kernel"]] == [
        "compare_bf16"
    ] * 3
    assert nb.functional.ErrorStats(**got) == nb.error(x, q)


def test_rows_that_are_no_whole_blocks_can_be_embedded():
    q = nb.quantize(torch.randn(30, 33))
    ids = torch.tensor([29, 0])
    got = cuda.ops.embedding(ids, *q.parts, *q.how, torch.float32)
    assert same_bits(got, q.dequantize()[ids])


def test_launches_go_to_the_stream_and_device_that_were_named(launches):
    q = nb.quantize(torch.randn(8, 64))
    launches()
    cuda.ops.dequantize(*q.parts, *q.how, torch.float16)
    (launch,) = launches()
    assert launch == {
        "kernel": "dequantize4_f16",
        "grid": "1 1",
        "stream": str(0xDEAD0),
        "device": "0",
    }


def test_misaligned_codes_are_refused_before_any_launch(launches):
    q = nb.quantize(torch.randn(64, 64))
    parts = (torch.cat([q.packed[:1], q.packed])[1:], *q.parts[1:])
    launches()
    with pytest.raises(DeviceError, match="16 bytes"):
        cuda.ops.dequantize(*parts, *q.how, torch.float32)
    with pytest.raises(DeviceError, match="16 bytes"):
        cuda.products.linear(torch.randn(1, 64), *parts, None, *q.how)
    with pytest.raises(DeviceError, match="out at"):
        cuda.ops.dequantize_out(*q.parts, *q.how, torch.empty(64 * 64 + 1)[1:].view(64, 64))
    assert launches() == []


def test_wrong_lengths_dtypes_and_gaps_are_refused_before_any_launch(launches):
    q = nb.quantize(torch.randn(64, 64))
    packed, absmax, _, _ = q.parts
    launches()
    rest = (None, None, *q.how, torch.float32)
    for wrong in (
        (packed[:-16], absmax),
        (packed, absmax[:-1]),
        (packed, absmax.double()),
        (packed.repeat(2)[::2], absmax),
    ):
        with pytest.raises((FormatError, TypeError)):
            cuda.ops.dequantize(*wrong, *rest)
    with pytest.raises(DeviceError, match="meta"):
        cuda.ops.dequantize(packed, absmax.to("meta"), *rest)
    assert launches() == []


def test_misaligned_values_are_copied_and_then_quantized():
    w = torch.randn(64 * 64 + 1)[1:].view(64, 64)
    assert w.data_ptr() % 16 != 0
    got = cuda.ops.quantize(w, "nf4", 64, False, "exact", "error")
    assert same_bits(got[0], nb.quantize(w.clone()).packed)
