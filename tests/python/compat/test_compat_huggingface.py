"""Code of transformers, peft and accelerate runs on the compat classes.

Their modules refer to bitsandbytes by a global name or import it in a function. Here, and only
inside a test, both lead to the compat package. bitsandbytes must be installed, since these
libraries check for it; it does none of the work.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import nybble.compat.bitsandbytes as bnb
from strategies import same_bits

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
real = pytest.importorskip("bitsandbytes", reason="transformers asks whether it is installed")
tf = pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="runs peft's own code")
accelerate = pytest.importorskip("accelerate", reason="runs accelerate's own code")

GOLDEN = Path(__file__).parents[2] / "golden" / "bnb_checkpoints" / "llama_tied"


def inject(patch: pytest.MonkeyPatch) -> None:
    import peft.import_utils
    import peft.tuners.lora.bnb
    import transformers.integrations.bitsandbytes

    patch.setattr(peft.tuners.lora.bnb, "bnb", bnb)
    patch.setattr(transformers.integrations.bitsandbytes, "bnb", bnb)
    patch.setitem(sys.modules, "bitsandbytes", bnb)


@pytest.fixture
def injected(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # The answers to "is it installed" are kept from here on.
    assert tf.utils.is_bitsandbytes_available()
    assert peft.import_utils.is_bnb_4bit_available()
    assert accelerate.utils.is_bnb_available()
    inject(monkeypatch)
    yield
    monkeypatch.undo()
    assert sys.modules["bitsandbytes"] is real


def layers(model: torch.nn.Module, kind: type[torch.nn.Module]) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def in_float32(model: torch.nn.Module) -> torch.nn.Module:
    """Everything that is not quantized in float32, products too."""
    for parameter in model.parameters():
        if not isinstance(parameter, (bnb.nn.Params4bit, bnb.nn.Int8Params)):
            parameter.data = parameter.data.float()
    for module in layers(model, bnb.nn.Linear4bit).values():
        module.compute_dtype = torch.float32
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.from_numpy(np.load(GOLDEN / "input_ids.npy"))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.usefixtures("injected")
@pytest.mark.parametrize("name", ["nf4_dq", "fp4"])
def test_transformers_loads_a_4bit_checkpoint_into_our_layers(name):
    model = tf.AutoModelForCausalLM.from_pretrained(GOLDEN / name)
    assert len(layers(model, bnb.nn.Linear4bit)) == 14
    want = load_file(GOLDEN / name / "ref_logits.safetensors")["bnb_portable_fp32"]
    got = logits(in_float32(model))
    # float32 sums of up to 704 terms in another order, through two layers.
    assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.usefixtures("injected")
def test_transformers_loads_an_int8_checkpoint_into_our_layers():
    model = tf.AutoModelForCausalLM.from_pretrained(GOLDEN / "int8")
    assert layers(model, bnb.nn.Linear8bitLt)
    reference = load_file(GOLDEN / "int8" / "ref_logits.safetensors")
    decoded = logits(in_float32(model).train())  # training multiplies with the decoded weight
    want = reference["dequant_fp32"]
    assert (decoded - want).norm() <= 1e-5 * want.norm()
    # Activations are quantized too: as far from the truth as bitsandbytes itself, at most.
    error = (logits(model.eval()) - want).norm()
    assert error <= 1.1 * (reference["bnb_fp32"].float() - want).norm()


CONFIGS = {
    "nf4_dq": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "k_proj"]},
}


@pytest.mark.usefixtures("injected")
@pytest.mark.parametrize("name", CONFIGS)
def test_quantizing_on_load_then_using_then_saving_writes_bitsandbytes_bytes(tmp_path, name):
    model = tf.AutoModelForCausalLM.from_pretrained(
        GOLDEN / "original",
        quantization_config=tf.BitsAndBytesConfig(**CONFIGS[name]),
        device_map="cpu",
    )
    logits(model.eval())  # with bitsandbytes this forward damages what is saved
    model.save_pretrained(tmp_path)
    got = load_file(tmp_path / "model.safetensors")
    want = load_file(GOLDEN / name / "model.safetensors")
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        assert same_bits(got[key], tensor), key


@pytest.mark.usefixtures("injected")
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_dequantizes_our_layers_after_a_forward(name):
    model = tf.AutoModelForCausalLM.from_pretrained(GOLDEN / name)
    before = logits(in_float32(model).train())
    dense = model.dequantize()
    assert not layers(dense, bnb.nn.Linear4bit)
    assert not layers(dense, bnb.nn.Linear8bitLt)
    after = logits(dense.float().train())
    # transformers gives the weights back in bfloat16, the dtype of the model.
    assert (after - before).norm() <= 0.02 * before.norm()


def lora_run(kind: str, train_steps: int = 4) -> dict[str, Any]:
    """Losses of a short QLoRA training, and logits before and after merging."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_pretrained(GOLDEN / kind)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0)
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config)
    classes = {type(module).__module__ for module in model.modules()}
    assert "peft.tuners.lora.bnb" in classes
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    ids = torch.from_numpy(np.load(GOLDEN / "input_ids.npy"))
    losses = []
    for _ in range(train_steps):
        loss = model.train()(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    trained = logits(model.train())
    model.merge_adapter()
    merged = logits(model.train())
    model.unmerge_adapter()
    return {"losses": losses, "trained": trained, "merged": merged, "model": model}


@pytest.mark.parametrize("kind", ["nf4_dq", "int8"])
def test_qlora_trains_and_merges_as_with_bitsandbytes(kind):
    theirs = lora_run(kind)
    with pytest.MonkeyPatch.context() as patch:
        inject(patch)
        ours = lora_run(kind)
    assert not any(type(m).__module__.startswith("nybble") for m in theirs["model"].modules())
    assert any(type(m).__module__.startswith("nybble") for m in ours["model"].modules())
    assert theirs["losses"][-1] < theirs["losses"][0]
    # bfloat16 products: each rounding may differ by an ulp, 2^-8.
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=2**-8)
    for name in ("trained", "merged"):
        difference = (ours[name] - theirs[name]).float().norm()
        assert difference <= 0.05 * theirs[name].float().norm(), name


