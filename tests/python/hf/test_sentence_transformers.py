"""sentence-transformers hands `model_kwargs` to transformers, and so quantizes with nybble."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nybble.nn.quantized import QuantizedModule

sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason="sentence-transformers is an optional peer"
)
transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("nybble.hf")


def test_a_sentence_transformer_is_quantized_saved_and_loaded(
    make: Callable[..., Path], tmp_path: Path
):
    import tokenizers

    path = make("bert", "AutoModel")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, sep_token="[SEP]", **special
    ).save_pretrained(path)
    model = sentence_transformers.SentenceTransformer(
        str(path), device="cpu", model_kwargs={"quantization_config": hf.NybbleConfig("nf4")}
    )
    assert any(isinstance(module, QuantizedModule) for module in model.modules())
    vectors = model.encode(["a b", "b"])
    model.save(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert any(isinstance(module, QuantizedModule) for module in again.modules())
    assert np.array_equal(again.encode(["a b", "b"]), vectors)
