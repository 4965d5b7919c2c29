"""CUDA devices: whether there are any, which kernels they get, and loading those.

The ops themselves are `torch.ops.nybble.*`, like on a CPU. Nothing here touches the driver until
it is called.
"""

from __future__ import annotations

from nybble.cuda import ops, products
from nybble.cuda.place import devices, is_available, warmup

__all__ = ["devices", "is_available", "ops", "products", "warmup"]
