"""openvino: a compressed MatMul, with dynamic quantization of the activations and without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from compare.blocks import low_first, symmetric4
from compare.weights import F32, Unavailable, Weight, copies_of


def four_bit(weight: torch.Tensor, group: int = 64) -> Iterator[Weight]:
    """i4 weights in groups of 64: int8 activations (dq64), or float32 throughout."""
    try:
        import openvino
        from openvino import opset13 as ops
    except ImportError as error:
        raise Unavailable(f"openvino: {error}") from error

    rows, columns = weight.shape
    codes, scales = symmetric4(weight, group)
    signed = ((codes.astype(np.int8) - 8) & 15).astype(np.uint8)
    packed, halves = low_first(signed).reshape(-1), scales.astype(np.float16)
    nbytes = packed.nbytes + halves.nbytes
    kept: list[Any] = [packed]  # constants refer to it
    core = openvino.Core()
    for dynamic in (group, 0):
        requests = []
        for _ in range(copies_of(nbytes)):
            shape = openvino.Shape([rows, columns // group, group])
            tensor = openvino.Tensor(packed, shape, openvino.Type.i4)
            kept.append(tensor)
            w = ops.convert(openvino.op.Constant(tensor), "f16")
            w = ops.multiply(w, ops.constant(halves[..., None]))
            w = ops.reshape(w, ops.constant(np.array([rows, columns], np.int64)), False)
            x = ops.parameter([-1, -1, columns], openvino.Type.f32)
            product = ops.matmul(x, ops.convert(w, "f32"), False, True)
            options = {
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "INFERENCE_PRECISION_HINT": "f32",
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": dynamic,
                "NUM_STREAMS": 1,
                "PERFORMANCE_HINT": "LATENCY",
                "ENABLE_CPU_PINNING": False,
            }
            compiled = core.compile_model(openvino.Model([product], [x]), "CPU", options)
            requests.append(compiled.create_infer_request())
        yield _weight(openvino, requests, dynamic, nbytes, kept)


def _weight(openvino: Any, requests: list[Any], dynamic: int, nbytes: int, kept: Any) -> Weight:
    def bind(x: torch.Tensor) -> Callable[[int], Any]:
        tensor = openvino.Tensor(x.numpy()[None], shared_memory=True)

        def call(i: int, _kept: Any = kept) -> Any:
            request = requests[i % len(requests)]
            request.set_input_tensor(tensor)
            request.infer()
            return request.get_output_tensor().data[0]

        return call

    return Weight(
        name=f"openvino i4 g64 {'dq64' if dynamic else 'fp32'}",
        package="openvino",
        dtypes=(F32,),
        nbytes=nbytes,
        copies=len(requests),
        bind=bind,
        activations="int8" if dynamic else "",
    )
