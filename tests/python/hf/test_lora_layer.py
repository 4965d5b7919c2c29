"""The LoRA layer does on a quantized layer what PEFT's does on the decoded one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import nybble as nb
import nybble.hf
from nybble.nn.linear import linear_class
from strategies import SPEC
from tiny import KINDS, RENAMED, adapted, batch, codes, decoded, dense, logits, quantized, stir

pytestmark = RENAMED
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["k_proj", "down_proj"]}


def pair(kind="nf4_dq", **options):
    """An adapter with weights on the quantized model, and the same on the decoded model."""
    options = {**LORA, **options}
    model = adapted(quantized(kind, layers=1), **options)
    stir(model)
    config = peft.LoraConfig(**options, task_type="CAUSAL_LM")
    twin = peft.get_peft_model(decoded(quantized(kind, layers=1)), config)
    peft.set_peft_model_state_dict(twin, peft.get_peft_model_state_dict(model))
    return model, twin.eval()


def gradients(model):
    model(input_ids=batch(), labels=batch(), use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close(a, b, rel=1e-5):
    return float((a - b).norm()) <= rel * float(b.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_peft_on_the_decoded_model(kind):
    model, twin = pair(kind)
    assert close(logits(model), logits(twin))
    ours, theirs = gradients(model), gradients(twin)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 4
    for name in ours:
        assert close(ours[name], theirs[name], 1e-4), name


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"use_dora": True, "lora_dropout": 0.3},
        {"lora_bias": True, "target_modules": ["k_proj"]},
        {"bias": "lora_only", "target_modules": ["k_proj"]},
        {"bias": "all", "target_modules": ["k_proj"]},
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 5}},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed but the targeted layer")
@pytest.mark.filterwarnings("ignore:.*have invalid shape")  # peft takes a bias for a matrix
def test_options_of_lora_mean_what_they_mean_to_peft(options):
    model, twin = pair(**options)
    assert close(logits(model), logits(twin))
    model.train(), twin.train()
    torch.manual_seed(5)
    ours = gradients(model)
    torch.manual_seed(5)
    theirs = gradients(twin)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert close(ours[name], theirs[name], 1e-4), name


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_fresh_adapter_changes_nothing(use_dora):
    plain = quantized("nf4", layers=1)
    expected = logits(plain)
    assert close(logits(adapted(plain, use_dora=use_dora)), expected, 1e-6)


def test_a_row_of_zeros_stays_a_number_under_dora():
    linear = nn.Linear(64, 4)
    with torch.no_grad():
        linear.weight[1] = 0
    model = nn.Sequential(linear)
    nb.quantize_model(model)
    model = adapted(model, use_dora=True)
    x = torch.randn(3, 64, requires_grad=True)
    assert torch.equal(model(x)[:, 1], linear.bias[1].expand(3))
    stir(model)
    model(x).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)


def test_dropout_acts_in_training_only():
    model = adapted(quantized("nf4", layers=1), lora_dropout=0.5)
    stir(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 256)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))


def two_adapters():
    model = adapted(quantized("nf4", layers=1), **LORA)
    model.add_adapter("other", nybble.hf.lora_config(model, **{**LORA, "r": 2}))
    stir(model)
    return model.eval()


def test_adapters_are_chosen_combined_and_disabled():
    model = two_adapters()
    model.set_adapter("default")
    first = logits(model)
    model.set_adapter("other")
    second = logits(model)
    assert not close(first, second, 1e-2)
    with model.disable_adapter():
        base = logits(model)
    assert torch.equal(base, logits(quantized("nf4", layers=1)))
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model.model.layers[0].self_attn.k_proj
    x = torch.randn(2, 256)
    total = layer.base_layer(x)
    for name, scaling in (("default", 2.0), ("other", 4.0)):
        total = total + layer.lora_B[name](layer.lora_A[name](x)) * scaling
    torch.testing.assert_close(layer(x), total)
    model.delete_adapter("other")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_each_row_of_a_batch_goes_through_its_own_adapter():
    model = two_adapters()
    names = ["other", "__base__", "default", "other"]
    with torch.no_grad():
        mixed = model(input_ids=batch(), use_cache=False, adapter_names=names).logits
    with model.disable_adapter():
        apart = {"__base__": logits(model)}
    for name in ("default", "other"):
        model.set_adapter(name)
        apart[name] = logits(model)
    for row, name in enumerate(names):
        assert close(mixed[row], apart[name][row]), name
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(input_ids=batch(), adapter_names=["default"])


@pytest.mark.parametrize("compute", [None, torch.float16])
def test_adapters_are_float32_unless_the_dtype_of_the_base_is_asked_for(compute):
    for cast, expected in ((True, torch.float32), (False, compute or torch.bfloat16)):
        model = dense(torch.bfloat16, layers=1)
        nb.quantize_model(model, "nf4", compute_dtype=compute)
        model = peft.get_peft_model(
            model, nybble.hf.lora_config(model, **LORA), autocast_adapter_dtype=cast
        )
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {expected}
        assert model(input_ids=batch(), use_cache=False).logits.dtype == torch.bfloat16


class TinyGPT2(nn.Module):
    """Two layers as GPT-2 has them: weights are [in, out]."""

    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.c_fc, self.c_proj = Conv1D(96, 64), Conv1D(64, 96)

    def forward(self, x):
        return self.c_proj(torch.nn.functional.gelu(self.c_fc(x)))


def test_layers_made_from_conv1d_take_adapters_and_save_them_for_the_dense_model(tmp_path):
    torch.manual_seed(0)
    model = TinyGPT2()
    nb.quantize_model(model, "int8")
    plain = nb.dequantize_model(copy.deepcopy(model))
    config = nybble.hf.lora_config(model, r=4)
    assert config.fan_in_fan_out  # so that PEFT does not warn on the dense model
    model = peft.get_peft_model(model, config)
    stir(model)
    model.save_pretrained(tmp_path)
    twin = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    x = torch.randn(5, 64)
    torch.testing.assert_close(model(x), twin(x))
    merged = nybble.hf.merge(model, to="fp32")
    torch.testing.assert_close(merged(x), twin(x))
    assert type(merged.c_fc).__name__ == "Conv1D"


@pytest.mark.parametrize("format", SPEC)
def test_every_format_takes_an_adapter(format):
    linear = nn.Linear(64, 32)
    with torch.no_grad():
        linear.weight.abs_()  # one of the formats has no sign
    model = nn.Sequential(linear_class(SPEC[format]["bits"]).from_linear(linear, format))
    before = codes(model)
    model = peft.get_peft_model(model, nybble.hf.lora_config(model, r=2))
    stir(model)
    x = torch.randn(3, 64, requires_grad=True)
    model(x).sum().backward()
    layer = model.base_model.model[0]
    weight = layer.base_layer.dequantize() + layer.get_delta_weight("default")
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 64))
    assert next(iter(codes(model).values())).equal(before["0.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, "'pissa' needs or rewrites the dense weight"),
        ({"init_lora_weights": "olora"}, "quantized; use one of True"),
        ({"init_lora_weights": "orthogonal"}, "start the adapter on the dense model"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens does not work"),
        ({"use_qalora": True}, "use_qalora does not work on quantized layers"),
    ],
    ids=str,
)
def test_what_quantized_layers_cannot_follow_is_refused_before_anything_changes(options, message):
    model = quantized("nf4", layers=1)
    with pytest.raises(nb.FormatError, match=message):
        nybble.hf.lora_config(model, **options)
    config = nybble.hf.lora_config(model)
    for name, value in options.items():
        setattr(config, name, value)
    with pytest.raises(nb.FormatError, match=message):
        peft.get_peft_model(model, config)
    assert not any("lora_" in name for name, _ in model.named_modules())


def test_a_config_that_does_not_know_these_layers_fails_with_pefts_message():
    model = quantized("nf4", layers=1)
    with pytest.raises(ValueError, match="is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
