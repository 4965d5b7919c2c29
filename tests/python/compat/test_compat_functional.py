"""Functions of the compat package: golden tables and bytes, properties, errors."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import nybble as nb
import nybble.compat.bitsandbytes as bnb
from nybble import reference
from strategies import FLOATS, dtypes, same_bits, seeds, shapes, tensor

F = bnb.functional
GOLDEN = Path(__file__).parents[2] / "golden" / "bnb_checkpoints" / "llama_tied"


def sha256(x: torch.Tensor) -> str:
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


# Of the float32 bytes that bitsandbytes 0.50.2 computes (test_compat_parity.py).
MAPS = {
    "signed": (F.create_dynamic_map, {}, "e732639a65f497b4"),
    "unsigned": (F.create_dynamic_map, {"signed": False}, "305f002cc11278fb"),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_map_has_its_golden_hash(name):
    make, options, digest = MAPS[name]
    assert sha256(make(**options)).startswith(digest)


def test_the_normal_map_holds_nf4():
    values = F.create_normal_map()
    assert values.unique().numel() == 16
    assert same_bits(values.unique(), F.get_4bit_type("nf4", device="cpu"))


def test_the_small_tables_are_those_of_the_papers():
    fp4 = F.get_4bit_type("fp4", device="cpu")
    twelfths = [0, 0.0625, 8, 12, 4, 6, 2, 3]
    want = torch.tensor(twelfths + [-x for x in twelfths]) / 12
    assert torch.equal(fp4, want)
    int4 = F.get_4bit_type("int4", device="cpu")
    assert int4.tolist() == pytest.approx([x / 7 for x in (*range(7, -1, -1), *range(0, -8, -1))])
    assert F.get_4bit_type("af4", device="cpu")[[0, 8, 15]].tolist() == [1, 0, -1]


@pytest.mark.parametrize("name", ["nf4_dq", "fp4"])
def test_golden_weights_are_written_again_and_decode_to_their_hashes(name):
    tensors = load_file(GOLDEN / name / "model.safetensors")
    originals = load_file(GOLDEN / "original" / "model.safetensors")
    digests = json.loads((GOLDEN / name / "dequant.json").read_text())
    weights = [key for key in tensors if f"{key}.absmax" in tensors]
    assert len(weights) == 14
    for key in weights:
        entries = {k: v for k, v in tensors.items() if k.startswith(key + ".")}
        state = F.QuantState.from_dict(entries, device="cpu")
        packed, made = F.quantize_4bit(
            originals[key], quant_type=state.quant_type, compress_statistics=state.nested
        )
        assert same_bits(packed, tensors[key])
        for entry, value in made.as_dict(packed=True).items():
            assert same_bits(value, tensors[f"{key}.{entry}"]), entry
        decoded = F.dequantize_4bit(packed, state)
        assert decoded.dtype == torch.bfloat16
        module = key.removesuffix(".weight")
        if name != "fp4":  # bitsandbytes decodes code 8 of fp4 to -0
            assert sha256(decoded) == digests[module]["bfloat16"]["sha256"]


@given(
    st.sampled_from(["nf4", "fp4"]),
    st.sampled_from([32, 64, 256]),
    st.booleans(),
    dtypes,
    shapes,
    seeds,
)
def test_4bit_functions_are_nybbles_format(quant_type, blocksize, nested, dtype, shape, seed):
    x = tensor(shape, dtype, seed)
    packed, state = F.quantize_4bit(
        x, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
    )
    q = nb.quantize(x, quant_type, blocksize=blocksize, nested=nested, reference="bitsandbytes-cpu")
    assert same_bits(packed.flatten(), q.packed)
    assert same_bits(F.dequantize_4bit(packed, state), q.dequantize())
    again = F.QuantState.from_dict(state.as_dict(packed=True), device="cpu")
    assert again == state
    assert again == F.QuantState.from_dict(state.to_dict(), device="cpu")


codes = st.sampled_from(["dynamic", "linear", "fp8", "few", "unsorted"])


def table(name: str) -> torch.Tensor:
    return {
        "dynamic": F.create_dynamic_map,
        "linear": F.create_linear_map,
        "fp8": F.create_fp8_map,
        "few": lambda: F.get_4bit_type("nf4", device="cpu"),
        "unsorted": lambda: F.get_4bit_type("fp4", device="cpu"),
    }[name]()


small = st.lists(st.integers(0, 12), max_size=3).map(tuple)


@given(codes, st.integers(1, 300), dtypes, small, seeds)
def test_8bit_codes_are_the_nearest_values_of_any_table(name, blocksize, dtype, shape, seed):
    x, code = tensor(shape, dtype, seed), table(name)
    packed, state = F.quantize_blockwise(x, code=code, blocksize=blocksize)
    assert packed.shape == x.shape
    scales = state.absmax.double().repeat_interleave(blocksize)[: x.numel()]
    flat = x.flatten().double()
    chosen = code.double()[packed.flatten().long()] * scales
    every = code.double()[None] * scales[:, None]
    nearest = (every - flat[:, None]).abs().amin(dim=1)
    # The scaled value and the pivots are float32: two values within an ulp of it count as equal.
    assert bool(((chosen - flat).abs() <= nearest + scales * 2**-22).all())
    decoded = F.dequantize_blockwise(packed, state)
    assert same_bits(decoded, chosen.float().to(dtype).reshape(shape)) or torch.allclose(
        decoded.double(), chosen.reshape(shape), rtol=torch.finfo(dtype).eps
    )


@given(st.sampled_from([32, 64, 4096]), dtypes, shapes, seeds, st.booleans())
def test_the_default_table_by_kernel_or_by_torch_gives_the_same(
    blocksize, dtype, shape, seed, heavy
):
    x = tensor(shape, dtype, seed, "heavy" if heavy else "normal")
    by_kernel, state = F.quantize_blockwise(x, blocksize=blocksize)
    by_torch, other = F.quantize_blockwise(x, code=F.create_dynamic_map(), blocksize=blocksize)
    assert same_bits(by_kernel, by_torch)
    assert state == other
    values = F.dequantize_blockwise(by_kernel, state)
    unknown = F.QuantState(
        absmax=state.absmax,
        code=state.code.double(),  # not the float32 table that the kernels know
        blocksize=blocksize,
        dtype=dtype,
    )
    assert same_bits(values, F.dequantize_blockwise(by_kernel, unknown))


@pytest.mark.parametrize("blocksize", [64, 256])
def test_nested_8bit_scales_decode_close_to_plain_ones(blocksize):
    x = torch.randn(64, 512)
    packed, state = F.quantize_blockwise(x, blocksize=blocksize, nested=True)
    plain, plain_state = F.quantize_blockwise(x, blocksize=blocksize)
    assert same_bits(packed, plain)
    assert state.absmax.dtype == torch.uint8
    ours = F.dequantize_blockwise(packed, state)
    exact = F.dequantize_blockwise(plain, plain_state)
    spread = plain_state.absmax - plain_state.absmax.mean()
    widest = F.create_dynamic_map().diff().max() / 2
    assert (ours - exact).abs().max() <= spread.abs().max() * widest * 1.001


def test_a_scale_table_of_another_kind_is_decoded_too():
    x = torch.randn(64, 64)
    packed, plain = F.quantize_nf4(x)
    codes, inner = F.quantize_blockwise(plain.absmax, code=F.create_linear_map(), blocksize=32)
    nested = F.QuantState(
        absmax=codes,
        shape=x.shape,
        code=plain.code,
        blocksize=64,
        quant_type="nf4",
        dtype=torch.float32,
        offset=torch.tensor(0.0),
        state2=inner,
    )
    scales = F.dequantize_blockwise(codes, inner)
    want = reference.dequantize(packed, scales, None, None, "nf4", 64, [64, 64], torch.float32)
    assert torch.equal(F.dequantize_4bit(packed, nested), want)
    activations = torch.randn(3, 64)
    product = bnb.matmul_4bit(activations, packed, nested)
    assert torch.allclose(product, activations @ want.T, atol=1e-5)


@given(dtypes, st.tuples(st.integers(1, 9), st.integers(1, 70)), seeds)
def test_int8_rows_decode_within_half_a_step(dtype, shape, seed):
    x = tensor(shape, dtype, seed)
    codes, scales, columns = F.int8_vectorwise_quant(x)
    assert columns is None
    assert codes.dtype == torch.int8
    error = (F.int8_vectorwise_dequant(codes, scales) - x.float()).abs()
    assert bool((error <= scales[:, None] / 127 * 0.5001).all())


def test_an_integer_product_scaled_is_the_product():
    a, b = torch.randn(6, 64), torch.randn(10, 64)
    (ca, sa, _), (cb, sb, _) = F.int8_vectorwise_quant(a), F.int8_vectorwise_quant(b)
    product = F.int8_linear_matmul(ca, cb)
    assert torch.equal(product, ca.int() @ cb.int().T)
    bias = torch.randn(10)
    got = F.int8_mm_dequant(product, sa, sb, bias=bias)
    want = F.int8_vectorwise_dequant(ca, sa) @ F.int8_vectorwise_dequant(cb, sb).T + bias
    assert got.dtype == torch.float16
    assert torch.allclose(got.float(), want, rtol=2**-10, atol=1e-3)
    out = torch.empty(6, 10, dtype=torch.int32)
    assert F.int8_linear_matmul(ca, cb, out=out) is out
    assert torch.equal(out, product)


def test_double_quantization_by_rows_and_columns_agrees_with_each_alone():
    x = torch.randn(12, 20).half()
    x[3, 7] = 30.0
    rows, columns, row_scales, column_scales, outliers = F.int8_double_quant(x, threshold=10.0)
    want, want_scales, want_outliers = F.int8_vectorwise_quant(x, threshold=10.0)
    assert same_bits(rows, want)
    assert same_bits(row_scales, want_scales)
    assert outliers.tolist() == want_outliers.tolist() == [7]
    inliers = x.clone()
    inliers[3, 7] = 0
    transposed, transposed_scales, _ = F.int8_vectorwise_quant(inliers.t())
    assert same_bits(columns, transposed.t().contiguous())
    assert same_bits(column_scales, transposed_scales)


@pytest.mark.parametrize("dtype", FLOATS)
def test_results_are_written_where_out_says(dtype):
    x = torch.randn(16, 64).to(dtype)
    packed, state = F.quantize_nf4(x, out=torch.zeros(512, 1, dtype=torch.uint8))
    scales = torch.zeros(16)
    again, other = F.quantize_nf4(x, absmax=scales)
    assert same_bits(packed, again)
    assert other.absmax is scales
    want = F.dequantize_4bit(packed, state)
    out = torch.empty(16, 64, dtype=dtype)
    assert F.dequantize_4bit(packed, state, out=out) is out
    assert same_bits(out, want)
    out = torch.empty(16, 64, dtype=dtype)
    F.dequantize_nf4(packed, absmax=state.absmax, out=out, blocksize=64)
    assert same_bits(out, want)
    codes, state8 = F.quantize_blockwise(x, out=torch.empty(16, 64, dtype=torch.uint8))
    assert F.dequantize_blockwise(codes, state8, out=out) is out
    a = torch.randn(1, 64).to(dtype)
    y = torch.empty(1, 16, dtype=dtype)
    assert F.gemv_4bit(a, packed, out=y, state=state) is y
    assert torch.equal(y, bnb.matmul_4bit(a, packed, state))
    with pytest.raises(nb.FormatError, match=r"out has shape \(2, 2\)"):
        F.dequantize_4bit(packed, state, out=torch.empty(2, 2, dtype=dtype))
    with pytest.raises(nb.FormatError, match=r"out is torch\.uint8"):
        F.dequantize_4bit(packed, state, out=torch.empty(16, 64, dtype=torch.uint8))


ERRORS = {
    "did you mean 'nf4'": lambda: F.quantize_4bit(torch.ones(64), quant_type="NF4"),
    "blocksize is one of": lambda: F.quantize_4bit(torch.ones(64), blocksize=63),
    "quant_storage is one of": lambda: F.quantize_4bit(torch.ones(64), quant_storage=torch.int8),
    "no whole number": lambda: F.quantize_4bit(torch.ones(6), quant_storage=torch.float32),
    "got torch.float64": lambda: F.quantize_4bit(torch.ones(64).double()),
    "inf at flat position 3": lambda: F.quantize_4bit(torch.tensor([1.0, 1, 1, torch.inf])),
    "block 1 .elements 2 and on": lambda: F.quantize_blockwise(
        torch.tensor([1.0, 1, 1, torch.nan]), code=F.create_linear_map(), blocksize=2
    ),
    "a code is 2 to 256": lambda: F.quantize_blockwise(torch.ones(4), code=torch.ones(300)),
    "need 2 scales, got 1": lambda: F.dequantize_blockwise(
        torch.ones(8, dtype=torch.uint8), absmax=torch.ones(1), blocksize=4
    ),
    "no nested scales": lambda: F.dequantize_blockwise(
        *F.quantize_blockwise(torch.ones(8)), nested=True
    ),
    "takes no transposed operands": lambda: F.gemv_4bit(
        torch.ones(1, 64),
        *F.quantize_nf4(torch.ones(4, 64))[:1],
        None,
        True,
        state=F.quantize_nf4(torch.ones(4, 64))[1],
    ),
    "not that of a 4-bit weight": lambda: bnb.matmul_4bit(
        torch.ones(1, 8), torch.ones(4, 1), F.QuantState(torch.ones(1), shape=torch.Size([1, 8]))
    ),
    "do not make 8 bits": lambda: F.create_fp8_map(exponent_bits=3, precision_bits=3),
    "total_bits - 1 exponent bits always fit": lambda: F.create_dynamic_map(False, 5),
    "2 rows need as many scales": lambda: F.int8_vectorwise_dequant(
        torch.ones(2, 2, dtype=torch.int8), torch.ones(3)
    ),
    "should agree, got": lambda: F.int8_linear_matmul(
        torch.ones(2, 3, dtype=torch.int8), torch.ones(2, 4, dtype=torch.int8)
    ),
    "has no scales": lambda: bnb.matmul(torch.ones(1, 2), torch.ones(3, 2, dtype=torch.int8)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_an_error_says_what_was_wrong(message):
    with pytest.raises(ValueError, match=message) as raised:
        ERRORS[message]()
    assert isinstance(raised.value, nb.Error)


def entries() -> dict[str, torch.Tensor]:
    return F.quantize_nf4(torch.randn(8, 64), compress_statistics=True)[1].as_dict(packed=True)


DAMAGE = {
    "not JSON": lambda d: d | {"quant_state.bitsandbytes__nf4": torch.tensor([123, 123]).byte()},
    "JSON object": lambda d: d | {"quant_state.bitsandbytes__nf4": torch.tensor([49]).byte()},
    "lacks .'quant_map'": lambda d: {k: v for k, v in d.items() if k != "quant_map"},
    "unknown entries .'sacles'": lambda d: d | {"sacles": torch.ones(1)},
    "key that ends in one of": lambda d: {k: v for k, v in d.items() if "quant_state" not in k},
    "repair=True": lambda d: d | {"absmax": torch.ones(1, 8, dtype=torch.bfloat16)},
    "should be a tensor": lambda d: d | {"nested_absmax": 3},
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_state_is_refused(message):
    with pytest.raises(nb.CheckpointError, match=message):
        F.QuantState.from_dict(DAMAGE[message](entries()), device="cpu")


def test_states_compare_and_index_like_lists():
    _, nested = F.quantize_nf4(torch.randn(8, 64), compress_statistics=True)
    _, plain = F.quantize_nf4(torch.randn(8, 64))
    assert nested == F.QuantState.from_dict(nested.as_dict(), device="cpu")
    assert nested != plain
    assert plain != F.quantize_fp4(torch.randn(8, 64))[1]
    assert nested != "nested"
    assert nested[1:4] == [torch.Size([8, 64]), torch.float32, 64]
    assert nested[4] == [nested.offset, nested.state2]
    assert plain[4] is None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = plain.nonsense


def test_names_that_are_not_offered_say_why():
    with pytest.raises(AttributeError, match=r"no optimizers yet; use torch\.optim"):
        _ = bnb.optim
    with pytest.raises(AttributeError, match="this is not bitsandbytes"):
        _ = bnb.__version__
    with pytest.raises(AttributeError, match="did you mean 'Linear4bit'"):
        _ = bnb.nn.Linear4Bit
    with pytest.raises(AttributeError, match="did you mean 'quantize_4bit'"):
        _ = F.quantise_4bit
    with pytest.raises(AttributeError, match="Linear8bitLt with a threshold"):
        _ = bnb.nn.modules.OutlierAwareLinear
    assert not hasattr(bnb, "__path_to_nowhere__")


def test_importing_the_package_imports_no_partner_and_claims_no_name():
    code = (
        "import nybble.compat.bitsandbytes as bnb, sys;"
        "bnb.nn.LinearNF4(64, 64).to('cpu');"
        "print([m for m in ('bitsandbytes', 'transformers', 'peft', 'accelerate', 'scipy')"
        " if sys.modules.get(m)])"
    )
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def test_importing_nybble_does_not_import_the_package():
    code = "import nybble, sys; print(any('compat' in name for name in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
