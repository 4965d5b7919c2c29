"""What is not offered, and why: the text of the `AttributeError` of each such name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import NoReturn

# bitsandbytes version whose names, arguments and bytes are mirrored.
MIRRORED_VERSION = "0.50.2"

_OPTIMIZER = "nybble has no optimizers yet; use torch.optim meanwhile"
_INTERNAL = "it belongs to bitsandbytes' own native library; nybble has no such step"
_RENAMED = "its contents are at the top: matmul, matmul_4bit and MatmulLtState"

NOT_OFFERED: dict[str, dict[str, str]] = {
    "nybble.compat.bitsandbytes": {
        "optim": _OPTIMIZER,
        "research": "it holds experiments (switchback, fp8 products) that are not kept up there",
        "autograd": _RENAMED,
        "backends": "kernels are registered for torch.ops.nybble",
        "cextension": _INTERNAL,
        "cuda_specs": _INTERNAL,
        "consts": _INTERNAL,
        "diagnostics": "run `python -m nybble --help` for nybble's own commands",
        "__version__": (
            "this is not bitsandbytes and does not claim a version of it; see nybble.__version__"
            f" and MIRRORED_VERSION ({MIRRORED_VERSION}), the version whose interface it mirrors"
        ),
    },
    "nybble.compat.bitsandbytes.functional": {
        "optimizer_update_32bit": _OPTIMIZER,
        "optimizer_update_8bit_blockwise": _OPTIMIZER,
        "str2optimizer32bit": _OPTIMIZER,
        "str2optimizer8bit_blockwise": _OPTIMIZER,
        "name2qmap": "call create_dynamic_map; there is no cache of maps to share",
        "GlobalPageManager": "paged memory belongs to the optimizers, which are not there yet",
        "get_paged": "paged memory belongs to the optimizers, which are not there yet",
        "prefetch_tensor": "paged memory belongs to the optimizers, which are not there yet",
        "elementwise_func": "use torch.Tensor.mul_ or torch.Tensor.fill_",
        "fill": "use torch.Tensor.fill_",
        "igemm": "deprecated there too; use int8_linear_matmul",
        "batched_igemm": "deprecated there too; use int8_linear_matmul for each matrix",
        "check_matmul": "deprecated there too; torch checks shapes itself",
        "is_on_gpu": "torch checks devices itself",
        "get_ptr": "use torch.Tensor.data_ptr",
        "lib": _INTERNAL,
        "CUBLAS_Context": _INTERNAL,
        "FIRST_CUDA_DEVICE": "use torch.device('cuda', 0)",
        "has_avx512bf16": "weights are never repacked, so nothing depends on it; see nybble._core",
        "C": "it is 127.0, the largest code of int8",
    },
    "nybble.compat.bitsandbytes.nn": {
        "OutlierAwareLinear": (
            "it is a stub there: its methods raise NotImplementedError; use Linear8bitLt with a"
            " threshold"
        ),
    },
    "nybble.compat.bitsandbytes.utils": {
        "OutlierTracer": "it serves OutlierAwareLinear, a stub",
        "outlier_hook": "it serves OutlierAwareLinear, a stub",
        "find_outlier_dims": "it serves OutlierAwareLinear, a stub",
        "replace_linear": "use nybble.quantize_model, which reports what it did",
        "execute_and_return": "use subprocess.run",
        "sync_gpu": "use torch.cuda.synchronize",
    },
}
NOT_OFFERED["nybble.compat.bitsandbytes.nn.modules"] = NOT_OFFERED["nybble.compat.bitsandbytes.nn"]


def explain_missing(module: str, offered: Iterable[str]) -> Callable[[str], NoReturn]:
    """Make the `__getattr__` of a module: says why a name is not there, or what was meant."""
    reasons = NOT_OFFERED.get(module, {})

    def missing(name: str) -> NoReturn:
        if name in reasons:
            raise AttributeError(f"'{module}' does not offer '{name}': {reasons[name]}")
        close = difflib.get_close_matches(name, list(offered), n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise AttributeError(f"module '{module}' has no attribute '{name}'{hint}")

    return missing
