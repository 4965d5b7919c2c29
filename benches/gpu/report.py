"""The table at the end: at most forty lines."""

from __future__ import annotations

from typing import Any

from gpu import targets

LINES = 40
WIDTH = 110
#: Failures that are shown, and lines that the stages take.
_FAILURES = 8


def table(document: dict[str, Any]) -> list[str]:
    """What a reader must know: stages, failures, targets, then timings as far as there is room."""
    records = document["records"]
    env = next((r for r in records if r["stage"] == "env" and r["name"] == "device"), {})
    lines = [
        f"nybble {env.get('nybble', '?')} on {env.get('device', document['backend'])},"
        f" driver for CUDA {env.get('driver', '?')}, torch {env.get('torch', '?')},"
        f" kernels {env.get('kernels', '?')}"
    ]
    lines += [_stage(record, records) for record in records if record["name"] == "stage"]
    failed = [r for r in records if r["name"] != "stage" and not r.get("ok", True)]
    lines += [
        f"FAILED {r['stage']}: {r['name']}: {_one_line(r.get('error', ''))}"
        for r in failed[:_FAILURES]
    ]
    if len(failed) > _FAILURES:
        lines.append(f"... and {len(failed) - _FAILURES} more failures")
    if document["backend"] == "cuda":  # an emulator's times meet nothing
        lines += targets.lines(records)
    timings = [r for r in records if r["stage"] == "timing" and "us" in r]
    if timings:
        lines.append(
            f"{'timing':44} {'us':>9} {'GB/s':>6} {'of peak':>7} {'by bnb':>6} {'by bf16':>7}"
            f" {'by decoded':>10}"
        )
    room = LINES - len(lines) - 1
    lines += [_timing(r) for r in timings[: max(0, room)]]
    if len(timings) > room:
        lines.append("... more timings are in gpu_check.json")
    return [line[:WIDTH] for line in lines[:LINES]]


def _stage(record: dict[str, Any], records: list[dict[str, Any]]) -> str:
    checks = [
        r for r in records if r["stage"] == record["stage"] and r["name"] != "stage" and "ok" in r
    ]
    text = f"{record['stage']:12} {record['status']}"
    if "seconds" in record:
        text += f" in {record['seconds']} s"
    if record.get("restarts"):
        text += f", begun again {record['restarts']} times"
    if checks:
        text += f", {sum(r['ok'] for r in checks)} of {len(checks)} checks passed"
    skipped = [r for r in records if r["stage"] == record["stage"] and "skipped" in r]
    if skipped:
        text += f"; skipped {skipped[0]['name']}: {_one_line(skipped[0]['skipped'])}"
    return text


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _timing(record: dict[str, Any]) -> str:
    cells = (
        f"{record['us']:9.2f}",
        _cell(record.get("gb_s"), "6.0f"),
        _cell(record.get("of_peak"), "7.0%"),
        _cell(record.get("bitsandbytes"), "5.2f", "x"),
        _cell(record.get("dense"), "6.2f", "x"),
        _cell(record.get("decoded"), "9.2f", "x"),
    )
    return f"{record['name']:44} {' '.join(cells)}"


def _cell(value: float | None, form: str, unit: str = "") -> str:
    width = int(form.split(".")[0]) + len(unit)
    return " " * (width - 1) + "-" if value is None else f"{value:{form}}{unit}"
