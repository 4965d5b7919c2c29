"""onnxruntime: the contrib op MatMulNBits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from compare.blocks import low_first, symmetric4
from compare.weights import F32, Unavailable, Weight, copies_of


def four_bit(weight: torch.Tensor, groups: tuple[int, ...] = (64, 128)) -> Iterator[Weight]:
    """accuracy_level 4: activations become int8.

    One session holds all copies, and one run computes all of their products: many sessions would
    each keep threads that spin.
    """
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise Unavailable(f"onnxruntime: {error}") from error

    rows, columns = weight.shape
    for group in groups:
        codes, scales = symmetric4(weight, group)
        packed = low_first(codes)
        nbytes = packed.nbytes + scales.nbytes
        count = copies_of(nbytes)
        nodes, constants, outputs = [], [], []
        for i in range(count):
            nodes.append(
                helper.make_node(
                    "MatMulNBits",
                    ["A", f"B{i}", f"S{i}"],
                    [f"Y{i}"],
                    domain="com.microsoft",
                    K=columns,
                    N=rows,
                    bits=4,
                    block_size=group,
                    accuracy_level=4,
                )
            )
            # Rows are rolled, so that equal weights are not shared.
            constants.append(numpy_helper.from_array(np.roll(packed, i, 0), f"B{i}"))
            constants.append(numpy_helper.from_array(np.roll(scales, i, 0).reshape(-1), f"S{i}"))
            outputs.append(helper.make_tensor_value_info(f"Y{i}", TensorProto.FLOAT, ["M", rows]))
        entry = helper.make_tensor_value_info("A", TensorProto.FLOAT, ["M", columns])
        graph = helper.make_graph(nodes, "products", [entry], outputs, constants)
        versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=versions, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "1")
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        del model, graph, constants
        yield _weight(session, group, nbytes, count)


def _weight(session: Any, group: int, nbytes: int, count: int) -> Weight:
    def bind(x: torch.Tensor) -> Callable[[int], Any]:
        array = x.numpy()
        return lambda _: session.run(None, {"A": array})[0]

    return Weight(
        name=f"onnxruntime MatMulNBits g{group} acc4",
        package="onnxruntime",
        dtypes=(F32,),
        nbytes=nbytes,
        copies=1,
        bind=bind,
        per_call=count,
        activations="int8",
    )
