"""Merging: exact sums, one rounding, its error reported, and the way back."""

from __future__ import annotations

import logging

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import nybble as nb
import nybble.hf
from nybble.nn.linear import QuantizedLinear
from nybble.nn.quantized import QuantizedModule
from strategies import same_bits
from tiny import KINDS, RENAMED, adapted, codes, logits, quantized, stir

pytestmark = RENAMED
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def stirred(kind="nf4", **options):
    model = adapted(quantized(kind, layers=1), **options)
    stir(model)
    return model


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_merging_to_float32_changes_no_logit_beyond_rounding(kind):
    model = stirred(kind)
    before = logits(model)
    merged = nybble.hf.merge(model, to="fp32")
    assert relative(logits(merged), before) < 1e-5
    assert merged.merge_report.rel_error == 0


@pytest.mark.parametrize("to", DTYPES)
def test_a_model_merged_to_a_dtype_is_an_ordinary_dense_model(to, tmp_path):
    model = stirred("nf4_dq", target_modules=["q_proj", "up_proj"])
    model.base_model.model.config.quantization_config = {"quant_method": "nybble"}
    before = logits(model)
    merged = nybble.hf.merge(model, to=to)
    assert type(merged) is transformers.LlamaForCausalLM
    assert not any(isinstance(m, QuantizedModule) for m in merged.modules())
    assert {p.dtype for p in merged.parameters()} == {DTYPES[to]}
    assert not hasattr(merged.config, "quantization_config")
    # each weight is rounded once; activations are in the dtype too
    assert relative(logits(merged), before) < 20 * torch.finfo(DTYPES[to]).eps
    merged.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.dtype == DTYPES[to]
    assert torch.equal(logits(again), logits(merged))


@pytest.mark.parametrize("kind", KINDS)
def test_merging_to_same_quantizes_the_exact_sum_with_the_same_settings(kind, caplog):
    model = stirred(kind, target_modules=["q_proj", "up_proj"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    exact = layer.base_layer.dequantize(torch.float32) + layer.get_delta_weight("default")
    untouched = codes(model.base_model.model.model.layers[0].self_attn.v_proj)
    settings = (layer.base_layer.format, layer.base_layer.blocksize)
    with caplog.at_level(logging.WARNING, logger="nybble"):
        merged = nybble.hf.merge(model, to="same")
    base = merged.model.layers[0].self_attn.q_proj
    assert isinstance(base, QuantizedLinear)
    assert (base.format, base.blocksize) == settings
    assert (base.nested_absmax is not None) == (kind == "nf4_dq")
    expected = nb.quantize(exact.detach(), **KINDS[kind])
    assert torch.equal(base.dequantize(torch.float32), expected.dequantize(torch.float32))
    after = codes(merged.model.layers[0].self_attn.v_proj)
    assert all(same_bits(untouched[name], after[name]) for name in untouched)
    stats = nb.error(exact, expected)
    rows = {row.name: row for row in merged.merge_report.layers}
    assert rows.keys() == {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"}
    row = rows["model.layers.0.self_attn.q_proj"]
    assert row.rel_error == pytest.approx(stats.rel_rms, rel=1e-5)
    assert row.before == row.after == KINDS[kind]["format"]
    assert f"{merged.merge_report.rel_error:.3%} of the weights" in caplog.text


def test_the_report_tells_totals_and_the_worst_layers():
    report = nybble.hf.merge(stirred("nf4"), to="bf16").merge_report
    assert (report.to, report.adapters) == ("bf16", ("default",))
    assert len(report.layers) == 7
    squares = sum(row.error_norm**2 for row in report.layers)
    weights = sum(row.weight_norm**2 for row in report.layers)
    assert report.rel_error == pytest.approx((squares / weights) ** 0.5)
    assert 0 < report.rel_error < 2**-8 < report.update_error * 2**4
    errors = [row.rel_error for row in report.worst(3)]
    assert errors == sorted((row.rel_error for row in report.layers), reverse=True)[:3]
    assert "merged default into 7 quantized layers, to bf16" in str(report)


def test_merging_to_a_dtype_keeps_what_requantizing_loses():
    kept = nybble.hf.merge(stirred("nf4"), to="bf16").merge_report
    lost = nybble.hf.merge(stirred("nf4"), to="same").merge_report
    assert kept.rel_error < 0.05 * lost.rel_error


@pytest.mark.parametrize("kind", KINDS)
def test_unmerging_gives_back_every_bit(kind):
    model = stirred(kind, lora_dropout=0.1)
    model.add_adapter("other", nybble.hf.lora_config(model, r=2, target_modules=["q_proj"]))
    stir(model, seed=7)
    before, exact = codes(model), logits(model)
    model.merge_adapter()
    assert not torch.equal(logits(model), exact)
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(adapter_names=["other"])
    model.unmerge_adapter()
    after = codes(model)
    assert all(same_bits(before[name], after[name]) for name in before)
    model.set_adapter("default")
    assert torch.equal(logits(model), exact)


def test_adapters_merged_one_after_another_are_rounded_once():
    model = stirred("nf4")
    model.add_adapter("other", nybble.hf.lora_config(model, r=2))
    stir(model, seed=7)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    exact = layer.base_layer.dequantize(torch.float32)
    exact = exact + layer.get_delta_weight("default") + layer.get_delta_weight("other")
    layer.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="Already following adapters were merged default"):
        layer.merge(adapter_names=["other"])
    expected = nb.quantize(exact.detach(), "nf4").dequantize(torch.float32)
    assert torch.equal(layer.base_layer.dequantize(torch.float32), expected)
    assert layer.merged_adapters == ["default", "other"]
    layer.unmerge()
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_disabling_adapters_takes_a_merged_one_out():
    model = stirred("nf4")
    with model.disable_adapter():
        base = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed but the targeted layer")
def test_variants_merge_exactly(options):
    dense = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 64))
    nb.quantize_model(dense, "nf4")
    model = adapted(dense, **options)
    stir(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.3)
    x = torch.randn(5, 64)
    expected = model(x)
    merged = nybble.hf.merge(model, to="fp32")
    torch.testing.assert_close(merged(x), expected)


