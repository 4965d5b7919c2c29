"""From `from_pretrained` through the Trainer to a merged model, as a user does it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble.nn.quantized import QuantizedModule
from tiny import RENAMED

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
hf = pytest.importorskip("nybble.hf")

pytestmark = RENAMED

Auto = transformers.AutoModelForCausalLM
Make = Callable[..., Path]
DATA = torch.arange(48).reshape(4, 12) % 100


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": DATA[i], "labels": DATA[i]}


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=DATA, use_cache=False).logits


@pytest.fixture(params=["nybble", "bitsandbytes"])
def quantized(request: pytest.FixtureRequest, make: Make, tmp_path: Path) -> Any:
    """A model that was quantized on load, or a bitsandbytes checkpoint that nybble serves."""
    path = make("llama")
    model = Auto.from_pretrained(path, quantization_config=hf.NybbleConfig("nf4"))
    if request.param == "nybble":
        return model
    hf.save_bitsandbytes(model, tmp_path / "theirs")
    return hf.from_pretrained(tmp_path / "theirs")


def test_a_trainer_trains_an_adapter_that_loads_and_merges(quantized: Any, tmp_path: Path):
    codes = {
        n: m.weight.clone() for n, m in quantized.named_modules() if isinstance(m, QuantizedModule)
    }
    hf.prepare_for_qlora(quantized)
    torch.manual_seed(0)
    model = peft.get_peft_model(quantized, hf.lora_config(quantized, r=4, lora_alpha=8))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-2)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=12,
            per_device_train_batch_size=4,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Rows(),
        optimizers=(optimizer, scheduler),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.3
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedModule):
            plain = name.replace(".base_layer", "")
            assert torch.equal(module.weight, codes[plain])

    trained = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    quantized_again = model.unload()
    again = hf.load_adapter(quantized_again, tmp_path / "adapter")
    torch.testing.assert_close(logits(again), trained)
    merged = hf.merge(again, to="bf16")
    assert merged.merge_report.rel_error < 0.01
    merged.save_pretrained(tmp_path / "merged")
    dense = Auto.from_pretrained(tmp_path / "merged")
    assert not hasattr(dense.config, "quantization_config")
    assert {p.dtype for p in dense.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(dense).float(), trained.float(), rtol=0.1, atol=0.1)


def test_a_model_that_was_merged_in_its_format_is_saved_and_loaded(quantized: Any, tmp_path: Path):
    model = peft.get_peft_model(quantized, hf.lora_config(quantized, r=2, init_lora_weights=False))
    merged = hf.merge(model, to="same")
    merged.save_pretrained(tmp_path / "saved")
    again = hf.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(merged))
    assert merged.merge_report.rel_error > 0
