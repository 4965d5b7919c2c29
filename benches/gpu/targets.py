"""What the kernels are to reach on an H100, and what a run says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Findings = dict[tuple[str, str], dict[str, Any]]

LARGE, SQUARE = "14336x4096", "4096x4096"


@dataclass(frozen=True)
class Target:
    """A figure and its bound; `least` says on which side of it is good."""

    name: str
    bound: float
    least: bool
    figure: Callable[[Findings], float | None]

    def line(self, findings: Findings) -> str | None:
        """What the run says; None where it did not measure that."""
        figure = self.figure(findings)
        if figure is None:
            return None
        met = figure >= self.bound if self.least else figure <= self.bound
        sign = ">=" if self.least else "<="
        verdict = "met" if met else "MISSED"
        return f"{verdict:6} {self.name:50} {figure:7.3f} ({sign} {self.bound:g})"


def _field(name: str, key: str) -> Callable[[Findings], float | None]:
    return lambda findings: findings.get(("timing", name), {}).get(key)


def _more_rows(findings: Findings) -> float | None:
    one, eight = (_field(f"linear nf4 {LARGE} M={m}", "us")(findings) for m in (1, 8))
    return eight / one if one and eight else None


def _beside_bitsandbytes(findings: Findings) -> float | None:
    ratios = [
        record["bitsandbytes"]
        for (stage, name), record in findings.items()
        if stage == "timing" and name.startswith("linear nf4") and "bitsandbytes" in record
    ]
    return min(ratios, default=None)


def _error_beside_decoded(findings: Findings) -> float | None:
    """Of one row of bf16 and the square weight: sums of few terms are off by chance."""
    key = "error_bfloat16_1_row"
    pairs = [
        (record[key], record[f"{key}_decoded"])
        for (stage, name), record in findings.items()
        if stage == "correctness" and "nf4" in name and "(4096, 4096)" in name
        if record.get(f"{key}_decoded")
    ]
    return max((ours / decoded for ours, decoded in pairs), default=None)


_PRODUCT, _DECODE, _QUANTIZE = "linear nf4", "dequantize nf4", "quantize nf4"

TARGETS = (
    Target(f"M=1 {LARGE}: of copy rate", 0.85, True, _field(f"{_PRODUCT} {LARGE} M=1", "of_peak")),
    Target(
        f"M=1 {SQUARE}: of copy rate", 0.65, True, _field(f"{_PRODUCT} {SQUARE} M=1", "of_peak")
    ),
    Target(f"M=8 {LARGE}: time of M=1", 1.1, False, _more_rows),
    Target("bitsandbytes' time by ours, least of all M", 1.0, True, _beside_bitsandbytes),
    Target(
        f"M=2048 {LARGE}: of dense bf16", 0.85, True, _field(f"{_PRODUCT} {LARGE} M=2048", "dense")
    ),
    Target(f"dequantize {LARGE}: of copy rate", 0.9, True, _field(f"{_DECODE} {LARGE}", "of_peak")),
    Target(
        f"quantize {LARGE}: of read rate", 0.85, True, _field(f"{_QUANTIZE} {LARGE}", "of_read")
    ),
    Target("error of M=1 bf16 by that of decoded weights", 1.0, False, _error_beside_decoded),
)


def lines(records: list[dict[str, Any]]) -> list[str]:
    """A line for each target that was measured."""
    findings = {(record["stage"], record["name"]): record for record in records}
    found = [target.line(findings) for target in TARGETS]
    return [line for line in found if line is not None]
