"""The table that `benches/python/compare_cpu.py` makes of what it measured."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benches" / "python"))

from compare import report
from compare.cell import Cell
from compare.rows import Row, rows
from compare.timing import Contender, Pace, measure
from compare.weights import relative_error

CELL: dict[str, Any] = {
    "section": "products",
    "name": "nf4",
    "package": "nybble",
    "threads": 2,
    "kernels": "avx512",
    "shape": "4096x4096",
    "m": 1,
    "dtype": "bf16",
    "seconds": 1e-3,
    "best": 1e-3,
    "calls": 15,
    "disturbed": 0,
    "nbytes": 20_000_000,
    "elements": 4096 * 4096,
    "read": 25.0,
    "t16": 400.0,
    "t32": 150.0,
}


def row_of(made: list[Row], work: str) -> Row:
    return next(row for row in made if row.work == work)


def test_a_share_of_the_read_bandwidth_is_bytes_by_time_by_bandwidth() -> None:
    row = row_of(rows([Cell(**CELL)]), "M=1, nf4, bf16, 2 threads")
    assert row.values == {"4096x4096": pytest.approx(0.8)}
    assert row.target == ">= 0.93 r"
    assert row.verdict == "missed"


def test_more_than_the_memory_gives_is_not_believed() -> None:
    row = row_of(rows([Cell(**CELL | {"seconds": 0.5e-3})]), "M=1, nf4, bf16, 2 threads")
    assert row.verdict.startswith("unsure")


def test_the_worst_shape_decides() -> None:
    fast = Cell(**CELL | {"seconds": 0.8e-3})
    slow = Cell(**CELL | {"shape": "4096x14336"})
    work = "M=1, nf4, bf16, 2 threads"
    assert row_of(rows([fast]), work).verdict == "met"
    assert row_of(rows([fast, slow]), work).verdict == "missed"


def test_a_time_against_another_cell_must_be_at_most_the_bound() -> None:
    four = Cell(**CELL | {"m": 4, "seconds": 1.2e-3})
    row = row_of(rows([Cell(**CELL), four]), "M=4, nf4, bf16, against M=1")
    assert row.values == {"4096x4096": pytest.approx(1.2)}
    assert row.verdict == "met"


def test_what_was_not_measured_has_no_verdict() -> None:
    made = rows([])
    assert row_of(made, "M=1, nf4, bf16, 2 threads").verdict == "not measured"
    assert row_of(made, 'compute="int8", M=1').verdict == "not offered"


def test_the_best_peer_is_the_quickest_that_is_not_dense() -> None:
    peer = {"package": "ggml", "name": "ggml q4_0", "seconds": 2e-3}
    dense = {"package": "torch", "name": "torch bf16", "seconds": 1e-6}
    cells = [Cell(**CELL), Cell(**CELL | peer), Cell(**CELL | dense)]
    assert row_of(rows(cells), "M=1, nf4, bf16, 2 threads").peer == "ggml q4_0: 0.40 r, 2000 us"


def document(**cell: Any) -> dict[str, Any]:
    cells = [asdict(Cell(**CELL | cell))]
    figures = {"read": 25.0, "copy": 12.0, "T16": 400.0, "T32": 150.0}
    facts = {"processor": "Some", "features": ["avx2"], "versions": {"nybble": "1.0"}}
    sections = [cells[0]["section"]]
    run = {"sections": sections, "threads": 2, "kernels": "avx2", "facts": facts}
    return {
        "schema_version": report.SCHEMA_VERSION,
        "date": "2026-01-01",
        "command": "python compare_cpu.py",
        "runs": [run | {"figures": figures}],
        "cells": cells,
        "notes": [],
        "e2e": [],
    }


def test_sections_of_an_earlier_run_are_kept_unless_measured_again() -> None:
    old, other = document(), document(section="isa")
    both = report.merged(old, other)
    assert [cell["section"] for cell in both["cells"]] == ["products", "isa"]
    again = report.merged(both, document(seconds=2e-3))
    assert [cell["seconds"] for cell in again["cells"]] == [1e-3, 2e-3]
    assert [run["sections"] for run in again["runs"]] == [["isa"], ["products"]]
    assert "| M=1, nf4, bf16, 2 threads | >= 0.93 r |" in report.markdown(again)


def test_contenders_are_called_in_turns_and_timed_by_product() -> None:
    calls: dict[str, int] = {"a": 0, "b": 0}

    def contender(name: str, per_call: int) -> Contender:
        def call(_: int) -> None:
            calls[name] += 1

        return Contender(name, call, warm=3, per_call=per_call)

    found = measure([contender("a", 1), contender("b", 1000)], Pace(rounds=2, calls=3))
    assert set(found) == {"a", "b"}
    assert min(calls.values()) >= 3 + 2 * 3
    assert found["b"].best < found["a"].best


def test_our_own_contender_computes_the_product() -> None:
    from compare import ours

    weight = torch.randn(64, 128)
    for candidate in ours.four_bit(weight, ("nf4",)):
        assert relative_error(candidate, weight, torch.float32) < 0.2