@pytest.mark.usefixtures("injected")
def test_evaluating_before_training_keeps_every_gradient():
    model = tf.AutoModelForCausalLM.from_pretrained(GOLDEN / "nf4_dq")
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    logits(model.eval())
    ids = torch.from_numpy(np.load(GOLDEN / "input_ids.npy"))
    model.train()(ids, labels=ids, use_cache=False).loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(grad is not None for grad in trained.values())
    # B starts at zero, so A's gradient is zero; B's is not, in the first layer too.
    assert all(bool(grad.any()) for name, grad in trained.items() if "lora_B" in name)


@pytest.mark.usefixtures("injected")
def test_pefts_backend_puts_a_weight_back_into_a_4bit_layer():
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")
    model = peft.get_peft_model(
        torch.nn.Sequential(layer), peft.LoraConfig(r=2, target_modules=["0"])
    )
    wrapped = model.base_model.model[0]
    assert wrapped.get_base_layer() is layer
    backend = peft.utils.quantization_utils.Bnb4bitBackend()
    before = copy.deepcopy(layer.state_dict())
    backend.set_base_weight(wrapped, backend.get_base_weight(layer))
    assert type(layer.weight) is bnb.nn.Params4bit
    assert layer.weight.bnb_quantized
    assert layer.quant_state is layer.weight.quant_state
    # Decoded values have the same codes again.
    assert same_bits(layer.state_dict()["weight"], before["weight"])


@pytest.mark.usefixtures("injected")
@pytest.mark.parametrize("bits", [4, 8])
def test_accelerate_replaces_layers_with_ours(bits):
    from accelerate.utils import BnbQuantizationConfig
    from accelerate.utils.bnb import has_4bit_bnb_layers, replace_with_bnb_layers

    model = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.Linear(48, 8))
    source = copy.deepcopy(model)
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = BnbQuantizationConfig(**(options if bits == 4 else {"load_in_8bit": True}))
    model = replace_with_bnb_layers(model, config).to("cpu").eval()
    assert has_4bit_bnb_layers(model) == (bits == 4)
    kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    assert len(layers(model, kind)) == 2
    x = torch.randn(5, 64)
    with torch.no_grad():
        got, want = model(x), source(x)
    # Two layers of nf4 noise, about 20 dB each for weights of a uniform distribution.
    assert (got - want).norm() <= (0.2 if bits == 4 else 0.05) * want.norm()


@pytest.mark.usefixtures("injected")
def test_accelerate_moves_a_tensor_into_a_4bit_layer():
    from accelerate.utils import set_module_tensor_to_device

    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4")
    value = torch.randn(32, 64)
    set_module_tensor_to_device(layer, "weight", "cpu", value=value)
    want, _ = bnb.functional.quantize_4bit(value, quant_type="nf4", compress_statistics=True)
    assert same_bits(layer.weight.data, want)
    assert layer(torch.randn(2, 64)).shape == (2, 32)
