"""Saved adapters are ordinary ones: they go onto quantized and dense models."""

from __future__ import annotations

import json

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

import nybble as nb
import nybble.hf
from tiny import RENAMED, adapted, batch, decoded, dense, logits, quantized, stir, train

pytestmark = RENAMED


@pytest.fixture
def saved(tmp_path):
    """A model whose adapter does something, and where the adapter was saved."""
    model = adapted(quantized("nf4_dq", layers=1), use_rslora=True)
    stir(model)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_an_adapter_comes_back_bit_for_bit(saved):
    model, path = saved
    again = nybble.hf.load_adapter(quantized("nf4_dq", layers=1), path)
    assert torch.equal(logits(again), logits(model))
    assert not any(p.requires_grad for p in again.parameters())
    ours, theirs = (peft.get_peft_model_state_dict(m) for m in (again, model))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_made_on_the_meta_device_are_filled(use_dora, tmp_path):
    model = adapted(quantized("nf4", layers=1), use_dora=use_dora)
    stir(model)
    model.save_pretrained(tmp_path)
    again = nybble.hf.load_adapter(quantized("nf4", layers=1), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(again), logits(model))


def test_the_files_are_those_of_any_lora_adapter(saved):
    _, path = saved
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert "nybble" not in json.dumps(config)
    assert {name.split(".")[-1] for name in load_file(path / "adapter_model.safetensors")} == {
        "weight"
    }


def test_peft_alone_loads_it_onto_the_dense_model(saved):
    model, path = saved
    plain = peft.PeftModel.from_pretrained(decoded(quantized("nf4_dq", layers=1)), str(path))
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)
    assert type(plain.base_model.model.model.layers[0].mlp.up_proj).__module__ == (
        "peft.tuners.lora.layer"
    )


def test_an_adapter_of_the_dense_model_goes_onto_a_quantized_one(tmp_path):
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    plain = peft.get_peft_model(dense(layers=1), config)
    stir(plain)
    plain.save_pretrained(tmp_path)
    model = nybble.hf.load_adapter(quantized("int8", layers=1), tmp_path)
    exact, base = logits(plain), logits(dense(layers=1))
    update = (exact - base).norm()
    # int8 is close to the dense model: what is left is small beside what the adapter does.
    assert (logits(model) - exact).norm() < 0.1 * update


def test_training_goes_on(saved):
    _, path = saved
    model = nybble.hf.prepare_for_qlora(quantized("nf4_dq", layers=1))
    model = nybble.hf.load_adapter(model, path, is_trainable=True)
    losses = train(model, batch(), 5)
    assert losses[-1] < losses[0]


def test_a_second_adapter_is_loaded_beside_the_first(saved):
    first, path = saved
    model = adapted(quantized("nf4_dq", layers=1), r=2, target_modules=["q_proj"])
    before = logits(model)
    assert nybble.hf.load_adapter(model, path, adapter_name="second") is model
    assert torch.equal(logits(model), before)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(first))
    with pytest.raises(nb.CheckpointError, match="pass another adapter_name"):
        nybble.hf.load_adapter(model, path, adapter_name="second")


def test_peft_without_help_does_not_know_these_layers(saved):
    with pytest.raises(ValueError, match="is not supported"):
        peft.PeftModel.from_pretrained(quantized("nf4_dq", layers=1), str(saved[1]))


def test_missing_files_are_named(saved, tmp_path):
    model = quantized("nf4_dq", layers=1)
    with pytest.raises(FileNotFoundError, match="no adapter directory"):
        nybble.hf.load_adapter(model, tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"holds a model, not adapter_config\.json"):
        nybble.hf.load_adapter(model, tmp_path)
    (saved[1] / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"none of adapter_model\.safetensors"):
        nybble.hf.load_adapter(model, saved[1])


def test_an_adapter_for_another_model_is_refused_and_changes_nothing(saved):
    _, path = saved
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("q_proj.lora_A.weight"))
    save_file({**tensors, name: torch.zeros(8, 128)}, file)
    model = quantized("nf4_dq", layers=1)
    with pytest.raises(nb.CheckpointError, match=r"shape \[8, 128\], and '.*q_proj' has 256 in"):
        nybble.hf.load_adapter(model, path)
    moved = {key.replace("layers.0", "layers.7"): value for key, value in tensors.items()}
    save_file(moved, file)
    with pytest.raises(nb.CheckpointError, match=r"has no 'model\.layers\.7.*did you mean"):
        nybble.hf.load_adapter(model, path)
    assert not any("lora_" in key for key, _ in model.named_modules())


def test_other_kinds_of_adapters_are_refused(tmp_path):
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    peft.get_peft_model(dense(layers=1), config).save_pretrained(tmp_path)
    with pytest.raises(nb.CheckpointError, match=r"kind .*IA3; only LoRA"):
        nybble.hf.load_adapter(quantized("nf4", layers=1), tmp_path)
