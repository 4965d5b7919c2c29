"""`from_pretrained(..., quantization_config=NybbleConfig(...))`: quantize, save, load again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nybble as nb
from nybble.errors import DeviceError, FormatError
from nybble.nn.quantized import QuantizedModule

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("nybble.hf")

IDS = torch.arange(3, 35)[None]
Make = Callable[..., Path]


def load(path: Path, *options: Any, auto: str = "AutoModelForCausalLM", **kwargs: Any) -> Any:
    if options:
        kwargs["quantization_config"] = options[0]
    return getattr(transformers, auto).from_pretrained(path, **kwargs)


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS)[0]


def quantized(model: nn.Module) -> dict[str, QuantizedModule]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedModule)}


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize(
    "options",
    [
        {"format": "nf4"},
        {"format": "nf4", "nested": True, "blocksize": 128},
        {"format": "fp4"},
        {"format": "int4"},
        {"format": "int8"},
        {"format": "int8", "threshold": 6.0},
        {"format": "dynamic8"},
        {"format": "mxfp4"},
        {"format": "nf4", "skip": [], "overrides": {"re:layers\\.0\\.": "int8"}},
    ],
)
@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_a_saved_model_loads_without_a_config_and_is_the_same(
    make: Make, tmp_path: Path, options: dict[str, Any], device_map: str | None
):
    first = load(make("llama"), hf.NybbleConfig(**options), device_map=device_map)
    first.save_pretrained(tmp_path / "once")
    again, info = load(tmp_path / "once", device_map=device_map, output_loading_info=True)
    assert not any(info.values())
    assert quantized(again).keys() == quantized(first).keys() != set()
    assert torch.equal(outputs(again), outputs(first))
    again.save_pretrained(tmp_path / "twice")
    assert files(tmp_path / "twice") == files(tmp_path / "once")
    assert nb.open_checkpoint(tmp_path / "once").verify().ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_holds_for_all_that_is_not_quantized(make: Make, tmp_path: Path, dtype: torch.dtype):
    model = load(make("qwen2"), hf.NybbleConfig("nf4"), dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    for candidate in (model, load(tmp_path / "saved", dtype=dtype)):
        dtypes = {p.dtype for p in candidate.parameters() if p.is_floating_point()}
        assert dtypes == {dtype}
        assert all(m.absmax.dtype == torch.float32 for m in quantized(candidate).values())
        assert outputs(candidate).dtype == dtype


def test_weights_are_those_of_quantize(make: Make):
    path = make("llama")
    dense = load(path)
    model = load(path, hf.NybbleConfig("nf4", nested=True))
    for name, module in quantized(model).items():
        q = nb.quantize(dense.get_submodule(name).weight.detach(), "nf4", nested=True)
        assert torch.equal(module.dequantize(), q.dequantize())


def test_dequantize_gives_an_ordinary_model(make: Make, tmp_path: Path):
    model = load(make("llama"), hf.NybbleConfig("int4"), dtype=torch.float32)
    before = outputs(model)
    model.save_pretrained(tmp_path / "quantized")  # which leaves text as the config's dtype
    model.dequantize()
    assert not quantized(model)
    torch.testing.assert_close(outputs(model), before)
    model.save_pretrained(tmp_path / "dense")
    dense = load(tmp_path / "dense")
    assert not hasattr(dense.config, "quantization_config")
    assert torch.equal(outputs(dense), outputs(model))


def test_conv1d_layers_of_gpt2_are_quantized(make: Make, tmp_path: Path):
    path = make("gpt2")
    model = load(path, hf.NybbleConfig("nf4"), dtype=torch.float32)
    names = quantized(model)
    assert len(names) == 8
    assert "lm_head" not in names
    dense = load(path, dtype=torch.float32)
    for name, module in names.items():
        weight = dense.get_submodule(name).weight.detach().T
        assert torch.equal(module.dequantize(), nb.quantize(weight, "nf4").dequantize())
        dense.get_submodule(name).weight.data = module.dequantize().T.contiguous()
    torch.testing.assert_close(outputs(model), outputs(dense))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(outputs(load(tmp_path / "saved")), outputs(model))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_tied_weights_stay_dense_and_tied_whatever_skip_says(make: Make, tmp_path: Path, kind: str):
    path = make(kind, tie_word_embeddings=True)
    model = load(path, hf.NybbleConfig("nf4", skip=["nothing"]))
    model.save_pretrained(tmp_path / "saved")
    for candidate in (model, load(tmp_path / "saved")):
        head = candidate.get_output_embeddings()
        assert head.weight is candidate.get_input_embeddings().weight
        assert head.weight.is_floating_point()


def test_a_skip_list_replaces_the_default_head(make: Make):
    names = quantized(load(make("llama"), hf.NybbleConfig("nf4", skip=["k_proj"])))
    assert "lm_head" in names
    assert not any("k_proj" in name for name in names)


def test_modules_that_a_model_wants_in_float32_are_left_alone(make: Make):
    model = load(
        make("t5", "AutoModelForSeq2SeqLM"),
        hf.NybbleConfig("nf4"),
        auto="AutoModelForSeq2SeqLM",
    )
    names = quantized(model)
    assert any(name.endswith(".wi") for name in names)
    assert not any(name.endswith(".wo") for name in names)


def test_a_new_head_is_initialized_and_dense(make: Make):
    path = make("bert", "AutoModel")
    model = load(
        path,
        hf.NybbleConfig("nf4", skip=[]),  # would quantize the head, were there one to quantize
        auto="AutoModelForSequenceClassification",
        num_labels=3,
    )
    assert type(model.classifier) is nn.Linear
    assert torch.isfinite(model.classifier.weight).all()
    assert 0 < float(model.classifier.weight.detach().float().std()) < 0.1
    assert outputs(model).shape == (1, 3)
    assert any("query" in name for name in quantized(model))


def test_automodel_loads_what_a_causal_model_saved(make: Make, tmp_path: Path):
    whole = load(make("llama"), hf.NybbleConfig("nf4"))
    whole.save_pretrained(tmp_path / "saved")
    base, info = load(tmp_path / "saved", auto="AutoModel", output_loading_info=True)
    assert not info["missing_keys"]
    hidden = outputs(base)
    assert torch.equal(outputs(whole), whole.lm_head(hidden))


def test_generate_works_and_compiles(make: Make):
    model = load(make("llama"), hf.NybbleConfig("nf4"), dtype=torch.float32)
    plain = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    want = model.generate(IDS, **plain)
    assert want.shape == (1, 37)
    assert model.hf_quantizer.is_compileable
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **plain), want)


@pytest.mark.parametrize("asked", [None, torch.bfloat16])
def test_a_converted_checkpoint_computes_in_the_dtype_of_its_input(
    make: Make, tmp_path: Path, asked: torch.dtype | None
):
    nb.quantize_checkpoint(make("llama"), tmp_path / "out", "int4")
    options = {} if asked is None else {"compute_dtype": asked}
    model = hf.from_pretrained(tmp_path / "out", dtype=torch.float32, **options)
    assert {module.compute_dtype for module in quantized(model).values()} == {asked}
    found = outputs(model)
    model.dequantize()
    error = float((found - outputs(model)).norm() / found.norm())
    assert (error < 1e-5) == (asked is None)


def test_save_model_says_a_compute_dtype_only_if_there_is_one(make: Make, tmp_path: Path):
    for dtype, written in ((None, None), (torch.bfloat16, "bfloat16")):
        model = load(make("llama"), dtype=torch.float32)
        nb.quantize_model(model, "int4", compute_dtype=dtype)
        nb.save_model(model, tmp_path / "saved", overwrite=True)
        entry = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
        assert entry["compute_dtype"] == written
        assert torch.equal(outputs(load(tmp_path / "saved")), outputs(model))


def test_half_of_a_model_leaves_scales_alone(make: Make):
    model = load(make("llama"), hf.NybbleConfig("nf4"), dtype=torch.float32)
    before = {name: m.dequantize(torch.float32) for name, m in quantized(model).items()}
    model.to(torch.bfloat16)
    assert outputs(model).dtype == torch.bfloat16
    for name, module in quantized(model).items():
        assert torch.equal(module.dequantize(torch.float32), before[name])


def test_coverage_says_what_became_of_each_parameter(make: Make):
    model = load(make("llama"), hf.NybbleConfig("nf4", overrides={"*.k_proj": "int8"}))
    coverage = model.hf_quantizer.coverage
    assert {row.format for row in coverage.quantized} == {"nf4", "int8"}
    assert any(row.name == "lm_head.weight" for row in coverage.kept)


def test_an_override_that_fits_nothing_is_an_error(make: Make):
    config = hf.NybbleConfig("nf4", overrides={"re:layers\\.99\\.": "int8"})
    with pytest.raises(FormatError, match=r"overrides name modules that LlamaForCausalLM lacks"):
        load(make("llama"), config)


def test_a_skip_pattern_that_fits_nothing_is_said(make: Make, caplog: pytest.LogCaptureFixture):
    load(make("llama"), hf.NybbleConfig("nf4", skip=["lm_head", "c_attn"]))
    assert "skip names nothing in LlamaForCausalLM: ['c_attn']" in caplog.text


def test_the_disk_is_no_place_for_quantized_weights(make: Make, tmp_path: Path):
    with pytest.raises(DeviceError, match="the disk"):
        load(
            make("llama"),
            hf.NybbleConfig("nf4"),
            device_map={"model": "cpu", "lm_head": "disk"},
            offload_folder=tmp_path / "offload",
        )


def test_a_weight_that_is_not_finite_is_named(make: Make, caplog: pytest.LogCaptureFixture):
    path = make("llama")
    dense = load(path)
    dense.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    dense.save_pretrained(path)
    with pytest.raises(RuntimeError, match="conversion"):  # transformers': see its report
        load(path, hf.NybbleConfig("nf4"))
    assert "'model.layers.1.mlp.up_proj.weight': value NaN at flat position 195" in caplog.text


def test_a_pipeline_runs_on_a_quantized_model(make: Make):
    model = load(make("llama"), hf.NybbleConfig("nf4"))
    tokenizer = _tokenizer()
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    made = pipe("a b c", max_new_tokens=3, do_sample=False)
    assert made[0]["generated_text"].startswith("a b c")


def _tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["<unk>", "a", "b", "c", *map(str, range(124))])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>", eos_token="c"
    )
