"""Read a checkpoint by parameter names, a tensor at a time.

torch is imported when a tensor is read, so that looking at a file does not wait for it.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble import _core
from nybble.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from nybble.qtensor import QTensor

# torch's names of safetensors' types. A type that this torch lacks is an error when it is read.
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What a parameter is, known without reading it.

    Attributes:
        shape: Shape of the weight.
        dtype: dtype of a dense tensor under its safetensors name (`BF16`); the one that a
            quantized weight had under its torch name (`bfloat16`).
        nbytes: Bytes in the files, scales and codebooks included.
        format: Name of the format, or None for a dense tensor.
        blocksize: Elements that share a scale, or None for a dense tensor.
        nested: Whether the scales are quantized themselves.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    format: str | None = None
    blocksize: int | None = None
    nested: bool = False


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over some parameters.

    Attributes:
        tensors: Number of parameters.
        elements: Their elements.
        bytes: Bytes in the files, scales and codebooks included.
        bits_per_weight: Bits that an element takes, everything included.
    """

    tensors: int
    elements: int
    bytes: int
    bits_per_weight: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a checkpoint holds.

    Attributes:
        total: Everything together.
        quantized: The quantized parameters together.
        formats: By format or dtype (`nf4`, `bf16`, ...).
    """

    total: Totals
    quantized: Totals
    formats: dict[str, Totals]

    def __str__(self) -> str:
        rows = [*self.formats.items(), ("total", self.total)]
        return "\n".join(
            f"{name:10} {row.tensors:6} tensors {row.elements:15,} elements {row.bytes:15,} bytes"
            f" {row.bits_per_weight:6.2f} bits/weight"
            for name, row in rows
        )


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        file: The file, or the directory where no single file is at fault.
        tensor: The tensor, or None where the trouble is with the file.
        problem: What was expected and what was found.
        remedy: What to do about it.
    """

    file: Path
    tensor: str | None
    problem: str
    remedy: str

    def __str__(self) -> str:
        tensor = "" if self.tensor is None else f"tensor '{self.tensor}': "
        return f"{self.file}: {tensor}{self.problem}; {self.remedy}"


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The result of `Checkpoint.verify`.

    Attributes:
        problems: Empty if nothing is wrong.
    """

    problems: list[Problem]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems)) or "no problems"


class Checkpoint(Mapping[str, Any]):
    """Parameters by name: `QTensor` where quantized, else a dense `torch.Tensor`.

    Each look-up reads from the file into fresh memory; nothing is kept or mapped.
    """

    def __init__(self, path: str | os.PathLike[str], repair: bool = False) -> None:
        self._core = _core.Checkpoint(path, repair)
        self.path = self._core.path
        self._names = dict.fromkeys(self._core.keys())

    def __getitem__(self, name: str) -> Any:
        self._check(name)
        row = self._core.entry(name)
        return self._quantized(name, row) if row["quantized"] else self._dense(name, row)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping would read the tensor to find out.

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} parameters)"

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of the directory's config.json; empty if there is none."""
        path = self.path / "config.json"
        if not path.is_file():
            return {}
        config: dict[str, Any] = json.loads(path.read_bytes())
        return config

    def entry(self, name: str) -> Entry:
        """Describe a parameter without reading it.

        Raises:
            KeyError: There is no such parameter.
            CheckpointError: What describes it is damaged.
        """
        self._check(name)
        row = self._core.entry(name)
        return Entry(
            shape=tuple(row["shape"]),
            dtype=row["dtype"],
            nbytes=row["bytes"],
            format=row.get("format"),
            blocksize=row.get("blocksize"),
            nested=row.get("nested", False),
        )

    def summary(self) -> Summary:
        """Count parameters and bytes by format; reads no weights.

        Raises:
            CheckpointError: What describes a parameter is damaged.
        """
        rows = self._core.summary()
        return Summary(
            total=Totals(**rows["total"]),
            quantized=Totals(**rows["quantized"]),
            formats={name: Totals(**row) for name, row in rows["formats"].items()},
        )

    def verify(self) -> Verification:
        """Look for damage: lengths, names, codebooks, and scales that are not finite.

        Reads all scales and no weights; what opening already refuses is not repeated here.
        """
        problems = [
            Problem(file=file, tensor=tensor, problem=problem, remedy=remedy)
            for file, tensor, problem, remedy in self._core.verify()
        ]
        return Verification(problems=problems)

    def _check(self, name: str) -> None:
        if name not in self._names:
            close = difflib.get_close_matches(str(name), self._names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise KeyError(f"{self.path} has no parameter {name!r}{hint}")

    def _read(self, name: str, part: str, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        import torch

        out = torch.empty(shape, dtype=dtype)
        self._core.read_into(name, part, (out.data_ptr(), out.nbytes, "uint8"))
        return out

    def _dense(self, name: str, row: dict[str, Any]) -> torch.Tensor:
        import torch

        dtype = getattr(torch, _DTYPES.get(row["dtype"], ""), None)
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: tensor '{name}': torch {torch.__version__} has no dtype for"
                f" {row['dtype']}"
            )
        if dtype == torch.bool:  # any byte may be in the file, torch allows 0 and 1
            return self._read(name, "data", row["shape"], torch.uint8) != 0
        return self._read(name, "data", row["shape"], dtype)

    def _quantized(self, name: str, row: dict[str, Any]) -> QTensor:
        import torch

        from nybble.qtensor import QTensor

        packed_dtype = getattr(torch, row["packed_dtype"])
        # Signed bytes keep the shape of the weight, codes in nibbles cannot.
        shape = row["shape"] if packed_dtype == torch.int8 else [row["packed"]]
        nested_absmax = nested_offset = None
        if row["nested"]:
            nested_absmax = self._read(name, "nested_absmax", [row["nested_scales"]], torch.float32)
            nested_offset = torch.tensor(row["nested_offset"], dtype=torch.float32)
        return QTensor(
            packed=self._read(name, "data", shape, packed_dtype),
            absmax=self._read(name, "absmax", [row["scales"]], getattr(torch, row["scale_dtype"])),
            format=row["format"],
            shape=torch.Size(row["shape"]),
            dtype=getattr(torch, row["dtype"]),
            blocksize=row["blocksize"],
            nested_absmax=nested_absmax,
            nested_offset=nested_offset,
        )


def open_checkpoint(path: str | os.PathLike[str], repair: bool = False) -> Checkpoint:
    """Open a safetensors file, or a directory of one model's safetensors.

    Only headers are read. bitsandbytes checkpoints and nybble's own are the same to the reader;
    absmax, quant_map, SCB and so on are no keys of their own.

    Args:
        path: A `.safetensors` file, or a directory with `model.safetensors` or
            `model.safetensors.index.json`.
        repair: Read weights that bitsandbytes damaged by saving them on a CPU after a forward
            pass (the scales are transposed and rounded to bfloat16) as well as can be; without
            it they are errors.

    Raises:
        CheckpointError: A file is damaged, or of a kind that is not read.
        OSError: A file is missing or cannot be read.
    """
    return Checkpoint(path, repair)
