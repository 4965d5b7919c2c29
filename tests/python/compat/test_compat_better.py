"""Where bitsandbytes 0.50.2 is wrong on a CPU, the compat package is right: a test for each.

What bitsandbytes does in each case was measured; see `docs/from_bitsandbytes.md`.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import nybble as nb
import nybble.compat.bitsandbytes as bnb
from nybble import reference
from strategies import same_bits

F = bnb.functional


def nf4(shape: tuple[int, int] = (64, 64), **options) -> bnb.nn.Linear4bit:
    return bnb.nn.LinearNF4(shape[1], shape[0], **options).to("cpu")


def decoded(layer: bnb.nn.Linear4bit) -> torch.Tensor:
    return F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@pytest.mark.parametrize("nested", [False, True])
def test_a_weight_decodes_and_saves_the_same_after_an_eval_forward(nested):
    layer = nf4(compress_statistics=nested)
    weight, state = decoded(layer), {k: v.clone() for k, v in layer.state_dict().items()}
    layer.eval()(torch.randn(2, 64))
    assert same_bits(decoded(layer), weight)
    after = layer.state_dict()
    assert after.keys() == state.keys()
    assert all(same_bits(after[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("shape", "blocksize"), [((64, 96), 64), ((64, 80), 64), ((128, 576), 128), ((8, 4304), 64)]
)
def test_rows_that_split_blocks_decode_right(shape, blocksize):
    w = torch.randn(shape)
    packed, state = F.quantize_nf4(w, blocksize=blocksize)
    how = ("nf4", blocksize, list(shape), torch.float32)
    assert torch.equal(
        F.dequantize_4bit(packed, state),
        reference.dequantize(packed, state.absmax, None, None, *how),
    )
    assert (F.dequantize_4bit(packed, state) - w).norm() < 0.12 * w.norm()


@pytest.mark.parametrize("shape", [(33, 64), (64, 5), (1, 1), (5, 77)])
def test_layers_of_any_shape_evaluate(shape):
    layer = nf4(shape).eval()
    x = torch.randn(3, shape[1])
    want = nn.functional.linear(x, decoded(layer), layer.bias)
    assert torch.allclose(layer(x), want, atol=1e-5)


def test_an_eval_forward_computes_in_the_compute_dtype():
    layer = nf4(compute_dtype=torch.float32)
    x = torch.randn(4, 64)
    assert torch.equal(layer.eval()(x), layer.train()(x))


def test_training_after_an_eval_forward_has_gradients():
    layer = nf4()
    layer.eval()(torch.randn(2, 64))
    x = torch.randn(2, 64, requires_grad=True)
    layer.eval()(x).sum().backward()
    assert torch.allclose(x.grad, decoded(layer).sum(dim=0).expand(2, 64), atol=1e-5)


@pytest.mark.parametrize("signed", [True, False])
def test_zero_and_tiny_values_have_8bit_codes(signed):
    x = torch.tensor([0.0, 1e-6, 1.0, 0.0])
    code = None if signed else F.create_dynamic_map(signed=False)
    packed, state = F.quantize_blockwise(x, code=code, blocksize=64)
    values = F.dequantize_blockwise(packed, state)
    assert values[[0, 3]].tolist() == [0, 0]
    assert 0 < values[1] < 2e-6


def test_a_layer_loads_its_own_state_dict():
    layer = nf4(compress_statistics=True)
    assert nf4().load_state_dict(layer.state_dict()).unexpected_keys == []
    int8 = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False).to("cpu")
    fresh = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)  # not quantized yet
    fresh.load_state_dict(int8.state_dict())
    assert same_bits(fresh.weight.SCB, int8.weight.SCB)


def test_a_layer_that_was_never_moved_quantizes_at_first_use():
    layer = bnb.nn.LinearNF4(64, 64)
    y = layer(torch.randn(2, 64))
    assert y.shape == (2, 64)
    assert layer.weight.bnb_quantized


@pytest.mark.parametrize("kind", ["LinearNF4", "Linear8bitLt"])
def test_a_layer_around_a_shared_dense_weight_multiplies_with_it(kind):
    embedding = nn.Embedding(32, 64, dtype=torch.bfloat16)
    head = getattr(bnb.nn, kind)(64, 32, bias=False)
    head.weight = embedding.weight  # as transformers ties them
    x = torch.randn(2, 64)
    assert torch.equal(head(x), nn.functional.linear(x, embedding.weight.float()))
    assert head.state_dict().keys() == {"weight"}


@pytest.mark.parametrize("shape", [(1,), (2,), (64,), (65,), (1, 2), (2, 1), (1, 64), (3, 5, 7)])
def test_a_decoded_tensor_has_the_shape_that_it_had(shape):
    x = torch.randn(shape)
    assert F.dequantize_4bit(*F.quantize_nf4(x)).shape == x.shape


@pytest.mark.parametrize("kind", ["EmbeddingNF4", "Embedding8bit"])
def test_quantized_embeddings_can_be_saved(kind):
    layer = getattr(bnb.nn, kind)(20, 64).to("cpu")
    assert len(layer.state_dict()) > 1


def test_int8_functions_run_on_a_cpu_for_any_rank():
    x = torch.randn(2, 3, 16).half()
    codes, scales, _ = F.int8_vectorwise_quant(x)
    assert (codes.shape, scales.shape) == (x.shape, (6,))
    assert (F.int8_vectorwise_dequant(codes, scales) - x.float()).abs().max() < 0.02
    assert len(F.int8_double_quant(x[0])) == 5


def test_the_constant_of_int8_products_is_exact():
    product = torch.tensor([[127 * 127]], dtype=torch.int32)
    one = torch.ones(1)
    out = torch.empty(1, 1)
    F.int8_mm_dequant(product, one, one, out=out)
    assert out.item() == 1.0


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_values_that_are_not_finite_are_refused(value):
    x = torch.ones(64)
    x[7] = value
    for quantize in (F.quantize_4bit, F.quantize_nf4, F.quantize_blockwise):
        with pytest.raises(nb.FormatError, match="position 7"):
            quantize(x)


def test_an_int8_weight_beyond_float16_is_refused():
    weight = bnb.nn.Int8Params(torch.full((2, 2), 70000.0), requires_grad=False)
    with pytest.raises(nb.FormatError, match="70000"):
        weight.to("cpu")


@pytest.mark.parametrize("kind", ["LinearNF4", "Linear8bitLt"])
def test_a_forward_leaves_the_bias_as_it_is(kind):
    options = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {}
    layer = getattr(bnb.nn, kind)(64, 32, **options).to("cpu").eval()
    bias = layer.bias.detach().clone()
    layer(torch.randn(2, 64, dtype=torch.bfloat16))
    assert same_bits(layer.bias.detach(), bias)


def test_float_weights_of_an_int8_layer_train_with_inputs_of_any_rank():
    layer = bnb.nn.Linear8bitLt(16, 8)
    x = torch.randn(2, 3, 16, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad.shape == (8, 16)
    assert x.grad.shape == x.shape


def test_quantizing_a_copy_leaves_the_original_alone():
    layer = bnb.nn.LinearNF4(64, 64)
    copy.deepcopy(layer).to("cpu")
    assert layer.quant_state is None


def test_codes_that_pose_as_bfloat16_survive_half():
    layer = nf4(quant_storage=torch.bfloat16)
    weight = decoded(layer)
    assert torch.equal(decoded(layer.half()), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_activations_beyond_float16_are_multiplied_right(dtype):
    layer = bnb.nn.Linear8bitLt(64, 8, bias=False, has_fp16_weights=False).to("cpu").eval()
    x = torch.randn(2, 64).to(dtype) * 1e5
    weight = F.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    want = x.float() @ weight.T
    assert (layer(x).float() - want).norm() <= 0.02 * want.norm()


def test_a_moved_state_does_not_strand_the_weight_that_shares_it():
    weight = nf4().weight
    moved = weight.to("cpu")
    assert moved is not weight
    assert moved.quant_state is weight.quant_state
    assert F.dequantize_4bit(weight.data, weight.quant_state).shape == (64, 64)
