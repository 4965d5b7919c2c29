"""Types of the Rust extension; `stubtest` compares them with it."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypedDict, final, type_check_only

__all__ = [
    "Checkpoint",
    "CudaWeight",
    "Prepared",
    "Rules",
    "__version__",
    "codebook_tables",
    "cpu",
    "cpu_features",
    "cuda_available",
    "cuda_devices",
    "cuda_driver_present",
    "cuda_error_stats",
    "cuda_int8_linear",
    "cuda_int8_outliers",
    "cuda_int8_rows",
    "cuda_most_rows",
    "cuda_quantize",
    "cuda_warmup",
    "default_threads",
    "dequantize",
    "dequantize_checkpoint",
    "dequantize_rows",
    "error_stats",
    "formats",
    "integers",
    "layout",
    "pack_codes",
    "parse_quant_state",
    "prefer_huge_pages",
    "quant_state_key",
    "quantization_config",
    "quantize",
    "quantize_checkpoint",
    "refuse_nonfinite",
    "render_quant_state",
    "unpack_codes",
]

# (address, number of elements, dtype name)
_Memory = tuple[int, int, str]
# (format, shape, blocksize, packed, absmax, nested_absmax, nested_offset)
_Weight = tuple[str, list[int], int, _Memory, _Memory, _Memory | None, _Memory | None]

@type_check_only
class FormatRow(TypedDict):
    name: str
    bits: int
    decode: str
    codebook: list[float] | None
    scale: str
    scale_dtype: str | None
    blocksizes: list[int]
    default_blocksize: int
    nestable: bool
    source: str

@type_check_only
class Figures(TypedDict):
    count: int
    sqnr_db: float
    mse: float
    max_abs: float
    rel_rms: float
    cosine: float
    absmax_min: float
    absmax_max: float
    outliers: int

__version__: Final[str]

def formats() -> list[FormatRow]: ...
def layout(
    format: str, shape: Sequence[int], blocksize: int | None = None, nested: bool = False
) -> tuple[int, int, int, int]: ...
def quantize(
    x: _Memory,
    weight: _Weight,
    reference: str = "exact",
    nonfinite: str = "error",
    threads: int | None = None,
) -> None: ...
def dequantize(
    weight: _Weight, out: _Memory, first: int = 0, threads: int | None = None
) -> None: ...
def prefer_huge_pages(fresh: _Memory) -> None: ...
def dequantize_rows(
    weight: _Weight, rows: _Memory, out: _Memory, threads: int | None = None
) -> None: ...
def error_stats(x: _Memory, weight: _Weight, threads: int | None = None) -> Figures: ...
def integers(format: str) -> tuple[list[int], float]: ...
def pack_codes(codes: _Memory, order: str, packed: _Memory) -> None: ...
def unpack_codes(packed: _Memory, order: str, codes: _Memory) -> None: ...
def cpu() -> tuple[str, list[str]]: ...
def cpu_features() -> list[str]: ...
def default_threads() -> int: ...

@final
class Prepared:
    def __new__(cls, weight: _Weight) -> Prepared: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    def is_at(self, packed: int, absmax: int, nested: tuple[int, int] | None = None) -> bool: ...
    def linear(
        self, x: _Memory, bias: _Memory | None, out: _Memory, threads: int | None = None
    ) -> None: ...
    def integer_linear(
        self, x: _Memory, bias: _Memory | None, out: _Memory, threads: int | None = None
    ) -> None: ...
    def int8_linear(
        self,
        x: _Memory,
        bias: _Memory | None,
        out: _Memory,
        threads: int | None,
        threshold: float,
    ) -> None: ...
    def linear_backward(self, grad: _Memory, out: _Memory, threads: int | None = None) -> None: ...

# (number of the device, handle of a stream)
_Place = tuple[int, int]
# values, pivots and order of a codebook of 256 on the device
_Tables = tuple[_Memory, ...]

@type_check_only
class CudaDevice(TypedDict):
    name: str
    capability: tuple[int, int]
    kernels: str

def cuda_available() -> None: ...
def cuda_driver_present() -> bool: ...
def cuda_devices(nvrtc: str | None = None) -> tuple[int, list[CudaDevice]]: ...
def cuda_warmup(place: _Place, nvrtc: str | None = None) -> str: ...
def cuda_most_rows(format: str, columns: int, dtype: str, place: _Place) -> int: ...
def codebook_tables(format: str) -> tuple[list[float], list[float], bytes]: ...
def cuda_quantize(
    x: _Memory,
    weight: _Weight,
    tables: _Tables | None,
    scratch: _Memory | None,
    first: _Memory | None,
    zero: bool,
    place: _Place,
) -> None: ...
def cuda_error_stats(runs: _Memory, elements: int) -> Figures: ...
def refuse_nonfinite(index: int, value: float) -> None: ...
def cuda_int8_rows(
    x: _Memory,
    flags: _Memory | None,
    codes: _Memory,
    absmax: _Memory,
    rows: int,
    place: _Place,
) -> None: ...
def cuda_int8_outliers(
    outliers: tuple[_Memory, _Memory, _Memory], flags: _Memory, threshold: float, place: _Place
) -> None: ...
def cuda_int8_linear(
    integers: _Memory,
    x_absmax: _Memory,
    weight: _Weight,
    outliers: tuple[_Memory, _Memory, _Memory] | None,
    bias: _Memory | None,
    out: _Memory,
    place: _Place,
) -> None: ...

@final
class CudaWeight:
    def __new__(cls, weight: _Weight, tables: _Tables | None = None) -> CudaWeight: ...
    def is_at(self, packed: int, absmax: int, nested: tuple[int, int] | None = None) -> bool: ...
    def dequantize(self, out: _Memory, first: int, place: _Place) -> None: ...
    def linear(self, x: _Memory, bias: _Memory | None, out: _Memory, place: _Place) -> None: ...
    def integer_linear(
        self,
        x: _Memory,
        scratch: tuple[_Memory, _Memory],
        bias: _Memory | None,
        out: _Memory,
        place: _Place,
    ) -> None: ...
    def run(self) -> tuple[int, int]: ...
    def compare(
        self, x: _Memory, decoded: _Memory, first: int, out: _Memory, place: _Place
    ) -> None: ...

@final
class Rules:
    def __new__(cls, skip: Sequence[str], overrides: Mapping[str, str]) -> Rules: ...
    def decide(self, name: str) -> str | None: ...
    def unused(self) -> list[str]: ...

def quant_state_key(format: str) -> str | None: ...
def render_quant_state(
    format: str,
    blocksize: int,
    dtype: str,
    shape: Sequence[int],
    nested_offset: float | None = None,
) -> str: ...
def parse_quant_state(
    text: bytes, repair: bool = False
) -> tuple[str, int, str, list[int], float | None]: ...
def quantization_config(
    format: str,
    blocksize: int,
    nested: bool,
    compute_dtype: str,
    skip: Sequence[str],
    overrides: dict[str, str],
) -> str: ...
def quantize_checkpoint(
    source: str,
    destination: str,
    format: str,
    *,
    nested: bool = False,
    blocksize: int | None = None,
    skip: Sequence[str] | None = None,
    overrides: dict[str, str] | None = None,
    max_memory: int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    on_progress: Callable[[int, int, str], object] | None = None,
    reference: str = "exact",
    nonfinite: str = "error",
    dtype: str | None = None,
    experts: bool = False,
) -> str: ...
def dequantize_checkpoint(
    source: str,
    destination: str,
    dtype: str | None = None,
    *,
    max_memory: int | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    on_progress: Callable[[int, int, str], object] | None = None,
) -> str: ...

@type_check_only
class Counts(TypedDict):
    tensors: int
    elements: int
    bytes: int
    bits_per_weight: float

@type_check_only
class SummaryRows(TypedDict):
    total: Counts
    quantized: Counts
    formats: dict[str, Counts]

@final
class Checkpoint:
    def __new__(cls, path: str | os.PathLike[str], repair: bool = False) -> Checkpoint: ...
    @property
    def path(self) -> Path: ...
    def keys(self) -> list[str]: ...
    def entry(self, name: str) -> dict[str, Any]: ...
    def read_into(self, name: str, part: str, out: _Memory, first: int = 0) -> None: ...
    def summary(self) -> SummaryRows: ...
    def verify(self) -> list[tuple[Path, str | None, str, str]]: ...
