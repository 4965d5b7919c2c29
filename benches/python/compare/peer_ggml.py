"""ggml, through the shared library that a Python package of llama.cpp carries."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compare.weights import F32, Unavailable, Weight, copies_of

#: Of `enum ggml_type` in ggml.h.
_F32 = 0
_TYPES = {"q4_0": 2, "iq4_nl": 20, "q4_K": 12, "q8_0": 8}

#: Their encoders search for long: a part of the weight is quantized and repeated.
_SLOW = ("q4_K", "iq4_nl")

#: Bytes for descriptions: a graph takes about 80 KiB, and each copy of a weight has one.
_CONTEXT = 32 << 20

_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_alloc_ctx_tensors": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_get_device": (c_void_p, [c_void_p]),
    "ggml_backend_get_default_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_cpu_has_avx512": (c_int, []),
    "ggml_log_set": (None, [c_void_p, c_void_p]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p],
    ),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
}


class _InitParams(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = [("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool)]


class Ggml:
    """The functions used here, of whichever package has them, and a CPU backend."""

    def __init__(self) -> None:
        self.package, libraries = _find()
        for name, (result, arguments) in (
            _FUNCTIONS | {"ggml_init": (c_void_p, [_InitParams])}
        ).items():
            function = next((getattr(lib, name) for lib in libraries if hasattr(lib, name)), None)
            if function is None:
                raise Unavailable(f"ggml: {self.package} does not export {name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self._silence = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda *_: None)
        self.ggml_log_set(self._silence, None)
        self.backend = self.ggml_backend_cpu_init()
        self.ggml_backend_cpu_set_n_threads(self.backend, torch.get_num_threads())
        self.kernels = "AVX-512" if self.ggml_cpu_has_avx512() else "no AVX-512"

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def context(self) -> int:
        """A context for descriptions of tensors, without their memory."""
        made: int = self.ggml_init(_InitParams(_CONTEXT, None, True))
        return made

    def repacking(self) -> int | None:
        """The buffer type that interleaves rows for its kernels as llama.cpp uses it."""
        registry = self.ggml_backend_cpu_reg()
        found = self.ggml_backend_reg_get_proc_address(
            registry, b"ggml_backend_dev_get_extra_bufts"
        )
        if not found:
            return None
        signature = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)
        listed = signature(found)(self.ggml_backend_get_device(self.backend))
        for i in range(8):
            if not listed or not listed[i]:
                return None
            if self.ggml_backend_buft_name(listed[i]) == b"CPU_REPACK":
                address: int = listed[i]
                return address
        return None


def weights(dense: torch.Tensor, types: tuple[str, ...] = tuple(_TYPES)) -> Iterator[Weight]:
    """The weight in each of ggml's types, in the order its kernels like best."""
    ggml = Ggml()
    rows, columns = dense.shape
    for name in types:
        type = _TYPES[name]
        packed = quantized(ggml, dense, name)
        count = copies_of(packed.nbytes)
        context = ggml.context()
        tensors = [ggml.ggml_new_tensor_2d(context, type, columns, rows) for _ in range(count)]
        # Only these have kernels for interleaved rows; q4_K is widened tile by tile instead.
        buffers = ggml.repacking() if name in ("q4_0", "iq4_nl") else None
        buffers = buffers or ggml.ggml_backend_get_default_buffer_type(ggml.backend)
        if not ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, buffers):
            raise Unavailable(f"ggml: no memory for {name}")
        for tensor in tensors:
            ggml.ggml_backend_tensor_set(tensor, packed.ctypes.data, 0, packed.nbytes)
        yield Weight(
            name=f"ggml {name}",
            package="ggml",
            dtypes=(F32,),
            nbytes=packed.nbytes,
            copies=count,
            bind=_binder(ggml, tensors, rows),
            activations="int8",
            repeated=name in _SLOW,
        )


def quantized(ggml: Ggml, dense: torch.Tensor, name: str) -> Any:
    """Bytes of the weight in one type."""
    rows, columns = dense.shape
    size = rows * ggml.ggml_row_size(_TYPES[name], columns)
    packed = np.empty(size, np.uint8)
    source = dense.numpy()
    to = packed.ctypes.data
    if name in _SLOW:
        part = max(1, rows // 16)
        few = ggml.ggml_quantize_chunk(_TYPES[name], source.ctypes.data, to, 0, part, columns, None)
        packed[few:] = np.resize(packed[:few], size - few)
    else:
        ggml.ggml_quantize_chunk(_TYPES[name], source.ctypes.data, to, 0, rows, columns, None)
    return packed


def _binder(
    ggml: Ggml, tensors: list[int], rows: int
) -> Callable[[torch.Tensor], Callable[[int], Any]]:
    def bind(x: torch.Tensor) -> Callable[[int], Any]:
        context = ggml.context()
        entry = ggml.ggml_new_tensor_2d(context, _F32, x.shape[1], x.shape[0])
        results, graphs = [], []
        for tensor in tensors:
            results.append(ggml.ggml_mul_mat(context, tensor, entry))
            graphs.append(ggml.ggml_new_graph(context))
            ggml.ggml_build_forward_expand(graphs[-1], results[-1])
        ggml.ggml_backend_alloc_ctx_tensors(context, ggml.backend)
        ggml.ggml_backend_tensor_set(entry, x.data_ptr(), 0, x.numel() * 4)
        out = torch.empty(x.shape[0], rows, dtype=F32)

        def call(i: int) -> torch.Tensor:
            at = i % len(graphs)
            ggml.ggml_backend_graph_compute(ggml.backend, graphs[at])
            if i == 0:  # only the check of the result looks at it
                ggml.ggml_backend_tensor_get(results[at], out.data_ptr(), 0, out.numel() * 4)
            return out

        return call

    return bind


def _find() -> tuple[str, list[ctypes.CDLL]]:
    """The package that carries ggml, and its libraries."""
    for package, pattern in (("llama_cpp", "lib/libggml*.so"), ("xllamacpp", "*.so")):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        # The base library first: the others need it.
        files = sorted(Path(spec.origin).parent.glob(pattern), key=lambda file: len(file.name))
        order = sorted(files, key=lambda file: ("base" not in file.name, "cpu" not in file.name))
        try:
            return package, [ctypes.CDLL(str(file), ctypes.RTLD_GLOBAL) for file in order]
        except OSError as error:
            raise Unavailable(f"ggml: {package} cannot be loaded: {error}") from error
    raise Unavailable("ggml: neither llama-cpp-python nor xllamacpp is installed")
