"""Layers that hold quantized weights, and their replacement in a model."""

from nybble.nn.embedding import Embedding4bit, Embedding8bit
from nybble.nn.experts import Experts4bit, Experts8bit
from nybble.nn.linear import Linear4bit, Linear8bit

__all__ = [
    "Embedding4bit",
    "Embedding8bit",
    "Experts4bit",
    "Experts8bit",
    "Linear4bit",
    "Linear8bit",
]
