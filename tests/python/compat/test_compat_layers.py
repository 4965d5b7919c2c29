"""Layers and parameters of the compat package: moving, copying, saving, training, compiling."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import nybble as nb
import nybble.compat.bitsandbytes as bnb
from strategies import FLOATS, assert_product, dtypes, matrices, same_bits, seeds

GOLDEN = Path(__file__).parents[2] / "golden" / "bnb_checkpoints" / "llama_tied"
STORAGES = [torch.uint8, *FLOATS]


def as_qtensor(layer: nn.Module) -> nb.QTensor:
    """What a 4-bit layer saves, read by nybble itself."""
    return nb.QTensor.from_state_dict(layer.state_dict(), "weight")


def assert_same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert same_bits(a[name], b[name]), name


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


four_bit = st.fixed_dictionaries(
    {
        "quant_type": st.sampled_from(["nf4", "fp4"]),
        "compress_statistics": st.booleans(),
        "bias": st.booleans(),
    }
)


@given(four_bit, matrices, dtypes, seeds)
def test_a_4bit_layer_multiplies_with_its_decoded_weight(how, shape, dtype, seed):
    torch.manual_seed(seed)
    layer = bnb.nn.Linear4bit(shape[1], shape[0], compute_dtype=dtype, **how).to("cpu")
    x = torch.randn(2, 3, shape[1]).to(dtype)
    bias = None if layer.bias is None else layer.bias.detach()
    for mode in (layer.train(), layer.eval()):
        assert_product(mode(x).detach(), x, as_qtensor(layer), bias)


@given(four_bit, matrices, dtypes, seeds)
def test_a_4bit_state_dict_survives_forward_backward_and_loading(how, shape, dtype, seed):
    torch.manual_seed(seed)
    layer = bnb.nn.Linear4bit(shape[1], shape[0], **how).to("cpu")
    before = snapshot(layer)
    x = torch.randn(4, shape[1]).to(dtype).requires_grad_()
    layer.eval()(x.detach())
    layer.train()(x).sum().backward()
    assert x.grad is not None
    assert_same_state(before, snapshot(layer))
    for fresh in (
        bnb.nn.Linear4bit(shape[1], shape[0], **how),
        bnb.nn.Linear4bit(shape[1], shape[0], bias=how["bias"]).to("cpu"),
    ):
        fresh.load_state_dict(before)
        assert_same_state(before, snapshot(fresh))
        assert torch.equal(fresh(x), layer(x))
        assert fresh.quant_state is fresh.weight.quant_state


def test_a_dense_weight_is_quantized_when_it_is_loaded_into_a_quantized_layer():
    dense = nn.Linear(64, 16)
    layer = bnb.nn.LinearNF4(64, 16).to("cpu")
    layer.load_state_dict(dense.state_dict())
    want, _ = bnb.functional.quantize_nf4(dense.weight.detach(), compress_statistics=True)
    assert same_bits(layer.weight.data, want)


def test_loading_says_what_is_wrong():
    layer = bnb.nn.LinearNF4(64, 16, bias=False).to("cpu")
    other = bnb.nn.LinearNF4(64, 8, bias=False).to("cpu")
    with pytest.raises(RuntimeError, match=r"shape \(8, 64\), this layer stores \(16, 64\)"):
        layer.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="without scales"):
        layer.load_state_dict({"weight": layer.weight.data})
    int8 = bnb.nn.Linear8bitLt(64, 16, bias=False, has_fp16_weights=False).to("cpu")
    state = int8.state_dict()
    with pytest.raises(RuntimeError, match="col_turing"):
        int8.load_state_dict({**state, "weight_format": torch.tensor(2, dtype=torch.uint8)})
    with pytest.raises(RuntimeError, match="needs 16 scales in SCB, found 3"):
        int8.load_state_dict({**state, "SCB": torch.ones(3)})


def test_a_layer_on_the_meta_device_loads_with_assign():
    saved = bnb.nn.LinearNF4(64, 16, bias=False).to("cpu")
    with torch.device("meta"):
        empty = bnb.nn.LinearNF4(64, 16, bias=False)
    with pytest.raises(RuntimeError, match="assign=True"):
        empty.load_state_dict(saved.state_dict())
    empty.load_state_dict(saved.state_dict(), assign=True)
    x = torch.randn(2, 64)
    assert torch.equal(empty(x), saved(x))


@pytest.mark.parametrize("name", ["nf4_dq", "fp4", "int8"])
def test_layers_load_files_of_bitsandbytes_and_write_the_same_back(tmp_path, name):
    tensors = load_file(GOLDEN / name / "model.safetensors")
    prefix = "model.layers.1.mlp.down_proj."
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    shape = load_file(GOLDEN / "original" / "model.safetensors")[prefix + "weight"].shape
    if name == "int8":
        layer = bnb.nn.Linear8bitLt(shape[1], shape[0], bias="bias" in state)
    else:
        layer = bnb.nn.Linear4bit(shape[1], shape[0], bias="bias" in state)
    layer.load_state_dict(state, assign=True)
    layer.eval()(torch.randn(3, shape[1], dtype=torch.bfloat16))
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    assert_same_state(load_file(tmp_path / "layer.safetensors"), state)


@pytest.mark.parametrize("storage", STORAGES)
def test_no_cast_touches_codes_that_pose_as_floats(storage):
    layer = bnb.nn.LinearNF4(64, 32, quant_storage=storage).to("cpu")
    codes = layer.weight.data.view(torch.uint8).clone()
    for cast in (
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.float(),
        lambda m: m.double(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.bfloat16),
    ):
        layer = cast(layer)
        assert layer.weight.dtype == storage
        assert torch.equal(layer.weight.data.view(torch.uint8), codes)
        assert layer.weight.quant_state.absmax.dtype == torch.uint8
    assert layer.bias.dtype == torch.bfloat16


def copies(module: nn.Module) -> dict[str, nn.Module]:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return {
        "deepcopy": copy.deepcopy(module),
        "pickle": pickle.loads(pickle.dumps(module)),
        "torch.save": torch.load(buffer, weights_only=False),
    }


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: bnb.nn.LinearNF4(64, 32),
        lambda: bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False),
        lambda: bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=True),
    ],
    ids=["nf4", "int8", "fp16"],
)
def test_copies_are_whole_and_independent(make, quantized):
    layer = make().to("cpu") if quantized else make()
    x = torch.randn(2, 64)
    for how, twin in copies(layer).items():
        assert type(twin.weight) is type(layer.weight), how
        assert vars(twin.weight).keys() == vars(layer.weight).keys(), how
        assert twin.weight.data_ptr() != layer.weight.data_ptr(), how
        if isinstance(twin, bnb.nn.Linear4bit):
            assert twin.weight.module is twin, how
        twin.to("cpu")
        assert_same_state(twin.state_dict(), copy.deepcopy(layer).to("cpu").state_dict())
        assert torch.equal(twin(x), copy.deepcopy(layer).to("cpu")(x)), how


def test_a_weight_is_copied_pickled_and_split_with_its_state():
    weight = bnb.nn.LinearNF4(64, 32).to("cpu").weight
    for twin in (copy.copy(weight), copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert type(twin) is bnb.nn.Params4bit
        assert twin.quant_state == weight.quant_state
        assert same_bits(twin.data, weight.data)
    assert copy.deepcopy(weight).quant_state is not weight.quant_state
    for piece in (*torch.chunk(weight, 2), *torch.split(weight, 512)):
        assert type(piece) is bnb.nn.Params4bit
        assert piece.quant_state is weight.quant_state
    assert type(weight + 0) is torch.Tensor


def test_a_weight_shows_its_state_under_the_names_of_files():
    layer = bnb.nn.LinearNF4(64, 32)
    assert not hasattr(layer.weight, "absmax")
    layer.to("cpu")
    state = layer.weight.quant_state
    for key, value in layer.state_dict().items():
        name = key.removeprefix("weight.").partition(".")[0]
        if key.startswith("weight.") and name != "quant_state":
            assert same_bits(getattr(layer.weight, name), value)
    assert layer.weight.nested_blocksize == 256
    assert layer.weight.nested_dtype == torch.float32
    assert layer.weight.nested_offset is layer.weight.offset is state.offset
    text = state.bitsandbytes__nf4
    assert same_bits(text, layer.state_dict()["weight.quant_state.bitsandbytes__nf4"])
    plain = bnb.nn.LinearNF4(64, 32, compress_statistics=False).to("cpu")
    assert not hasattr(plain.weight, "nested_absmax")


def test_attributes_can_be_splatted_back_into_the_constructors():
    weight = bnb.nn.LinearNF4(64, 32).weight
    value = torch.randn(32, 64)
    made = bnb.nn.Params4bit(value, requires_grad=False, **weight.__dict__).to("cpu")
    assert same_bits(made.data, bnb.functional.quantize_nf4(value)[0])
    settings = {**made.__dict__, "bnb_quantized": False}
    again = bnb.nn.Params4bit(value * 2, **settings).to("cpu")
    assert same_bits(again.data, made.data)
    assert again.quant_state != made.quant_state
    int8 = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).weight
    made8 = bnb.nn.Int8Params(value, requires_grad=False, **int8.__dict__).to("cpu")
    moved = bnb.nn.Int8Params(made8.data, requires_grad=False, **made8.__dict__).to("cpu")
    assert same_bits(moved.SCB, made8.SCB)
    assert moved.CB.data_ptr() == moved.data_ptr()


def test_from_prequantized_takes_the_entries_of_a_file():
    layer = bnb.nn.LinearNF4(64, 32, bias=False).to("cpu")
    entries = {k: v for k, v in layer.state_dict().items() if k != "weight"}
    before = set(entries)
    other = bnb.nn.LinearNF4(64, 32, bias=False)
    weight = bnb.nn.Params4bit.from_prequantized(
        layer.weight.data, entries, device="cpu", module=other
    )
    assert set(entries) == before  # bitsandbytes takes the caller's dict apart
    assert weight.quant_state == layer.quant_state
    assert weight.quant_state is other.quant_state
    assert (weight.quant_type, weight.blocksize, weight.bnb_quantized) == ("nf4", 64, True)
    if not torch.cuda.is_available():
        with pytest.raises(nb.DeviceError, match="device='cpu'"):
            bnb.nn.Params4bit.from_prequantized(layer.weight.data, entries)


def test_a_layer_gets_a_lost_state_back():
    layer = bnb.nn.LinearNF4(64, 32).to("cpu")
    x = torch.randn(2, 64)
    want = layer(x)
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)  # as FSDP does
    assert torch.equal(layer(x), want)
    assert type(layer.weight) is bnb.nn.Params4bit


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threshold", [0.0, 4.0])
def test_an_int8_layer_is_near_its_dense_layer_and_trains_through(dtype, threshold):
    dense = nn.Linear(96, 40, dtype=dtype)
    layer = bnb.nn.Linear8bitLt(96, 40, has_fp16_weights=False, threshold=threshold)
    layer.load_state_dict(dense.state_dict())
    layer.to("cpu")
    x = torch.randn(5, 7, 96).to(dtype)
    x[..., 3] *= 20
    want = dense(x).detach().double()
    for mode in (layer.train(), layer.eval()):
        y = x.clone().requires_grad_()
        got = mode(y)
        assert got.dtype == dtype
        assert (got.double() - want).norm() <= 0.05 * want.norm()
        got.float().square().sum().backward()
        assert y.grad.shape == y.shape
        assert bool(y.grad.any())
    if threshold:  # the column of outliers is multiplied in full precision
        plain = copy.deepcopy(layer)
        plain.state.threshold = 0.0
        errors = [(m(x).double() - want).norm() for m in (layer.eval(), plain.eval())]
        assert errors[0] < errors[1]


def test_an_int8_layer_keeps_codes_and_scales_in_its_state():
    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False, threshold=6.0).to("cpu")
    x = torch.randn(2, 64)
    before = layer.eval()(x)
    state = layer.state
    assert (state.threshold, state.has_fp16_weights, state.is_training) == (6.0, False, False)
    assert state.CB.data_ptr() == layer.weight.data_ptr()
    assert same_bits(state.SCB, layer.weight.SCB)
    assert state.idx.tolist() == []
    x[1, 7], x[0, 40] = 50.0, -6.0
    before = layer(x)
    assert state.idx.tolist() == [7, 40]
    with pytest.warns(FutureWarning, match="CxB is always None"):
        assert state.CxB is None
    state.reset_grads()
    assert state.CB is state.SCB is None
    assert torch.equal(layer(x), before)


def test_the_state_of_an_int8_layer_is_copied_and_follows_what_is_loaded():
    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False, threshold=6.0).to("cpu").eval()
    assert layer.state.CB is None
    twin = copy.deepcopy(layer)
    assert twin.state == layer.state
    x = torch.randn(2, 64)
    layer(x)
    assert twin.state != layer.state
    twin(x)
    assert twin.state == layer.state
    assert twin.state.CB is not layer.state.CB
    other = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu")
    layer.load_state_dict(other.state_dict())
    assert same_bits(layer.state.SCB, other.weight.SCB)
    assert same_bits(layer.state.CB, other.weight.data)


def test_a_layer_made_for_float_weights_takes_int8_ones():
    saved = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu").eval()
    layer = bnb.nn.Linear8bitLt(64, 32).eval()
    layer.load_state_dict(saved.state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(layer(x), saved(x))
    assert not layer.weight.requires_grad
    assert not layer.state.has_fp16_weights


def test_float_weights_of_an_int8_layer_train():
    layer = bnb.nn.Linear8bitLt(16, 8)
    assert layer.weight.requires_grad
    target, x = torch.randn(64, 8), torch.randn(64, 16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    decoded = bnb.functional.int8_vectorwise_dequant(
        *bnb.functional.int8_vectorwise_quant(layer.weight)[:2]
    )
    # The codes follow the weight, also in eval mode right after a step.
    layer.eval()(x)
    state = layer.state
    assert same_bits(bnb.functional.int8_vectorwise_dequant(state.CB, state.SCB), decoded)


def embeddings() -> list[nn.Module]:
    return [
        bnb.nn.EmbeddingNF4(50, 64),
        bnb.nn.EmbeddingFP4(50, 48, dtype=torch.bfloat16, quant_storage=torch.float32),
        bnb.nn.Embedding4bit(50, 33, quant_storage=torch.uint8),
        bnb.nn.Embedding8bit(50, 33),
    ]


@pytest.mark.parametrize("index", range(4))
def test_an_embedding_decodes_rows_saves_and_loads(index):
    layer, twin = embeddings()[index], embeddings()[index]
    ids = torch.tensor([[0, 49, 3], [3, 3, 7]])
    q = layer.to("cpu").state_dict()
    rows = layer(ids)
    assert rows.dtype == layer.dtype
    table = nb.QTensor.from_state_dict(q, "weight").dequantize(torch.float32)
    assert same_bits(rows, table[ids].to(layer.dtype))
    twin.load_state_dict(q)
    assert same_bits(twin(ids), rows)
    with pytest.raises(IndexError):
        layer(torch.tensor([50]))


def test_a_stable_embedding_norms_rows_in_full_precision():
    layer = bnb.nn.StableEmbedding(10, 16, padding_idx=2, dtype=torch.bfloat16)
    assert not layer.weight[2].any()
    rows = layer(torch.tensor([1, 5]))
    assert rows.dtype == torch.bfloat16
    want = nn.functional.layer_norm(layer.weight[[1, 5]].float(), (16,)).bfloat16()
    assert torch.equal(rows, want)
    assert type(bnb.nn.Embedding(10, 16)(torch.tensor([1]))) is torch.Tensor


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 16, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.up is self.up  # decoded once in a forward pass
        return torch.einsum("bi,eoi->beo", x, self.up)


@pytest.mark.parametrize("nested", [False, True])
def test_any_parameter_can_be_kept_in_4_bits(nested):
    module = Experts()
    dense = module.up.detach().clone()
    bnb.nn.parametrize.replace_parameter_4bit(module, "up", compress_statistics=nested)
    q = nb.quantize(dense, "nf4", nested=nested, reference="bitsandbytes-cpu")
    assert torch.equal(module.up, q.dequantize())
    state = module.state_dict()
    assert_same_state(state, q.state_dict("up"))
    x = torch.randn(2, 64)
    assert module(x).shape == (2, 3, 16)
    twin = Experts()
    bnb.nn.parametrize.replace_parameter_4bit(twin, "up", compress_statistics=not nested)
    twin.load_state_dict(state)
    assert torch.equal(twin(x), module(x))
    other = Experts()
    other.up = nn.Parameter(state.pop("up"), requires_grad=False)
    companions = {key.removeprefix("up."): value for key, value in state.items()}
    bnb.nn.parametrize.replace_parameter_4bit_prequantized(other, "up", companions, "cpu")
    assert torch.equal(other.up, module.up)


def test_replacing_a_parameter_needs_one():
    module = Experts()
    with pytest.raises(AttributeError, match=r"no parameter 'down'; it has \['up'\]"):
        bnb.nn.parametrize.replace_parameter_4bit(module, "down")
    with pytest.raises(TypeError, match="not a parameter"):
        bnb.nn.parametrize.replace_parameter_4bit(module, "training")


def test_a_failed_forward_leaves_no_decoded_parameter_behind():
    module = Experts()
    bnb.nn.parametrize.replace_parameter_4bit(module, "up")
    with pytest.raises(RuntimeError):
        module(torch.randn(2, 63))
    assert torch.nn.utils.parametrize._cache_enabled == 0
    assert not torch.nn.utils.parametrize._cache


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_4bit_layer_compiles_to_one_graph_and_trains(nested, storage):
    torch._dynamo.reset()
    layer = bnb.nn.LinearNF4(64, 32, compress_statistics=nested, quant_storage=storage).to("cpu")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 64, requires_grad=True)
    for mode in (layer.eval(), layer.train()):
        want = mode(x)
        got = compiled(x)
        assert torch.equal(got, want)
    got.sum().backward()
    assert x.grad is not None


def test_an_int8_layer_compiles_to_one_graph():
    torch._dynamo.reset()
    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False, threshold=6.0).to("cpu").eval()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 64)
    assert torch.equal(compiled(x), layer(x))
