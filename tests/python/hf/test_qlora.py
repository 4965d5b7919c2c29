"""QLoRA on quantized models, against runs with bitsandbytes."""

from __future__ import annotations

import json

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import nybble as nb
import nybble.hf
from nybble.nn.linear import QuantizedLinear
from strategies import same_bits
from tiny import (
    GOLDEN,
    KINDS,
    LLAMA,
    RENAMED,
    adapted,
    batch,
    codes,
    dense,
    logits,
    loss,
    quantized,
    train,
)

pytestmark = RENAMED
REFERENCE = json.loads((GOLDEN / "qlora" / "losses.json").read_text())
RUNS = [key for key in REFERENCE if key != "versions"]


def held(model):
    """Quantized tensors in the order of the model: adapters change the names."""
    return list(codes(model).values())


def assert_same_bits(before, after):
    assert len(before) == len(after) > 0
    assert all(same_bits(a, b) for a, b in zip(before, after, strict=True))


def test_the_models_here_hold_the_bytes_of_bitsandbytes_checkpoints():
    theirs = dense()
    nb.load_model(theirs, LLAMA / "nf4_dq")
    ours = quantized("nf4_dq")
    assert_same_bits(held(theirs), held(ours))


@pytest.mark.parametrize("run", RUNS)
def test_twenty_steps_end_where_bitsandbytes_ends(run):
    # The products differ in rounding only (bitsandbytes computes its 8-bit ones with quantized
    # activations): losses part by less than 2 % here. 5 % is what is promised.
    kind, dtype = run.split("/")
    reference = REFERENCE[run]
    model = nybble.hf.prepare_for_qlora(quantized(kind, getattr(torch, dtype)))
    before = held(model)
    model = adapted(model)
    assert model.base_model.model.is_activation_checkpointing
    losses = train(model, batch(), len(reference["losses"]))
    assert losses[0] == pytest.approx(reference["losses"][0], rel=0.002)
    assert losses[-1] == pytest.approx(reference["losses"][-1], rel=0.05)
    assert loss(model) == pytest.approx(reference["eval_loss"], rel=0.05)
    assert_same_bits(before, held(model))


@pytest.mark.parametrize("kind", ["int4", "fp4"])
def test_formats_without_a_reference_learn_as_much(kind):
    model = adapted(nybble.hf.prepare_for_qlora(quantized(kind)))
    before = held(model)
    losses = train(model, batch(), 20)
    assert losses[-1] == pytest.approx(REFERENCE["nf4/float32"]["losses"][-1], rel=0.2)
    assert_same_bits(before, held(model))


def test_a_model_that_stays_in_bfloat16_trains_float32_adapters():
    model = nybble.hf.prepare_for_qlora(quantized("nf4_dq", torch.bfloat16), dtype=None)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.uint8}
    model = adapted(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = train(model, batch(), 20)
    assert losses[-1] < 0.02 * losses[0]


def test_gradients_flow_after_an_eval_forward():
    model = adapted(nybble.hf.prepare_for_qlora(quantized("nf4")))
    model.eval()
    logits(model)
    model.train()
    model(input_ids=batch(), labels=batch(), use_cache=False).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    first = model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.grad
    assert first.abs().sum() > 0


@pytest.mark.parametrize("options", [None, {"use_reentrant": True}])
def test_checkpointing_recomputes_every_layer_and_gives_the_same_gradients(options):
    gradients = []
    for on in (False, True):
        model = nybble.hf.prepare_for_qlora(
            quantized("nf4"), use_gradient_checkpointing=on, gradient_checkpointing_kwargs=options
        )
        model = adapted(model).train()
        calls = []
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(input_ids=batch(), labels=batch(), use_cache=False).loss.backward()
        assert len(calls) == (2 if on else 1)
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_preparation_freezes_and_casts_all_but_codes_and_scales():
    model = quantized("nf4_dq", torch.bfloat16)
    before = held(model)
    assert nybble.hf.prepare_for_qlora(model) is model
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.uint8}
    assert_same_bits(before, held(model))


def test_preparation_needs_a_quantized_model_that_can_checkpoint():
    with pytest.raises(nb.FormatError, match="no quantized layer; quantize it first"):
        nybble.hf.prepare_for_qlora(dense())
    plain = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    nb.quantize_model(plain, overrides={"1": "skip"})
    with pytest.raises(nb.FormatError, match="use_gradient_checkpointing=False"):
        nybble.hf.prepare_for_qlora(plain)
    assert plain[1].weight.requires_grad  # nothing was changed
    nybble.hf.prepare_for_qlora(plain, use_gradient_checkpointing=False)
    assert not plain[1].weight.requires_grad


def test_pefts_own_preparation_does_no_harm():
    model = quantized("nf4_dq", torch.bfloat16)
    before = held(model)
    model = peft.prepare_model_for_kbit_training(model)
    assert_same_bits(before, held(model))
    model = adapted(model)
    losses = train(model, batch(), 3)
    assert losses == pytest.approx(REFERENCE["nf4_dq/float32"]["losses"][:3], rel=0.002)


def test_autocast_reaches_base_and_adapter():
    model = adapted(quantized("nf4"))
    exact = logits(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 256)).dtype == torch.bfloat16
        coarse = logits(model)
    assert 0 < float((coarse - exact).norm() / exact.norm()) < 0.05


def test_a_compiled_lora_layer_has_no_graph_break():
    model = adapted(quantized("nf4"))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, y = torch.randn(2, 3, 256, requires_grad=True), torch.randn(2, 3, 256, requires_grad=True)
    y.data.copy_(x.data)
    compiled(x).sum().backward()
    compiled_grad = layer.lora_A["default"].weight.grad.clone()
    layer.zero_grad()
    layer(y).sum().backward()
    assert torch.equal(compiled(x), layer(x))
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(compiled_grad, layer.lora_A["default"].weight.grad)


def by_transformers(kind):
    """The model as `from_pretrained` quantizes it."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        LLAMA / "original",
        quantization_config=nybble.hf.NybbleConfig(**KINDS[kind]),
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize("make", [quantized, by_transformers])
def test_the_trainer_of_transformers_trains_and_saves_an_adapter(make, tmp_path):
    pytest.importorskip("accelerate")
    model = adapted(nybble.hf.prepare_for_qlora(make("nf4_dq")))
    before = held(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    rows = [{"input_ids": row, "labels": row} for row in batch()]  # one batch, in any order
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        disable_tqdm=True,
        gradient_checkpointing=False,  # prepare_for_qlora has turned it on
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, schedule)
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses == pytest.approx(REFERENCE["nf4_dq/float32"]["losses"][:2], rel=0.01)
    assert_same_bits(before, held(model))
    trainer.save_model(str(tmp_path / "adapter"))
    reloaded = nybble.hf.load_adapter(
        nybble.hf.prepare_for_qlora(make("nf4_dq")), tmp_path / "adapter"
    )
    assert torch.equal(logits(reloaded), logits(model.eval()))


@pytest.mark.parametrize("to", ["bf16", "same"])
def test_a_model_that_transformers_quantized_is_merged_and_saved(to, tmp_path):
    model = adapted(nybble.hf.prepare_for_qlora(by_transformers("nf4")))
    train(model, batch(), 2)
    merged = nybble.hf.merge(model, to=to)
    assert merged.is_quantized == (to == "same")
    assert hasattr(merged.config, "quantization_config") == (to == "same")
    merged.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16 if to == "bf16" else torch.float32
    )
    linear = again.model.layers[0].self_attn.q_proj
    assert isinstance(linear, QuantizedLinear) == (to == "same")
    assert torch.equal(logits(again.eval()), logits(merged))
