"""torch: the dense products, and its own weight-only ops."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from compare.weights import BF16, F32, Weight, copies_of


def dense(weight: torch.Tensor) -> Iterator[Weight]:
    """F.linear in bfloat16 and float32."""
    for dtype, name in ((BF16, "torch bf16"), (F32, "torch fp32")):
        size = weight.numel() * dtype.itemsize
        ws = [weight.to(dtype).clone() for _ in range(copies_of(size))]

        def bind(x: torch.Tensor, ws: list[torch.Tensor] = ws) -> Callable[[int], Any]:
            return lambda i: torch.nn.functional.linear(x, ws[i % len(ws)])

        yield Weight(
            name=name, package="torch", dtypes=(dtype,), nbytes=size, copies=len(ws), bind=bind
        )


def int4(weight: torch.Tensor, group: int = 64) -> Iterator[Weight]:
    """`_weight_int4pack_mm_for_cpu`, the op behind torchao's int4 on CPUs."""
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // group, group)
    high, low = groups.amax(-1), groups.amin(-1)
    scale = (high - low).clamp(min=1e-6) / 15
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int32)
    scales = torch.stack([scale, low + scale * 8], -1).transpose(0, 1).contiguous().to(BF16)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.reshape(rows, columns), 1)
    nbytes = packed.numel() * packed.element_size() + scales.numel() * 2
    pairs = [(packed.clone(), scales.clone()) for _ in range(copies_of(nbytes))]

    def bind(x: torch.Tensor) -> Callable[[int], Any]:
        def call(i: int) -> Any:
            codes, scales = pairs[i % len(pairs)]
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group, scales)

        return call

    yield Weight(
        name="torch int4pack g64",
        package="torch",
        dtypes=(BF16,),
        nbytes=nbytes,
        copies=len(pairs),
        bind=bind,
    )


def int8(weight: torch.Tensor) -> Iterator[Weight]:
    """`_weight_int8pack_mm` (weight only) and quantize_dynamic (int8 activations)."""
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    count = copies_of(codes.numel())
    pairs = [(codes.clone(), scale.to(BF16)) for _ in range(count)]

    def bind(x: torch.Tensor) -> Callable[[int], Any]:
        return lambda i: torch.ops.aten._weight_int8pack_mm(x, *pairs[i % len(pairs)])

    yield Weight(
        name="torch int8pack",
        package="torch",
        dtypes=(BF16,),
        nbytes=codes.numel(),
        copies=count,
        bind=bind,
        limit=64,
    )
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = [
            torch.ao.quantization.quantize_dynamic(
                torch.nn.Sequential(layer), {torch.nn.Linear}, dtype=torch.qint8
            )
            for _ in range(count)
        ]

    def bind_dynamic(x: torch.Tensor) -> Callable[[int], Any]:
        return lambda i: models[i % len(models)](x)

    yield Weight(
        name="torch int8 dynamic",
        package="torch",
        dtypes=(F32,),
        nbytes=codes.numel(),
        copies=count,
        bind=bind_dynamic,
        activations="int8",
    )
