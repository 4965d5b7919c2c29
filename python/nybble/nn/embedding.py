"""Embeddings with quantized tables: only the rows that are looked up are decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from nybble import ops
from nybble.errors import FormatError
from nybble.nn.linear import quantize_weight
from nybble.nn.quantized import QuantizedModule, empty_quantized
from nybble.qtensor import QTensor

if TYPE_CHECKING:
    from typing_extensions import Self


class QuantizedEmbedding(QuantizedModule):
    """Rows of a quantized table [num_embeddings, embedding_dim]."""

    padding_idx: int | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        format: str,
        blocksize: int | None = None,
        nested: bool = False,
        compute_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Make a table of zeros, to be filled by `load_state_dict` or `requantize_`.

        Args:
            num_embeddings: Number of rows.
            embedding_dim: Length of a row.
            padding_idx: Kept for `to_embedding`; a frozen table has no gradient to withhold.
            format: Storage format.
            blocksize: Elements that share a scale; None for the format's default.
            nested: Quantize the scales too.
            compute_dtype: Dtype of the result; None for the dtype that the table had.
            dtype: Dtype that the table had.
            device: Where the tensors live.
        """
        dtype = dtype or torch.get_default_dtype()
        shape = (num_embeddings, embedding_dim)
        super().__init__(
            empty_quantized(shape, format, blocksize, nested, dtype, device), compute_dtype
        )
        self.padding_idx = padding_idx

    @classmethod
    def from_qtensor(
        cls,
        q: QTensor,
        padding_idx: int | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
    ) -> Self:
        """Wrap a quantized table of rank 2, sharing its memory."""
        if len(q.shape) != 2:
            raise FormatError(f"an embedding needs a table of rank 2, got {tuple(q.shape)}")
        module = cls.__new__(cls)
        QuantizedModule.__init__(module, q, compute_dtype)
        module.padding_idx = padding_idx
        return module

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        format: str,
        *,
        blocksize: int | None = None,
        nested: bool = False,
        compute_dtype: torch.dtype | None = None,
        reference: str | None = None,
    ) -> Self:
        """Quantize the table of an `nn.Embedding`.

        Raises:
            FormatError: The embedding renormalizes its rows (`max_norm`), which a frozen table
                cannot do.
        """
        if embedding.max_norm is not None:
            raise FormatError(
                "an embedding with max_norm changes its table; it cannot be quantized"
            )
        q = quantize_weight(
            embedding.weight, format, blocksize=blocksize, nested=nested, reference=reference
        )
        module = cls.from_qtensor(q, embedding.padding_idx, compute_dtype=compute_dtype)
        module.train(embedding.training)
        return module

    @property
    def num_embeddings(self) -> int:
        """Number of rows."""
        return self.shape[0]

    @property
    def embedding_dim(self) -> int:
        """Length of a row."""
        return self.shape[1]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Integer ids of any shape to [..., embedding_dim]."""
        return ops.embedding(
            ids,
            self.weight,
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            self.format,
            self.blocksize,
            self.shape,
            self.compute_dtype or self.dtype,
        )

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """The dense embedding."""
        dense = nn.Embedding(
            self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta"
        )
        dense.weight = nn.Parameter(self.dequantize(dtype))
        return dense.train(self.training)


class Embedding4bit(QuantizedEmbedding):
    """An embedding whose table is nf4, fp4, int4 or mxfp4."""

    bits = 4


class Embedding8bit(QuantizedEmbedding):
    """An embedding whose table is int8 (one scale a row) or dynamic8."""

    bits = 8


def embedding_class(bits: int) -> type[Embedding4bit] | type[Embedding8bit]:
    """The layer that holds formats of this many bits."""
    return Embedding4bit if bits == Embedding4bit.bits else Embedding8bit
