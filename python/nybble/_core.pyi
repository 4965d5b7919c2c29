"""Types of the Rust extension; `stubtest` compares them with it."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypedDict, final, type_check_only

__all__ = [
    "Checkpoint",
    "Prepared",
    "Rules",
    "__version__",
    "cpu",
    "cpu_features",
    "default_threads",
    "dequantize",
    "dequantize_checkpoint",
    "dequantize_rows",
    "error_stats",
    "formats",
    "int8_linear",
    "integer_linear",
    "integers",
    "layout",
    "pack_codes",
    "parse_quant_state",
    "prefer_huge_pages",
    "quant_state_key",
    "quantization_config",
    "quantize",
    "quantize_checkpoint",
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
def integer_linear(
    x: _Memory, weight: _Weight, bias: _Memory | None, out: _Memory, threads: int | None = None
) -> None: ...
def int8_linear(
    x: _Memory,
    weight: _Weight,
    bias: _Memory | None,
    threshold: float,
    out: _Memory,
    threads: int | None = None,
) -> None: ...
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
    def linear_backward(self, grad: _Memory, out: _Memory, threads: int | None = None) -> None: ...

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
