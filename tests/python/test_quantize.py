"""The primitives: properties of quantize and dequantize on tensors of all kinds."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

import nybble as nb
from nybble import reference
from strategies import (
    FOUR_BIT,
    NAMES,
    SPEC,
    dtypes,
    for_format,
    kinds,
    same_bits,
    seeds,
    settings_of,
    shapes,
    tensor,
)


def widest_gap(name: str) -> float:
    """The largest distance between neighbouring values of a codebook, in units of the scale."""
    book = sorted(set(SPEC[name]["codebook"] or [i / 127 for i in range(-127, 128)]))
    if name == "int4":
        book = book[1:]  # code 0 is never produced
    return max(b - a for a, b in itertools.pairwise(book))


@given(settings_of(), shapes, dtypes, kinds, seeds)
def test_decoding_is_the_definition_bit_for_bit(how, shape, dtype, kind, seed):
    x = for_format(tensor(shape, dtype, seed, kind), how["format"])
    q = nb.quantize(x, **how)
    for target in (torch.float32, torch.float16, torch.bfloat16):
        want = reference.dequantize(*q.parts, *q.how, target)
        assert same_bits(q.dequantize(target), want)


@given(settings_of(), shapes, kinds, seeds)
def test_error_is_at_most_half_the_widest_gap(how, shape, kind, seed):
    how = {**how, "nested": False}
    x = for_format(tensor(shape, torch.float32, seed, kind), how["format"])
    q = nb.quantize(x, **how)
    scales = reference.decode_scales(*q.parts[1:])
    size = max(q.blocksize, 1)
    per_element = scales.repeat_interleave(size)[: x.numel()]
    # Half the gap; mxfp4 saturates: up to 8 in units of the scale becomes 6. The relative slack
    # is for the roundings of x / scale and of value * scale.
    half = {"mxfp4": 2.0}.get(how["format"], widest_gap(how["format"]) / 2)
    if how["format"] in ("dynamic8", "dynamic8u"):
        # The signed map ends at -0.993: a value of -absmax is 0.007 away.
        half = max(half, 1 + min(book for book in SPEC["dynamic8"]["codebook"]))
    bound = half * per_element * (1 + 1e-5)
    assert bool(((x - q.dequantize()).flatten().abs() <= bound).all())


@given(settings_of(FOUR_BIT), shapes, kinds, seeds)
def test_quantizing_again_changes_nothing(how, shape, kind, seed):
    how = {**how, "nested": False}
    once = nb.quantize(tensor(shape, torch.float32, seed, kind), **how).dequantize()
    twice = nb.quantize(once, **how).dequantize()
    # The largest value of a block comes back as itself, so scales are equal and codes too;
    # fp4 and mxfp4 may lose the top value of a block, never another.
    if how["format"] in ("nf4", "int4", "fp4"):
        assert torch.equal(once, twice)
    else:
        assert torch.equal(twice, nb.quantize(twice, **how).dequantize())


@given(settings_of(), st.integers(1, 5), st.integers(1, 5), seeds)
def test_cutting_at_block_borders_changes_nothing(how, left, right, seed):
    name = how["format"]
    how = {**how, "nested": False}
    block = how["blocksize"] or 8
    cut = left * block
    x = for_format(tensor((cut + right * block - 3,), torch.float32, seed), name)
    if name == "int8":  # its blocks are rows
        x = torch.nn.functional.pad(x, (0, 3)).reshape(-1, block)
        parts = x[:left], x[left:]
    else:
        parts = x[:cut], x[cut:]
    whole = nb.quantize(x, **how)
    pieces = [nb.quantize(part, **how) for part in parts]
    assert torch.equal(whole.packed, torch.cat([piece.packed for piece in pieces]))
    assert torch.equal(whole.absmax, torch.cat([piece.absmax for piece in pieces]))


@given(settings_of(FOUR_BIT), seeds)
def test_codes_are_those_of_the_definition(how, seed):
    if SPEC[how["format"]]["scale_dtype"] == "uint8":
        return  # the plain definition has float scales only
    x = tensor((3, 100), torch.float32, seed)
    q = nb.quantize(x, how["format"], blocksize=how["blocksize"])
    codes, absmax = reference.quantize(x, how["format"], q.blocksize)
    assert torch.equal(reference.unpack(q.packed, x.numel()), codes)
    assert torch.equal(q.absmax, absmax)


@pytest.mark.parametrize("name", NAMES)
def test_a_view_is_quantized_like_its_copy(name):
    x = tensor((40, 50), torch.float32, 1).abs()
    for view in (x.T, x[::2], x[:, 3:20], x.expand(2, 40, 50)):
        a, b = nb.quantize(view, name), nb.quantize(view.contiguous(), name)
        assert torch.equal(a.packed, b.packed)
        assert torch.equal(a.dequantize(), b.dequantize())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (0, 5), (5, 0), (2, 3, 5)])
def test_small_and_empty_shapes_come_back(name, shape):
    x = torch.full(shape, 0.5)
    again = nb.quantize(x, name).dequantize()
    assert again.shape == x.shape
    if name != "dynamic8":  # 0.5 of a block whose absmax is 0.5 is 1.0: exact but for its map
        assert torch.equal(again, x)


def test_a_zero_block_decodes_to_zeros_and_zero_is_exact_in_dynamic8():
    for name in NAMES:
        for reference_mode in ("exact", "bitsandbytes-cpu"):
            x = torch.zeros(3, 70)
            assert torch.equal(nb.quantize(x, name, reference=reference_mode).dequantize(), x)
    x = torch.tensor([0.0, 1.0, -1.0, 0.0])
    for name in ("dynamic8", "nf4", "fp4", "int4", "mxfp4", "int8"):
        assert nb.quantize(x, name).dequantize()[[0, 3]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinity_are_refused_with_their_position(name, bad):
    x = torch.ones(4, 100)
    x[2, 7] = bad
    with pytest.raises(nb.FormatError, match="position 207"):
        nb.quantize(x, name)
    q = nb.quantize(x, name, nonfinite="zero")
    assert q.dequantize()[2, 7] == 0
    assert torch.isfinite(q.dequantize()).all()


def test_a_weight_that_overflows_fp16_is_refused_in_reference_mode_only():
    x = torch.tensor([[1.0, 70000.0]])
    assert nb.quantize(x, "int8").dequantize()[0, 1] == 70000.0
    with pytest.raises(nb.FormatError, match="position 1"):
        nb.quantize(x, "int8", reference="bitsandbytes-cpu")


def test_bits_per_weight_and_bytes_are_what_is_stored():
    x = torch.randn(128, 128)
    assert nb.quantize(x, "nf4").bits_per_weight == 4.5
    assert nb.quantize(x, "int8").bits_per_weight == 8.25
    assert nb.quantize(x, "mxfp4").bits_per_weight == 4.25
    nested = nb.quantize(x, "nf4", nested=True)
    assert nested.nbytes == 128 * 64 + 256 + 4 + 4
    assert nested.nested
    assert nested.device == torch.device("cpu")


def test_numpy_arrays_go_in_and_come_out():
    x = np.linspace(-1, 1, 300, dtype=np.float32).reshape(3, 100)
    q = nb.quantize(x)
    again = q.dequantize()
    assert isinstance(again, np.ndarray)
    assert again.dtype == np.float32
    assert again.shape == (3, 100)
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert q.dequantize(np.float16).dtype == np.float16
    frozen = x.copy()
    frozen.flags.writeable = False
    assert torch.equal(nb.quantize(frozen).packed, q.packed)
    assert torch.equal(nb.quantize(x[:, ::2]).packed, nb.quantize(x[:, ::2].copy()).packed)


def test_unknown_names_get_a_suggestion():
    x = torch.ones(4)
    with pytest.raises(nb.FormatError, match="did you mean 'nf4'"):
        nb.quantize(x, "nf5")
    with pytest.raises(nb.FormatError, match="blocksize 48"):
        nb.quantize(x, "nf4", blocksize=48)
    with pytest.raises(nb.FormatError, match="int8 has no nested"):
        nb.quantize(x, "int8", nested=True)
    with pytest.raises(nb.FormatError, match="bitsandbytes-cpu"):
        nb.quantize(x, reference="bitsandbytes")
    with pytest.raises(nb.FormatError, match="bf16 has no quantization"):
        nb.quantize(x, "bf16")


def test_wrong_dtypes_are_type_errors():
    for bad in (torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.int32)):
        with pytest.raises(TypeError, match="cast"):
            nb.quantize(bad)
    with pytest.raises(TypeError, match="list"):
        nb.quantize([1.0, 2.0])
    with pytest.raises(TypeError, match="float32"):
        nb.quantize(torch.ones(64)).dequantize(torch.float64)


@given(settings_of(), st.tuples(st.integers(1, 40), st.integers(1, 40)), dtypes, kinds, seeds)
def test_error_figures_are_those_of_the_formulas(how, shape, dtype, kind, seed):
    x = for_format(tensor(shape, dtype, seed, kind), how["format"])
    q = nb.quantize(x, **how)
    figures = nb.error(x, q)
    a, b = x.double(), q.dequantize(torch.float32).double()
    noise = float(((a - b) ** 2).sum())
    assert figures.mse == pytest.approx(noise / a.numel(), rel=1e-9)
    assert figures.max_abs == pytest.approx(float((a - b).abs().max()), rel=1e-6)
    if noise and float((a**2).sum()):
        sqnr = 10 * math.log10(float((a**2).sum()) / noise)
        assert figures.sqnr_db == pytest.approx(sqnr, abs=1e-9)
    elif not noise:
        assert figures.sqnr_db == math.inf
    assert figures.count == x.numel()


def test_error_refuses_another_shape():
    with pytest.raises(nb.FormatError, match="one shape"):
        nb.error(torch.ones(4), nb.quantize(torch.ones(5)))


@given(
    st.lists(st.integers(0, 15), max_size=100),
    st.sampled_from(["high_first", "low_first", "planar32"]),
)
def test_unpack_undoes_pack(codes, order):
    x = torch.tensor(codes, dtype=torch.uint8)
    assert torch.equal(nb.unpack(nb.pack(x, order), len(codes), order), x)


def test_codes_are_packed_first_element_high():
    assert nb.pack(torch.tensor([1, 2, 3], dtype=torch.uint8)).tolist() == [0x12, 0x30]
    q = nb.quantize(torch.tensor([-1.0, 1.0]), "nf4")
    assert q.packed.tolist() == [0x0F]


def test_nested_offset_is_the_mean_in_torchs_order():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, torch's own result depends on their number
    try:
        for blocks in (1, 7, 8, 9, 255, 256, 511, 4097, 33_000, 100_003):
            x = torch.zeros(blocks * 32)
            x[::32] = torch.rand(blocks) * 0.1
            q = nb.quantize(x, "nf4", blocksize=32, nested=True)
            assert q.nested_offset.item() == x[::32].contiguous().mean().item()
    finally:
        torch.set_num_threads(threads)


def test_a_forked_child_can_quantize():
    import os

    x = torch.randn(1 << 18)
    want = bytes(nb.quantize(x).packed.numpy())  # starts the threads of the parent
    child = os.fork()
    if child == 0:
        # Only nybble and plain Python here: torch's own threads do not survive a fork.
        os._exit(0 if bytes(nb.quantize(x).packed.numpy()) == want else 1)
    assert os.waitpid(child, 0)[1] == 0
