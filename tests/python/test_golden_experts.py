"""The mixture of experts that bitsandbytes' checkpoints hold: loaded, quantized, written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nybble as nb
from nybble.nn import Experts4bit, Experts8bit

transformers = pytest.importorskip("transformers", minversion="5.0")
np = pytest.importorskip("numpy")

GOLDEN = Path(__file__).parents[1] / "golden" / "bnb_checkpoints" / "mixtral"
LEGACY = GOLDEN / "nf4_dq_legacy_experts"


def empty_model(device="cpu", dtype=torch.float32):
    config = transformers.AutoConfig.from_pretrained(GOLDEN / "original")
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def logits_of(model):
    ids = torch.from_numpy(np.load(GOLDEN / "input_ids.npy")).long()
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def distance(got, want):
    return float((got - want).norm() / want.norm())


def golden_logits(kind, name="dequant_fp32"):
    return load_file(GOLDEN / kind / "ref_logits.safetensors")[name]


@pytest.mark.parametrize("kind", ["nf4_dq", "int8", "nf4_dq_legacy_experts"])
def test_logits_are_those_of_the_decoded_weights(kind):
    model = nb.load_model(empty_model(), GOLDEN / kind)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, Experts4bit) == (kind == "nf4_dq_legacy_experts")
    assert distance(logits_of(model), golden_logits(kind)) <= 1e-5


def test_dense_experts_one_by_one_fill_the_fused_parameters_of_any_model():
    tensors = load_file(GOLDEN / "original" / "model.safetensors")
    on_meta = nb.load_model(empty_model("meta"), GOLDEN / "original")
    in_memory = nb.load_model(empty_model(), GOLDEN / "original")
    for model, dtype in ((on_meta, torch.bfloat16), (in_memory, torch.float32)):
        experts = model.model.layers[1].mlp.experts
        assert type(experts).__name__ == "MixtralExperts"
        assert experts.gate_up_proj.dtype == dtype
        name = "model.layers.1.block_sparse_moe.experts.2.{}.weight"
        want = torch.cat([tensors[name.format("w1")], tensors[name.format("w3")]])
        assert torch.equal(experts.gate_up_proj[2], want.to(dtype))
        assert torch.equal(experts.down_proj[2], tensors[name.format("w2")].to(dtype))
        assert experts.down_proj.requires_grad


def test_quantizing_the_model_gives_the_bytes_of_the_file():
    model = nb.load_model(empty_model("meta"), GOLDEN / "original")
    nb.quantize_model(model, "nf4", nested=True, reference="bitsandbytes-cpu")
    ours = {
        name.replace(".mlp.", ".block_sparse_moe."): value
        for name, value in model.state_dict().items()
    }
    theirs = load_file(LEGACY / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_quantizing_the_checkpoint_gives_the_bytes_of_the_file(tmp_path):
    report = nb.quantize_checkpoint(
        GOLDEN / "original",
        tmp_path / "out",
        "nf4",
        nested=True,
        reference="bitsandbytes-cpu",
        experts=True,
    )
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = load_file(LEGACY / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert sum(".experts." in row.name for row in report.tensors if row.kept is None) == 24
    model = nb.load_model(empty_model(), tmp_path / "out")
    assert distance(logits_of(model), golden_logits("nf4_dq_legacy_experts")) <= 1e-5


@pytest.mark.parametrize(
    ("format", "nested", "theirs"),
    [("nf4", True, "nf4_dq_legacy_experts"), ("int8", False, "int8")],
)
def test_logits_are_as_near_to_the_original_as_those_of_bitsandbytes(format, nested, theirs):
    model = nb.load_model(empty_model(), GOLDEN / "original")
    nb.quantize_model(model, format, nested=nested)
    original = golden_logits("original", "fp32")
    # bitsandbytes left the experts of the int8 model dense. A router that chooses another expert
    # makes most of the distance, in both; a tenth is room for codes that were rounded otherwise.
    assert distance(logits_of(model), original) <= 1.1 * distance(golden_logits(theirs), original)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_memory_is_what_the_bits_say(format):
    model = nb.load_model(empty_model("meta"), GOLDEN / "original")
    before = sum(p.nbytes for p in model.parameters())
    coverage = nb.quantize_model(model, format)
    assert isinstance(model.model.layers[0].mlp.experts, (Experts4bit, Experts8bit))
    held = sum(p.nbytes for p in model.parameters()) + sum(
        buffer.nbytes for name, buffer in model.named_buffers() if "rotary" not in name
    )
    assert (coverage.bytes_before, coverage.bytes_after) == (before, held)
    elements = sum(torch.Size(row.shape).numel() for row in coverage.quantized)
    experts = 2 * 4 * 3 * 128 * 192  # layers, experts, projections, their sizes
    attention = 2 * (2 * 128 * 128 + 2 * 128 * 64)
    assert elements == experts + attention
    rows = 2 * (4 * (2 * 192 + 128) + 2 * 128 + 2 * 64)
    size = {"nf4": elements * 4.5 / 8, "int8": elements + 4 * rows}[format]
    assert held == size + sum(row.bytes_after for row in coverage.kept)
    kept = {row.name for row in coverage.kept if len(row.shape) > 1}
    assert kept == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.1.mlp.gate.weight",
    }


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_saved_model_loads_again(tmp_path, device):
    model = nb.load_model(empty_model(), LEGACY)
    nb.save_model(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "bitsandbytes"
    again = nb.load_model(empty_model(device), tmp_path)
    want, got = model.state_dict(), again.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    quantized = empty_model()
    nb.quantize_model(quantized, "fp4")  # other settings: the file decides
    nb.load_model(quantized, tmp_path)
    assert all(torch.equal(quantized.state_dict()[name], want[name]) for name in want)


def test_a_model_whose_experts_differ_round_trips(tmp_path):
    model = nb.load_model(empty_model(), GOLDEN / "original")
    nb.quantize_model(
        model,
        overrides={"*.experts.0.w1": "bf16", "*.experts.1.w2": "int8"},
        skip=["lm_head", "model.layers.1.mlp.experts"],
    )
    nb.save_model(model, tmp_path)
    again = nb.load_model(empty_model(), tmp_path)
    assert type(again.model.layers[1].mlp.experts).__name__ == "MixtralExperts"
    layer = again.model.layers[0].mlp.experts.get_submodule("0.w1")
    assert layer.weight.untyped_storage().nbytes() == layer.weight.nbytes  # lets go of the rest
    assert torch.equal(logits_of(again), logits_of(model))


def test_dequantizing_the_checkpoint_gives_one_that_transformers_loads(tmp_path):
    nb.dequantize_checkpoint(LEGACY, tmp_path / "dense", "fp32")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype=torch.float32
    )
    assert distance(logits_of(model.eval()), golden_logits("nf4_dq_legacy_experts")) <= 1e-5


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path):
    tensors = load_file(LEGACY / "model.safetensors")
    short = {name: t for name, t in tensors.items() if ".experts.3.w2." not in name}
    from safetensors.torch import save_file

    save_file(short, tmp_path / "model.safetensors")
    model = empty_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(nb.CheckpointError, match=r"mlp\.experts\.3\.w2\.weight' is missing"):
        nb.load_model(model, tmp_path)
    assert type(model.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
