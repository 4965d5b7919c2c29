"""What became of each parameter of a model."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Row:
    """One parameter.

    Attributes:
        name: Full name of the parameter.
        kind: Class of the module that has it.
        shape: Shape of the parameter as the model had it.
        format: What it is stored as now: a format, or the dtype that it kept.
        reason: Why it was kept, or could not be quantized; empty if it was quantized.
        bytes_before: Bytes before; 0 if it shares memory with one counted already.
        bytes_after: Bytes after, scales included.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    format: str
    reason: str = ""
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """The receipt of `quantize_model`.

    Attributes:
        quantized: Parameters that were quantized.
        kept: Parameters that stay as they were on purpose, each with its reason.
        unsupported: Parameters with two or more dimensions that nybble has no layer for.
        unused: Patterns that matched no module.
    """

    quantized: list[Row] = field(default_factory=list)
    kept: list[Row] = field(default_factory=list)
    unsupported: list[Row] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        """Every parameter."""
        return [*self.quantized, *self.kept, *self.unsupported]

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters before."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all parameters after, scales included."""
        return sum(row.bytes_after for row in self.rows)

    def __str__(self) -> str:
        counts = (
            f"{len(self.quantized)} quantized, {len(self.kept)} kept,"
            f" {len(self.unsupported)} unsupported"
        )
        lines = [
            f"{counts}; {self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB",
            *_group("quantized", self.quantized, lambda row: row.format),
            *_group("kept", self.kept, lambda row: f"{row.format}, {row.reason}"),
            *(
                f"  UNSUPPORTED {row.name} {list(row.shape)} ({row.kind}): {row.reason},"
                f" {row.bytes_after / 1e6:.1f} MB stay {row.format}"
                for row in self.unsupported
            ),
            *(f"  pattern '{pattern}' matched nothing" for pattern in self.unused),
        ]
        return "\n".join(lines)


def _group(verb: str, rows: list[Row], label: object) -> list[str]:
    """One line for all rows with the same label."""
    assert callable(label)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(label(row), []).append(row)
    return [
        f"  {verb:9} {len(members):4} x {name}: {sum(r.bytes_before for r in members) / 1e6:.1f} MB"
        f" -> {sum(r.bytes_after for r in members) / 1e6:.1f} MB (first: {members[0].name})"
        for name, members in groups.items()
    ]