def test_a_bias_without_a_place_cannot_be_merged():
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    nb.quantize_model(model)
    with pytest.warns(UserWarning, match="has no bias"):
        model = adapted(model, lora_bias=True)
    with pytest.raises(nb.FormatError, match="keep the adapter apart"):
        nybble.hf.merge(model)


def test_ordinary_layers_are_merged_too():
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 64))
    nb.quantize_model(model, overrides={"1": "skip"})
    model = adapted(model)
    stir(model)
    x = torch.randn(3, 64)
    expected = model(x)
    merged = nybble.hf.merge(model, to="fp32")
    torch.testing.assert_close(merged(x), expected)
    assert [row.name for row in merged.merge_report.layers] == ["0"]


def test_a_model_whose_adapter_is_merged_already_merges_from_the_original_weight():
    model = stirred("nf4")
    expected = logits(model)
    model.merge_adapter()
    merged = nybble.hf.merge(model, to="fp32")
    assert relative(logits(merged), expected) < 1e-5


def test_an_adapter_is_chosen_by_name():
    model = stirred("nf4")
    model.add_adapter("other", nybble.hf.lora_config(model, r=2))
    stir(model, seed=7)
    model.set_adapter("other")
    expected = logits(model)
    model.set_adapter("default")
    merged = nybble.hf.merge(model, to="fp32", adapter_names=["other"])
    assert relative(logits(merged), expected) < 1e-5
    assert merged.merge_report.adapters == ("other",)


def test_mistakes_are_found_before_anything_changes():
    model = stirred("nf4")
    before = logits(model)
    with pytest.raises(nb.FormatError, match="did you mean 'bf16'"):
        nybble.hf.merge(model, to="bf-16")
    with pytest.raises(nb.FormatError, match="no adapter 'nobody'; it has: default"):
        nybble.hf.merge(model, adapter_names=["nobody"])
    with pytest.raises(nb.FormatError, match="merge takes a PeftModel, got LlamaForCausalLM"):
        nybble.hf.merge(model.get_base_model())
    assert torch.equal(logits(model), before)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = float("nan")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(nb.FormatError, match=r"adapter 'default' has values in '.*down_proj'"):
        nybble.hf.merge(model, to="bf16")
    assert names == [name for name, _ in model.named_modules()]
    with pytest.raises(nb.FormatError, match="not finite"):
        layer.merge()
