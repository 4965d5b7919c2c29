"""The interface of bitsandbytes, served by nybble.

    import nybble.compat.bitsandbytes as bnb

Names, arguments, defaults, shapes and state dict keys are those of bitsandbytes (see
`MIRRORED_VERSION`); the work is done by nybble's own formats, ops and kernels. It is not
bitsandbytes: it registers nothing under that name and needs no bitsandbytes to be installed.
`docs/from_bitsandbytes.md` lists, name by name, what is the same, better, or not offered.
"""

from __future__ import annotations

from nybble.compat.bitsandbytes import functional, nn, utils
from nybble.compat.bitsandbytes._offered import MIRRORED_VERSION, explain_missing
from nybble.compat.bitsandbytes._products import MatmulLtState, matmul, matmul_4bit

# What transformers and accelerate ask for before they quantize on other devices than CUDA.
features = {"multi_backend"}
supported_torch_devices = {"cpu", "cuda"}

__all__ = [
    "MIRRORED_VERSION",
    "MatmulLtState",
    "features",
    "functional",
    "matmul",
    "matmul_4bit",
    "nn",
    "supported_torch_devices",
    "utils",
]

__getattr__ = explain_missing(__name__, __all__)
