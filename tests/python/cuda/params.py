"""The structs of cuda/params.h and the library of emulated kernels; needs ctypes only."""

from __future__ import annotations

import ctypes
from ctypes import (
    POINTER,
    Structure,
    c_double,
    c_float,
    c_int8,
    c_uint8,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import Any


def _fields(text: str) -> list[tuple[str, Any]]:
    """`p` pointers, `q` u64, `u` u32, `f` float, before a colon and names."""
    types = {"p": c_void_p, "q": c_uint64, "u": c_uint32, "f": c_float}
    groups = (group.split(":") for group in text.split())
    return [(name, types[kind]) for kind, names in groups for name in names.split(",")]


class Scales(Structure):
    _fields_ = _fields(
        "p:absmax,codes,codebook,nested_absmax,offset u:log2_blocksize,log2_nested_blocksize"
    )


class Dequantize4(Structure):
    _fields_ = [
        *_fields("p:packed,out q:first,n"),
        ("scales", Scales),
        ("values", c_float * 16),
    ]


class Encoder4(Structure):
    _fields_ = [
        ("step", c_float),
        ("pivots", c_float * 32),
        ("below", c_uint8 * 32),
        ("extra", c_float * 2),
        ("order", c_uint8 * 16),
    ]


class NonFinite(Structure):
    _fields_ = _fields("p:first u:zero,padding")


class Quantize4(Structure):
    _fields_ = [
        *_fields("p:x,packed,scales q:n"),
        ("nonfinite", NonFinite),
        *_fields("u:log2_blocksize,scale"),
        ("encoder", Encoder4),
    ]


class Dequantize8(Structure):
    _fields_ = _fields("p:codes,values,absmax,offset,out q:n u:log2_blocksize,padding")


class Quantize8(Structure):
    _fields_ = [
        *_fields("p:x,subtract,pivots,order,codes,absmax q:n"),
        ("nonfinite", NonFinite),
        *_fields("u:log2_blocksize,padding"),
    ]


class Mean(Structure):
    _fields_ = _fields("p:x,out q:n")


class Linear4(Structure):
    _fields_ = [
        *_fields("p:x,packed,bias,y q:m,n,k"),
        ("scales", Scales),
        ("values", c_float * 16),
        *_fields("u:bias_dtype,tokens,rows,padding"),
    ]


class Linear8(Structure):
    _fields_ = _fields("p:x,codes,values,absmax,bias,y q:m,n,k u:log2_blocksize,bias_dtype")


class IntegerRows(Structure):
    _fields_ = _fields("p:x,codes,factors q:rows,columns u:log2_group,padding")


class IntegerLinear4(Structure):
    _fields_ = [
        *_fields("p:codes,factors,packed,bias,y q:m,n,k"),
        ("scales", Scales),
        ("integers", c_int8 * 16),
        *_fields("f:step u:log2_group,bias_dtype,padding"),
    ]


class RunStats(Structure):
    _fields_ = [
        ("sums", c_double * 4),
        *_fields("f:max_abs,absmax_min,absmax_max u:padding q:outliers"),
    ]


class Compare(Structure):
    _fields_ = [
        *_fields("p:x,decoded,out q:first,n,run,block"),
        ("scales", Scales),
        *_fields("f:outlier_factor u:padding"),
    ]


class Outliers(Structure):
    _fields_ = _fields("p:columns,count")


class Int8Flags(Structure):
    _fields_ = _fields("p:x,flags q:rows,columns f:threshold u:padding")


class Int8Outliers(Structure):
    _fields_ = [*_fields("p:flags q:columns"), ("outliers", Outliers)]


class Int8Rows(Structure):
    _fields_ = [*_fields("p:x,flags,codes,absmax q:rows,columns"), ("nonfinite", NonFinite)]


class Int8Dequantize(Structure):
    _fields_ = _fields("p:codes,absmax,out q:rows,columns")


class Int8Linear(Structure):
    _fields_ = [
        *_fields("p:codes,sums,x_absmax,weight,absmax,bias,y,x"),
        ("outliers", Outliers),
        *_fields("q:m,n,k u:bias_dtype,padding"),
    ]


STRUCTS = (
    Scales, Dequantize4, Encoder4, NonFinite, Quantize4, Dequantize8, Quantize8, Mean, Linear4,
    Linear8, IntegerRows, IntegerLinear4, RunStats, Compare, Outliers, Int8Flags, Int8Outliers,
    Int8Rows, Int8Dequantize, Int8Linear,
)  # fmt: skip


class Emulator:
    """The library of tests/cuda/emulator."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.nybble_sizeof.restype = c_uint32
        self._library.nybble_emulate.argtypes = [
            ctypes.c_char_p, POINTER(c_uint32), POINTER(c_uint32), c_uint32, c_void_p,
        ]  # fmt: skip

    def order(self, seed: int) -> None:
        """The order of threads; 0 is their own."""
        self._library.nybble_emulate_order(seed)

    def knows(self, name: str) -> bool:
        """Whether there is such a kernel."""
        return bool(self._library.nybble_emulated(name.encode()))

    def count(self) -> int:
        """How many kernels there are."""
        return int(self._library.nybble_emulated_kernels())

    def sizeof(self, name: str) -> int:
        """Bytes of a struct of params.h."""
        return int(self._library.nybble_sizeof(name.encode()))

    def launch_last(
        self, name: str, params: Structure, grid: int, grid_y: int = 1, first: int | None = None
    ) -> None:
        """Run the last block along y only, and along x those from `first` on, or the last."""
        self._library.nybble_emulate_from(grid - 1 if first is None else first, grid_y - 1)
        try:
            self.launch(name, params, grid, grid_y=grid_y)
        finally:
            self._library.nybble_emulate_from(0, 0)

    def launch(
        self, name: str, params: Structure, grid: int, block: int = 256, grid_y: int = 1
    ) -> None:
        """Run one kernel."""
        grids, blocks = (c_uint32 * 3)(grid, grid_y, 1), (c_uint32 * 3)(block, 1, 1)
        shared = self._library.nybble_emulated_shared(name.encode())
        status = self._library.nybble_emulate(
            name.encode(), grids, blocks, shared, ctypes.byref(params)
        )
        assert status == 0, f"{name}: status {status}"


def pieces(n: int, each: int, most: int = 3) -> int:
    """A grid; small, so that blocks take more than one piece."""
    return max(1, min(most, -(-n // each)))
