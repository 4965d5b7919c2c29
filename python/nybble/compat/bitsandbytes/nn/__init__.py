"""Layers and parameters under bitsandbytes' names."""

from __future__ import annotations

from nybble.compat.bitsandbytes._offered import explain_missing
from nybble.compat.bitsandbytes.nn import modules, parametrize
from nybble.compat.bitsandbytes.nn.modules import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Int8Params,
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    Params4bit,
    StableEmbedding,
)

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
    "modules",
    "parametrize",
]

__getattr__ = explain_missing(__name__, __all__)
