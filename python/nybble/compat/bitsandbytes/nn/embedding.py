"""Embeddings: plain, with a norm, and with quantized tables."""

from __future__ import annotations

import torch
from torch import nn

from nybble import ops
from nybble.compat.bitsandbytes._four_bit import how, parts
from nybble.compat.bitsandbytes._quant_state import QuantState
from nybble.compat.bitsandbytes.nn._storing import Stored4bit, Stored8bit
from nybble.compat.bitsandbytes.nn.linear4bit import quantized_weight
from nybble.compat.bitsandbytes.nn.params import Int8Params, Params4bit


class Embedding(nn.Embedding):
    """`nn.Embedding` with Xavier initialization."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: torch.Tensor | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        """See `torch.nn.Embedding`."""
        super().__init__(
            *(num_embeddings, embedding_dim, padding_idx, max_norm, norm_type),
            *(scale_grad_by_freq, sparse, _weight),
            device=device,
        )

    def reset_parameters(self) -> None:
        """Draw new weights; the row of `padding_idx` is zero."""
        _xavier(self)


class StableEmbedding(nn.Embedding):
    """`nn.Embedding` with Xavier initialization and a layer norm after it (arXiv:2110.02861)."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: torch.Tensor | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """See `torch.nn.Embedding`."""
        super().__init__(
            *(num_embeddings, embedding_dim, padding_idx, max_norm, norm_type),
            *(scale_grad_by_freq, sparse, _weight),
            device=device,
            dtype=dtype,
        )
        self.norm = nn.LayerNorm(embedding_dim, device=device)

    def reset_parameters(self) -> None:
        """Draw new weights; the row of `padding_idx` is zero."""
        _xavier(self)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Integer ids of any shape to [..., embedding_dim]; the norm is taken in full precision."""
        rows = super().forward(input).to(torch.get_default_dtype())
        normed: torch.Tensor = self.norm(rows)
        return normed.to(self.weight.dtype)


def _xavier(embedding: nn.Embedding) -> None:
    nn.init.xavier_uniform_(embedding.weight)
    if embedding.padding_idx is not None:
        with torch.no_grad():
            embedding.weight[embedding.padding_idx].fill_(0)


class Embedding4bit(Stored4bit, nn.Embedding):
    """An embedding with a 4-bit table; only the rows that are looked up are decoded.

    Attributes:
        dtype: Dtype of the result, that of the table before it was quantized.
    """

    quant_state: QuantState | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        """Make a random table, quantized when the layer is moved to a device or first used."""
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.data.dtype
        self.quant_state = None
        self.quant_storage = quant_storage
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=None,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )

    def _weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Integer ids of any shape to [..., embedding_dim]."""
        weight = quantized_weight(self, input.device)
        if weight is None:
            return nn.functional.embedding(input, self.weight).to(self.dtype)
        state = weight.quant_state
        assert state is not None
        codes = weight.data.contiguous()
        rows = ops.embedding(input, *parts(codes, state), *how(state), self.dtype)
        return rows.to(self.dtype)


class EmbeddingFP4(Embedding4bit):
    """`Embedding4bit` with fp4."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        """See `Embedding4bit`."""
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class EmbeddingNF4(Embedding4bit):
    """`Embedding4bit` with nf4."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        """See `Embedding4bit`."""
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)


class Embedding8bit(Stored8bit, nn.Embedding):
    """An embedding with an int8 table; only the rows that are looked up are decoded.

    Attributes:
        dtype: Dtype of the result, that of the table before it was quantized.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make a random table, quantized when the layer is moved to a device or first used."""
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.data.dtype
        self.weight = Int8Params(self.weight.data, has_fp16_weights=False, requires_grad=False)

    def _weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Integer ids of any shape to [..., embedding_dim]."""
        weight = self.weight
        if isinstance(weight, Int8Params) and not weight.is_quantized8:
            self.weight = weight = weight.to(input.device)
        if not isinstance(weight, Int8Params) or weight.SCB is None:
            return nn.functional.embedding(input, weight).to(self.dtype)
        scales = weight.SCB.to(weight.device)
        size = ("int8", self.embedding_dim, [self.num_embeddings, self.embedding_dim])
        return ops.embedding(input, weight.data, scales, None, None, *size, self.dtype)
