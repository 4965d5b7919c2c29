"""Markdown and JSON of what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compare.cell import Cell
from compare.rows import Row, rows
from compare.timing import SLOW

#: Of the JSON document.
SCHEMA_VERSION = 1


def merged(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """The new document, with the sections of an old one that it lacks."""
    if old is None or old.get("schema_version") != SCHEMA_VERSION:
        return new
    # A section is measured anew for some numbers of threads.
    fresh = {(cell["section"], cell["threads"]) for cell in new["cells"]}
    kept = [cell for cell in old["cells"] if (cell["section"], cell["threads"]) not in fresh]
    runs = [run for run in old["runs"] if any(cell["section"] in run["sections"] for cell in kept)]
    notes = list(dict.fromkeys([*new["notes"], *old["notes"]]))
    return {
        **new,
        "cells": [*kept, *new["cells"]],
        "runs": [*runs, *new["runs"]],
        "notes": notes,
        "e2e": new["e2e"] or old["e2e"],
    }


def load(path: Path) -> dict[str, Any] | None:
    """An earlier document, if there is one."""
    if not path.exists():
        return None
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def markdown(document: dict[str, Any]) -> str:
    """Head, table of ratios, all cells by section, notes."""
    cells = [Cell(**cell) for cell in document["cells"]]
    lines = [*_head(document), ""]
    made = [row for row in rows(cells, document["e2e"]) if row.values or row.note]
    lines += _table(
        ("work", "target", "measured", "best peer", "verdict"), [_row(row) for row in made]
    )
    for section in dict.fromkeys(cell.section for cell in cells):
        lines += ["", f"### {section}", ""]
        lines += _cells([cell for cell in cells if cell.section == section])
    if document["e2e"]:
        lines += ["", "### e2e", ""]
        columns = list(dict.fromkeys(key for result in document["e2e"] for key in result))
        body = [[str(result.get(key, "")) for key in columns] for result in document["e2e"]]
        lines += _table(columns, body)
    slow = sorted({cell.calls for cell in cells if cell.seconds > SLOW})
    if slow:
        lines += ["", f"Calls longer than {SLOW * 1e3:g} ms: {slow[0]} to {slow[-1]} repeats."]
    lines += ["", *(f"- {note}" for note in document["notes"])]
    return "\n".join(lines).rstrip() + "\n"


def _head(document: dict[str, Any]) -> list[str]:
    facts = document["runs"][-1]["facts"]
    versions = ", ".join(f"{name} {text}" for name, text in facts["versions"].items() if text)
    lines = [
        f"{document['date']}, {facts['processor']} ({' '.join(facts['features'])}), "
        f"`{document['command']}`; {versions}.",
        "",
        "Medians, contenders in turns, weights from main memory. r: read bandwidth; T16, T32: "
        "torch's dense bf16 and fp32 product at M=512, 4096x4096; all of the same cell where it "
        "depends on them. Values of several shapes: 4096x4096 / 14336x4096 / 4096x14336.",
        "",
    ]
    for run in document["runs"]:
        figures = run["figures"]
        lines.append(
            f"- {', '.join(run['sections'])}: {run['threads']} threads, {run['kernels']}: read "
            f"{figures['read']:.1f}, copy {figures['copy']:.1f} GB/s; T32 {figures['T32']:.0f}, "
            f"T16 {figures['T16']:.0f} GFLOP/s"
        )
    return lines


def _row(row: Row) -> list[str]:
    measured = " / ".join(f"{value:.3g}" for value in row.values.values())
    return [row.work, row.target, measured, row.peer, row.verdict]


def _cells(cells: Sequence[Cell]) -> list[str]:
    columns = ["contender", "library", "dtype", "threads", "kernels", "shape", "M", "us", "best us"]
    columns += ["repeats (put aside)", "of r", "GFLOP/s", "of T16", "of T32", "Gelem/s"]
    body = []
    for cell in cells:
        product = cell.m and cell.section != "overhead"
        body.append(
            [
                cell.name,
                cell.package,
                cell.dtype,
                str(cell.threads),
                cell.kernels,
                cell.shape,
                str(cell.m or ""),
                f"{cell.seconds * 1e6:.4g}",
                f"{cell.best * 1e6:.4g}",
                f"{cell.calls} ({cell.disturbed})",
                f"{cell.of_read:.2f}" if cell.nbytes and cell.m <= 4 else "",
                f"{cell.gflops:.0f}" if product else "",
                f"{cell.gflops / cell.t16:.2f}" if product and cell.m >= 16 else "",
                f"{cell.gflops / cell.t32:.2f}" if product and cell.m >= 16 else "",
                "" if cell.m else f"{cell.gelem:.3g}",
            ]
        )
    used = [i for i in range(len(columns)) if any(line[i] for line in body)]
    return _table([columns[i] for i in used], [[line[i] for i in used] for line in body])


def _table(columns: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return lines + [f"| {' | '.join(line)} |" for line in body]


def plain(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """Cells as JSON takes them."""
    return [asdict(cell) for cell in cells]
