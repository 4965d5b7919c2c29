"""bitsandbytes: Linear4bit with its repacked kernel, and Linear8bitLt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from compare.weights import BF16, F16, F32, Unavailable, Weight, copies_of


def library() -> Any:
    """The module, or why it is not there."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise Unavailable(f"bitsandbytes: {error}") from error
    return bitsandbytes


def layer4(dense: torch.Tensor, format: str, dtype: torch.dtype) -> torch.nn.Module:
    """A Linear4bit on the CPU; it repacks its weight in the first forward in eval mode."""
    bnb = library()
    rows, columns = dense.shape
    layer = bnb.nn.Linear4bit(
        columns,
        rows,
        bias=False,
        compute_dtype=dtype,
        quant_type=format,
        compress_statistics=False,
    )
    layer.weight = bnb.nn.Params4bit(
        dense.to(dtype),
        requires_grad=False,
        quant_type=format,
        compress_statistics=False,
        blocksize=64,
    )
    made: torch.nn.Module = layer.to("cpu")
    return made


def four_bit(dense: torch.Tensor, formats: tuple[str, ...] = ("nf4", "fp4")) -> Iterator[Weight]:
    """What an inference layer does: pack once, then multiply by the packed weight."""
    bnb = library()
    import copy

    import bitsandbytes.functional as functional

    for format in formats:
        q, state = functional.quantize_4bit(dense.to(BF16), blocksize=64, quant_type=format)
        packed, state = functional._convert_weight_packed_for_cpu(q, state)
        nbytes = packed.numel() + state.absmax.numel() * state.absmax.element_size()
        pairs = []
        for _ in range(copies_of(nbytes)):
            own = copy.copy(state)
            own.absmax = state.absmax.clone()
            pairs.append((packed.clone(), own))

        def bind(x: torch.Tensor, pairs: Any = pairs) -> Callable[[int], Any]:
            return lambda i: bnb.matmul_4bit(x, *pairs[i % len(pairs)])

        yield Weight(
            name=f"bitsandbytes {format}",
            package="bitsandbytes",
            dtypes=(BF16, F32),
            nbytes=nbytes,
            copies=len(pairs),
            bind=bind,
            activations="bf16",
        )


def eight_bit(dense: torch.Tensor, threshold: float) -> Weight:
    """Linear8bitLt."""
    bnb = library()
    rows, columns = dense.shape
    layers = []
    for _ in range(copies_of(dense.numel())):
        layer = bnb.nn.Linear8bitLt(
            columns, rows, bias=False, has_fp16_weights=False, threshold=threshold
        )
        layer.weight = bnb.nn.Int8Params(dense.to(F16), requires_grad=False, has_fp16_weights=False)
        layers.append(layer.to("cpu").eval())

    def bind(x: torch.Tensor) -> Callable[[int], Any]:
        return lambda i: layers[i % len(layers)](x)

    return Weight(
        name=f"bitsandbytes Linear8bitLt threshold {threshold:g}",
        package="bitsandbytes",
        dtypes=(BF16, F32),
        nbytes=dense.numel(),
        copies=len(layers),
        bind=bind,
        activations="int8",
    )
