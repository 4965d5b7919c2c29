"""`nybble doctor`, run as users run it, and its advice for machines that are not this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nybble
from nybble import _core, _machine
from nybble.cli.doctor import Facts, hints, problems


def run(*arguments: str, check: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nybble", "doctor", *arguments]
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("NYBBLE_CPU", "NYBBLE_NUM_THREADS", "OMP_NUM_THREADS")
    }
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=inherited | environment
    )
    assert done.returncode == check, done.stderr
    assert "Traceback" not in done.stderr
    return done


def document(*, check: int = 0, **environment: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("--json", check=check, **environment).stdout)
    return found


def test_document_names_versions_kernels_threads_and_memory() -> None:
    found = document()
    assert found["schema_version"] == 1
    assert found["command"] == "doctor"
    assert found["versions"]["nybble"] == nybble.__version__
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["processor"]["kernels"] == found["processor"]["available"][-1]
    assert found["processor"]["features"] == _core.cpu_features()
    assert found["threads"]["used"] >= 1
    assert found["problems"] == []


def test_text_has_a_line_for_each_fact() -> None:
    shown = run().stdout
    for name in ("nybble", "processor", "features", "kernels", "threads", "memory", "CUDA"):
        assert any(line.startswith(name) for line in shown.splitlines()), shown


def test_forced_kernels_are_shown_and_advised_against() -> None:
    found = document(NYBBLE_CPU="scalar")
    assert found["processor"]["kernels"] == "scalar"
    if len(found["processor"]["available"]) > 1:
        assert any("NYBBLE_CPU=scalar" in hint for hint in found["hints"])


def test_kernels_that_cannot_be_had_are_a_problem() -> None:
    found = document(check=1, NYBBLE_CPU="abacus")
    assert found["processor"]["kernels"] is None
    assert len(found["problems"]) == 1
    assert "abacus" in found["problems"][0]
    assert "problem: " in run(check=1, NYBBLE_CPU="abacus").stdout


@pytest.mark.parametrize(
    ("environment", "used", "source"),
    [
        ({"OMP_NUM_THREADS": "3"}, 3, "OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "3", "NYBBLE_NUM_THREADS": "1"}, 1, "NYBBLE_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "3", "NYBBLE_NUM_THREADS": "many"}, 3, "OMP_NUM_THREADS"),
        ({"NYBBLE_NUM_THREADS": "0"}, None, "machine"),
    ],
)
def test_threads_come_from_the_variable_that_is_named(
    environment: dict[str, str], used: int | None, source: str
) -> None:
    found = document(**environment)["threads"]
    assert found["source"] == source
    assert used is None or found["used"] == used


FACTS = Facts(
    versions={"nybble": "1.0", "torch": "3.0", "peft": None},
    processor=_machine.Processor(
        name="Some processor",
        architecture="x86_64",
        features=["avx2"],
        kernels="avx2",
        available=["scalar", "avx2"],
        forced=None,
        problem=None,
    ),
    threads=_machine.Threads(used=4, source="machine", cores=4),
    memory=_machine.Memory(total=1 << 34, available=1 << 33, limit=None, huge_pages="madvise"),
    torch=_machine.Torch(threads=4, native=[], problem=None),
    cuda=_machine.Cuda(driver=None, devices=[], problem=None),
)


GPU = _machine.Gpu(name="Some GPU", capability="13.0", kernels="none: and no compiler")


def test_nothing_is_said_where_nothing_is_off() -> None:
    assert list(hints(FACTS)) == []
    assert list(problems(FACTS)) == []


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("processor", {"kernels": "scalar", "available": ["scalar"]}, "only scalar kernels"),
        ("threads", {"used": 1, "source": "OMP_NUM_THREADS"}, "OMP_NUM_THREADS says so"),
        ("threads", {"used": 2}, "quota"),
        ("threads", {"used": 9, "source": "NYBBLE_NUM_THREADS"}, "lower NYBBLE_NUM_THREADS"),
        ("torch", {"threads": 1}, "torch uses 1 threads"),
        ("memory", {"huge_pages": "never"}, "huge pages are off"),
        ("cuda", {"problem": "the CUDA driver is too old"}, "too old"),
        ("cuda", {"devices": [GPU]}, "Some GPU has no kernels"),
    ],
)
def test_what_is_off_has_a_hint(part: str, change: dict[str, Any], says: str) -> None:
    facts = replace(FACTS, **{part: replace(getattr(FACTS, part), **change)})
    assert any(says in hint for hint in hints(facts)), list(hints(facts))
    assert list(problems(facts)) == []


def test_a_torch_that_cannot_be_imported_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libgomp.so.1 is missing')")
    package = Path(nybble.__file__).parent.parent
    found = document(check=1, PYTHONPATH=f"{tmp_path}{os.pathsep}{package}")
    assert any("libgomp" in problem for problem in found["problems"])


def test_facts_that_the_system_does_not_tell_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_machine, "_text", lambda _path: "")
    assert _machine.memory() == _machine.Memory(
        total=None, available=None, limit=None, huge_pages=None
    )
    monkeypatch.setattr(_machine.platform, "processor", lambda: "")
    assert _machine.processor().name is None
