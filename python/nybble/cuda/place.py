"""Where kernels run: a device and torch's current stream on it, with kernels loaded."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nybble import _core, ops
from nybble._memory import Memory, memory
from nybble.errors import DeviceError, FormatError

if TYPE_CHECKING:
    from nybble._core import CudaDevice

# The number of a device, and the handle of a stream of it.
Place = tuple[int, int]

_warm: set[int] = set()


def is_available() -> bool:
    """Whether there are a driver, a device that kernels can run on, and a torch with CUDA."""
    try:
        _check_torch()
        _core.cuda_available()
    except DeviceError:
        return False
    return True


def _check_torch() -> None:
    if torch.version.cuda is None:
        raise DeviceError(
            f"torch {torch.__version__} was built without CUDA: it has no tensors on CUDA devices;"
            " install a torch with CUDA"
        )


def devices() -> list[CudaDevice]:
    """Name, compute capability and kernels of each device; makes no context on any.

    Raises:
        DeviceError: There is no driver or no device; the message says what to do.
    """
    return _core.cuda_devices(nvrtc_library())[1]


def warmup(device: int | str | torch.device | None = None) -> str:
    """Load the kernels of a device now, rather than at the first call.

    Moving a quantized tensor or module to a device does this too. It must have happened before
    work on the device is captured in a graph.

    Args:
        device: As torch names it; None for the current one.

    Returns:
        Which compiled form was loaded, like `sm_90`.

    Raises:
        DeviceError: No driver, no such device, no kernels for it, a capture is going on, or a
            torch without CUDA.
    """
    _core.cuda_available()
    _check_torch()
    # Else torch does not know of any stream yet.
    torch.cuda.init()  # type: ignore[no-untyped-call]
    index = torch.cuda._utils._get_device_index(device, optional=True)
    return _warm_up(index, torch.device("cuda", index))


def _warm_up(index: int, device: torch.device) -> str:
    loaded = _core.cuda_warmup((index, _stream(index)), nvrtc_library())
    for format in ("dynamic8", "dynamic8u"):
        tables(format, device)
    _warm.add(index)
    return loaded


def follow(moved: Tensor) -> None:
    """Load the kernels of the device to which a tensor was just moved, if it has kernels.

    A tracer's tensors are nowhere. Kernels that cannot be had are an error where they are used:
    a tensor may be moved all the same.
    """
    device = moved.device
    if device.type != "cuda" or not ops.HAS_CUDA or device.index in _warm:
        return
    if isinstance(moved, FakeTensor) or torch._C._len_torch_dispatch_stack() > 0:
        return
    with contextlib.suppress(DeviceError):
        _warm_up(device.index, device)


def _stream(index: int) -> int:
    handle: int = torch._C._cuda_getCurrentRawStream(index)
    return handle


def where(tensor: Tensor) -> Place:
    """The device of a tensor and the stream on which torch works on it at the moment."""
    _need(tensor.device)
    return tensor.device.index, _stream(tensor.device.index)


def _need(device: torch.device) -> None:
    """Load the kernels of a CUDA device, unless they are."""
    if device.type == "cuda" and device.index not in _warm:
        _warm_up(device.index, device)


@functools.cache
def tables(format: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Values, pivots and order of a codebook of 256, on a device."""
    values, pivots, order = _core.codebook_tables(format)
    return (
        torch.tensor(values, dtype=torch.float32, device=device),
        torch.tensor(pivots, dtype=torch.float32, device=device),
        torch.tensor(list(order), dtype=torch.uint8, device=device),
    )


def tables_for(format: str, nested: bool, device: torch.device) -> tuple[Memory, ...] | None:
    """The tables that a tensor's kernels read from memory, as Rust takes them."""
    if nested:
        format = "dynamic8"
    elif format not in ("dynamic8", "dynamic8u"):
        return None
    _need(device)  # copies tables there, which a capture would not allow and could not explain
    return tuple(memory(table) for table in tables(format, device))


def weight(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    shape: Sequence[int],
) -> _core.CudaWeight:
    """The description of a quantized tensor in device memory, with its lengths checked."""
    check_together(packed, absmax, nested_absmax, nested_offset)
    parts = ops.weight(packed, absmax, nested_absmax, nested_offset, format, blocksize, shape)
    return _core.CudaWeight(parts, tables_for(format, nested_absmax is not None, packed.device))


def check_together(first: Tensor, *others: Tensor | None) -> None:
    """Whether tensors are on one device and without gaps.

    Raises:
        DeviceError: Two devices.
        FormatError: A tensor whose memory has gaps.
    """
    for tensor in (first, *others):
        if tensor is None:
            continue
        if tensor.device != first.device:
            raise DeviceError(
                f"one tensor is on {first.device}, another on {tensor.device}; move both to one"
                " device"
            )
        if not tensor.is_contiguous():
            raise FormatError(
                f"a tensor of shape {tuple(tensor.shape)} has strides {tensor.stride()}; pass it"
                " contiguous"
            )


def aligned(x: Tensor) -> Tensor:
    """The tensor, contiguous and where kernels can read 16 bytes at a time; a copy if need be."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


@functools.cache
def nvrtc_library() -> str | None:
    """The library that compiles kernels, from torch's own packages; None if it is not installed."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or []) if spec is not None else []
    patterns = ("*/lib/libnvrtc.so.*", "*/bin/nvrtc64_*_0.dll", "*/bin/*/nvrtc64_*_0.dll")
    found = [path for root in roots for pattern in patterns for path in Path(root).glob(pattern)]
    # The one that torch itself uses, where there are several.
    major = (torch.version.cuda or "").split(".")[0]
    found.sort(key=lambda path: (f".{major}" in path.name or f"_{major}" in path.name, str(path)))
    return str(found[-1]) if found else None
