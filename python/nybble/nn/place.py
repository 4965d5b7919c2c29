"""Put a stored quantized weight into the place that a model has for it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from nybble import integer, reference
from nybble.nn.embedding import QuantizedEmbedding, embedding_class
from nybble.nn.linear import QuantizedLinear, linear_class
from nybble.nn.quantized import QuantizedModule

if TYPE_CHECKING:
    from nybble.qtensor import QTensor


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of the weight as files of quantized weights have it: [out, in] for a layer."""
    if isinstance(module, QuantizedModule):
        return tuple(module.shape)
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    is_plain = isinstance(module, (nn.Linear, nn.Embedding))
    return tuple(weight.shape if is_plain else weight.shape[::-1])  # Conv1D holds [in, out]


def hold_weight(
    model: nn.Module,
    path: str,
    q: QTensor,
    compute_dtype: torch.dtype | None = None,
    compute: str | None = None,
) -> QuantizedModule:
    """Let the module at `path` hold `q`, which shares its memory.

    A dense layer, and a quantized one that cannot hold this format, give way to one that can.

    Args:
        model: The model.
        path: A linear layer or an embedding in it.
        q: The weight, of the shape that `weight_shape` says.
        compute_dtype: Dtype of products of a layer that was dense.
        compute: "int8" for products of integers of a layer that was dense, where the codes are
            integers.
    """
    module = model.get_submodule(path)
    old = module if isinstance(module, QuantizedModule) else None
    if reference.is_row_wise(q.format):  # whose files do not say what the weight was
        dtype = module.weight.dtype if old is None else old.dtype
        assert isinstance(dtype, torch.dtype)
        q = replace(q, dtype=dtype)
    bits = reference.spec(q.format)["bits"]
    if old is not None:
        if old.bits == bits:
            old.hold(q)
            return old
        compute_dtype = old.compute_dtype
    made: QuantizedLinear | QuantizedEmbedding
    if isinstance(module, (nn.Embedding, QuantizedEmbedding)):
        padding = module.padding_idx
        made = embedding_class(bits).from_qtensor(q, padding, compute_dtype=compute_dtype)
    else:
        bias = getattr(module, "bias", None)
        if isinstance(module, QuantizedLinear):
            compute = module.compute
        compute = integer.where_possible(compute, q.format)
        made = linear_class(bits).from_qtensor(
            q, bias, compute_dtype=compute_dtype, compute=compute
        )
        made.transposed = (
            module.transposed
            if isinstance(module, QuantizedLinear)
            else not isinstance(module, nn.Linear)
        )
    model.set_submodule(path, made.train(module.training))
    return made
