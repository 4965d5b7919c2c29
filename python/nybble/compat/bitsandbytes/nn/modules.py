"""The layers and parameters under the path that `bitsandbytes.nn.modules` has them."""

from __future__ import annotations

from nybble.compat.bitsandbytes._offered import explain_missing
from nybble.compat.bitsandbytes.nn.embedding import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    StableEmbedding,
)
from nybble.compat.bitsandbytes.nn.linear4bit import Linear4bit, LinearFP4, LinearNF4
from nybble.compat.bitsandbytes.nn.linear8bit import Linear8bitLt
from nybble.compat.bitsandbytes.nn.params import Int8Params, Params4bit

__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
    "StableEmbedding",
]

__getattr__ = explain_missing(__name__, __all__)
