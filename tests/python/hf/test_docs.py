"""What docs/huggingface.md shows runs, with small local models in place of its ids."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tiny import RENAMED

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

DOC = Path(__file__).parents[3] / "docs" / "huggingface.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOC.read_text("utf-8"), re.DOTALL)
IDS = {
    "HuggingFaceTB/SmolLM2-135M": "llama_tied/original",
    "unsloth/Llama-3.2-1B-bnb-4bit": "llama_untied/nf4_dq",
    "mistralai/Mixtral-8x7B-v0.1": "mixtral/original",
}


def _with_tokenizer(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    words = {word: i for i, word in enumerate(["<unk>", "the", "cat", *map(str, range(381))])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>"
    ).save_pretrained(target)
    return target


@RENAMED
def test_the_examples_run(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert len(BLOCKS) >= 8
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    text = "\n".join(BLOCKS)
    for i, (hub, kind) in enumerate(IDS.items()):
        assert hub in text
        local = _with_tokenizer(golden / kind, tmp_path / f"model-{i}")
        BLOCKS[:] = [block.replace(hub, str(local)) for block in BLOCKS]
    for block in BLOCKS:
        exec(compile(block, DOC.name, "exec"), names)
    assert (tmp_path / "for-bitsandbytes" / "model.safetensors").is_file()
