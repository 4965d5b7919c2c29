"""The key scheme of quantized tensors in state dicts."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given

import nybble as nb
from strategies import dtypes, for_format, same_bits, seeds, settings_of, shapes, tensor


def blob(tensors, key):
    return json.loads(bytes(tensors[key].tolist()))


@given(settings_of(), shapes.filter(len), dtypes, seeds)
def test_a_state_dict_holds_the_whole_tensor(how, shape, dtype, seed):
    q = nb.quantize(for_format(tensor(shape, dtype, seed), how["format"]), **how)
    tensors = q.state_dict("m.0.weight")
    again = nb.QTensor.from_state_dict({"other": torch.ones(1), **tensors}, "m.0.weight")
    assert same_bits(again.dequantize(dtype), q.dequantize())
    assert again.shape == q.shape
    if how["format"] != "int8":  # whose files do not say
        assert again.dtype == q.dtype
        assert again.blocksize == q.blocksize


def test_a_prefix_may_name_the_module_or_the_parameter():
    q = nb.quantize(torch.randn(4, 64))
    assert set(q.state_dict("a.")) == set(q.state_dict("a.weight"))
    assert set(q.state_dict()) == {
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.quant_state.bitsandbytes__nf4",
    }
    eight = nb.quantize(torch.randn(4, 64), "int8")
    assert set(eight.state_dict("a.")) == {"a.weight", "a.SCB", "a.weight_format"}


def test_the_text_is_that_of_bitsandbytes():
    q = nb.quantize(torch.randn(4, 64).bfloat16(), "nf4", nested=True)
    tensors = q.state_dict("w")
    key = "w.quant_state.bitsandbytes__nf4"
    text = bytes(tensors[key].tolist()).decode()
    assert text.startswith(
        '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [4, 64], '
        '"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": '
    )
    assert tensors["w"].shape == (128, 1)
    assert tensors["w.absmax"].dtype == torch.uint8


def test_formats_of_our_own_do_not_claim_to_be_bitsandbytes():
    for name in ("int4", "mxfp4", "dynamic8"):
        assert f"w.quant_state.nybble__{name}" in nb.quantize(torch.ones(64), name).state_dict("w")


def change(tensors, key, value):
    return {**tensors, key: value}


def test_damaged_state_dicts_are_named():
    q = nb.quantize(torch.randn(4, 64), nested=True)
    good = q.state_dict("w")
    key = "w.quant_state.bitsandbytes__nf4"
    text = bytes(good[key].tolist()).decode()

    def with_text(new):
        return change(good, key, torch.tensor(list(new.encode()), dtype=torch.uint8))

    cases = {
        "missing": {k: v for k, v in good.items() if k != "w.absmax"},
        "nested_absmax": {k: v for k, v in good.items() if k != "w.nested_absmax"},
        "w.absmax": change(good, "w.absmax", good["w.absmax"][:-1]),
        "'w'": change(good, "w", good["w"][:-1]),
        "EOF": with_text(text[:-1]),
        "block_size": with_text(text.replace("blocksize", "block_size")),
        "disagree": with_text(text.replace('"nf4"', '"fp4"')),
        "float17": with_text(text.replace("float32", "float17", 1)),
        "-4": with_text(text.replace("[4", "[-4")),
        "nested_dtype is bfloat16": with_text(
            text.replace('nested_dtype": "float32', 'nested_dtype": "bfloat16')
        ),
        "no quant_state": {"w": good["w"]},
    }
    for match, tensors in cases.items():
        with pytest.raises(nb.CheckpointError, match=match):
            nb.QTensor.from_state_dict(tensors, "w")
    eight = nb.quantize(torch.randn(4, 64), "int8").state_dict("a.")
    with pytest.raises(nb.CheckpointError, match="SCB"):
        nb.QTensor.from_state_dict(change(eight, "a.SCB", torch.ones(3)), "a.")
    with pytest.raises(nb.CheckpointError, match="weight_format"):
        nb.QTensor.from_state_dict(change(eight, "a.weight_format", torch.tensor(1)), "a.")
