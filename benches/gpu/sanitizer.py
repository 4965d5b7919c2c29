"""A few launches of every kernel under compute-sanitizer, where that is installed."""

from __future__ import annotations

import glob
import os
import shutil
import sys
from pathlib import Path

from gpu import child
from gpu.records import Records

TOOLS = ("memcheck", "racecheck", "synccheck")
SECONDS = 38
#: How the program ends where it found something.
FOUND = 9


def find(name: str, *patterns: str) -> str | None:
    """A tool of NVIDIA's: in PATH, in the toolkit, or in packages."""
    in_packages = [
        str(path)
        for directory in sys.path
        for path in Path(directory or ".").glob(f"nvidia/*/**/{name}")
        if os.access(path, os.X_OK)
    ]
    places = [path for pattern in patterns for path in sorted(glob.glob(pattern))]
    return shutil.which(name) or next(iter(places + in_packages), None)


def launches(backend: str, which: str) -> list[str]:
    """The command that makes launches."""
    return [sys.executable, "-m", "gpu.launches", backend, which]


def environment() -> dict[str, str]:
    """Where that command finds this package."""
    here = str(Path(__file__).parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join([here, *sys.path])}


def run(records: Records, name: str, _after: str | None) -> None:
    program = find("compute-sanitizer", "/usr/local/cuda*/bin/compute-sanitizer")
    if program is None:
        records.add("sanitizer", "compute-sanitizer", skipped="it is not installed")
        return
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", str(FOUND)]
        log = records.path.with_name(f"sanitizer.{tool}.log")
        code, text = child.run(
            [*command, *launches(name, "every")], SECONDS, log, env=environment()
        )
        if code == child.SPENT:
            records.add("sanitizer", tool, skipped=f"not done in {SECONDS} s")
            continue
        found = {} if code == 0 else {"error": text[:700] + text[-700:], "returncode": code}
        records.add("sanitizer", tool, ok=code == 0, **found)
