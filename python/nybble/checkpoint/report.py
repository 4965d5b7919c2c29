"""What was done to a checkpoint, tensor by tensor."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

from nybble.checkpoint.sizes import format_size


@dataclass(frozen=True, kw_only=True)
class TensorStats:
    """Figures about the quantization of one tensor.

    Attributes:
        count: Elements.
        sqnr_db: Signal to quantization noise in decibels; infinite without error.
        mse: Mean squared error.
        max_abs: Largest error.
        rel_rms: Root of squared error over squared signal.
        cosine: Cosine between the original and what it decodes to.
        absmax_min: Smallest scale of a block or row.
        absmax_max: Largest scale of a block or row.
        outliers: Elements above four times the root mean square of their block or row.
        zeroed: NaN and infinite elements that were stored as 0.
        histogram: How often each code occurs.
    """

    count: int
    sqnr_db: float
    mse: float
    max_abs: float
    rel_rms: float
    cosine: float
    absmax_min: float
    absmax_max: float
    outliers: int
    zeroed: int
    histogram: list[int]


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """What became of one tensor.

    Attributes:
        name: Its name.
        shape: Its shape in the source.
        format: What it is stored as now: a format, or an element type.
        kept: Why it is not quantized; None where it is.
        bytes_before: Bytes in the source.
        bytes_after: Bytes now, with everything that is needed to decode it.
        bits_per_weight: Bits now for each element.
        stats: What quantization did to it; None where it was not quantized or is only planned.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    kept: str | None
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    stats: TensorStats | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was done to a checkpoint.

    Attributes:
        command: `quantize` or `dequantize`.
        source: Where the tensors came from.
        destination: Where they went.
        dry_run: Whether this is only what would be done.
        format: The format of what no override names.
        blocksize: Elements that share a scale, where the format has blocks.
        nested: Whether the scales are quantized too.
        quant_method: Who can read the result: `bitsandbytes`, `nybble`, or anyone (`none`).
        tensors: The tensors.
        parameters: Elements of all tensors.
        bytes_before: Bytes of all tensors in the source.
        bytes_after: Bytes of all tensors now.
        bits_per_weight: Bits now for each element of the checkpoint.
        quantized_bits_per_weight: The same over what is quantized; None where nothing is.
        files: The files with tensors.
        memory_bytes: Memory that the work takes.
        seconds: Time that it took.
        warnings: What the user should know.
    """

    command: str
    source: str
    destination: str
    dry_run: bool
    format: str
    blocksize: int | None
    nested: bool
    quant_method: str
    tensors: tuple[TensorReport, ...]
    parameters: int
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    quantized_bits_per_weight: float | None
    files: tuple[str, ...]
    memory_bytes: int
    seconds: float
    warnings: tuple[str, ...]
    _json: str

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote."""
        data: dict[str, Any] = json.loads(text)
        totals = data.pop("totals")
        data.pop("schema_version")
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in {**data, **totals}.items() if key in known}
        values["tensors"] = tuple(_tensor(row) for row in data["tensors"])
        values["files"] = tuple(data["files"])
        values["warnings"] = tuple(data["warnings"])
        return cls(**values, _json=text)

    def to_json(self) -> str:
        """Everything as one JSON document with a `schema_version`."""
        return self._json

    def worst(self, n: int = 5) -> list[TensorReport]:
        """The quantized tensors with the lowest signal to noise ratio, the worst first."""
        rated = [(row.stats.sqnr_db, row) for row in self.tensors if row.stats is not None]
        return [row for _, row in sorted(rated, key=lambda pair: pair[0])[:n]]

    def __str__(self) -> str:
        groups: dict[str, list[TensorReport]] = {}
        for row in self.tensors:
            groups.setdefault(f"{row.format}: {row.kept}" if row.kept else row.format, []).append(
                row
            )
        lines = [
            f"{'stored as':48} {'tensors':>7} {'before':>10} {'after':>10} {'SQNR dB':>8}",
        ]
        for label, rows in groups.items():
            before = format_size(sum(row.bytes_before for row in rows))
            after = format_size(sum(row.bytes_after for row in rows))
            noise = [row.stats.sqnr_db for row in rows if row.stats is not None]
            mean = f"{sum(noise) / len(noise):8.2f}" if noise else f"{'-':>8}"
            lines.append(f"{label[:48]:48} {len(rows):7} {before:>10} {after:>10} {mean}")
        before, after = format_size(self.bytes_before), format_size(self.bytes_after)
        lines.append(f"{'total':48} {len(self.tensors):7} {before:>10} {after:>10}")
        bits = f"{self.bits_per_weight:.3f} bits per weight"
        if self.quantized_bits_per_weight is not None and self.command == "quantize":
            bits += f", {self.quantized_bits_per_weight:.3f} where quantized"
        memory = format_size(self.memory_bytes)
        verb = "would take" if self.dry_run else f"{self.seconds:.1f} s,"
        lines.append(f"{bits}; {verb} at most {memory} of memory")
        lines.extend(f"warning: {warning}" for warning in self.warnings)
        return "\n".join(lines)


def _tensor(row: dict[str, Any]) -> TensorReport:
    stats = row["stats"]
    if stats is not None:
        # JSON has no infinity: null is a tensor without any error.
        noise = stats["sqnr_db"]
        stats = TensorStats(**{**stats, "sqnr_db": float("inf") if noise is None else noise})
    return TensorReport(**{**row, "shape": tuple(row["shape"]), "stats": stats})
