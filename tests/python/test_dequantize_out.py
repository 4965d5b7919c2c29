"""Decoding into a tensor that is there already."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

import nybble as nb
from strategies import dtypes, for_format, matrices, same_bits, seeds, settings_of, tensor


@given(settings_of(), matrices, dtypes, seeds)
def test_a_given_tensor_gets_the_bits_of_a_fresh_one(how, shape, dtype, seed):
    q = nb.quantize(for_format(tensor(shape, torch.float32, seed), how["format"]), **how)
    out = torch.full(shape, 7.0).to(dtype)
    assert nb.dequantize(q, out=out) is out
    assert same_bits(out, q.dequantize(dtype))
    again = torch.empty_like(out)
    assert q.dequantize(dtype, out=again) is again
    assert same_bits(out, again)


def test_large_tensors_are_decoded_alike_into_fresh_and_given_memory():
    q = nb.quantize(torch.randn(2049, 4096), nested=True)
    out = torch.empty(2049, 4096)
    q.dequantize(out=out)
    assert torch.equal(out, q.dequantize())
    rows = torch.arange(0, 2049, 100)
    part = torch.ops.nybble.embedding(rows, *q.parts, *q.how, torch.float32)
    assert torch.equal(out[rows], part)


def test_a_tensor_that_does_not_fit_is_refused():
    q = nb.quantize(torch.randn(8, 64))
    with pytest.raises(nb.FormatError, match=r"\(8, 63\).*\(8, 64\)"):
        nb.dequantize(q, out=torch.empty(8, 63))
    with pytest.raises(nb.FormatError, match="contiguous"):
        nb.dequantize(q, out=torch.empty(64, 8).T)
    with pytest.raises(nb.DtypeError, match="float64"):
        nb.dequantize(q, out=torch.empty(8, 64, dtype=torch.float64))
    with pytest.raises(nb.DtypeError, match="bfloat16"):
        nb.dequantize(q, torch.bfloat16, out=torch.empty(8, 64))
    with pytest.raises(nb.DeviceError, match="meta"):
        nb.dequantize(q, out=torch.empty(8, 64, device="meta"))
    with pytest.raises(nb.DtypeError, match="ndarray"):
        nb.dequantize(q, out=torch.empty(8, 64).numpy())


def test_compiled_code_writes_into_the_given_tensor():
    q = nb.quantize(torch.randn(16, 64), nested=True)

    def run(out):
        torch.ops.nybble.dequantize_out(*q.parts, *q.how, out)
        return out.sum()

    out = torch.zeros(16, 64)
    torch._dynamo.reset()
    total = torch.compile(run, fullgraph=True, backend="aot_eager")(out)
    assert torch.equal(out, q.dequantize())
    torch.testing.assert_close(total, out.sum())
