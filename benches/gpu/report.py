"""The table at the end: at most forty lines."""

from __future__ import annotations

from typing import Any

LINES = 40
WIDTH = 110


def table(document: dict[str, Any]) -> list[str]:
    """What a reader must know: stages, failures, then timings as far as there is room."""
    records = document["records"]
    env = next((r for r in records if r["stage"] == "env" and r["name"] == "device"), {})
    lines = [
        f"nybble {env.get('nybble', '?')} on {env.get('device', document['backend'])},"
        f" driver for CUDA {env.get('driver', '?')}, torch {env.get('torch', '?')},"
        f" kernels {env.get('kernels', '?')}"
    ]
    for record in records:
        if record["name"] == "stage":
            checks = [r for r in records if r["stage"] == record["stage"] and "ok" in r][:-1]
            passed = sum(r["ok"] for r in checks)
            counted = f", {passed} of {len(checks)} checks passed" if checks else ""
            seconds = f" in {record['seconds']} s" if "seconds" in record else ""
            lines.append(f"{record['stage']:12} {record['status']}{seconds}{counted}")
    failed = [r for r in records if r["name"] != "stage" and not r.get("ok", True)]
    lines += [f"FAILED {r['stage']}: {r['name']}: {r.get('error', '')}" for r in failed[:10]]
    if len(failed) > 10:
        lines.append(f"... and {len(failed) - 10} more failures")
    timings = [r for r in records if r["stage"] == "timing" and "us" in r]
    if timings:
        lines.append(
            f"{'timing':52} {'us':>9} {'GB/s':>7} {'of peak':>8} {'vs bnb':>7} {'vs bf16':>8}"
        )
    for r in timings[: max(0, LINES - len(lines) - 1)]:
        cells = (
            f"{r['us']:9.2f}",
            _cell(r.get("gb_s"), "7.0f"),
            _cell(r.get("of_peak"), "8.0%"),
            _cell(r.get("bitsandbytes"), "6.2f", "x"),
            _cell(r.get("dense"), "7.2f", "x"),
        )
        lines.append(f"{r['name']:52} {' '.join(cells)}")
    hidden = len(timings) - max(0, LINES - len(lines) - 1)
    if len(lines) >= LINES - 1 and hidden > 0:
        lines.append("... more timings are in gpu_check.json")
    return [line[:WIDTH] for line in lines[:LINES]]


def _cell(value: float | None, form: str, unit: str = "") -> str:
    width = int(form.split(".")[0]) + len(unit)
    return " " * (width - 1) + "-" if value is None else f"{value:{form}}{unit}"
