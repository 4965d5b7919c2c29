"""Builds a libcuda without a GPU, and runs Python with it."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "tests" / "cuda"


@functools.cache
def libraries() -> Path:
    """A directory with `libcuda.so` and the emulated kernels.

    There is no `libcuda.so.1`: NVRTC would ask that for tables that only NVIDIA knows.
    """
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    directory = Path(tempfile.mkdtemp(prefix="nybble-fake-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    build = SOURCES / "emulator" / "build.py"
    subprocess.run(
        [sys.executable, str(build), str(directory / "libnybble_emulator.so")],
        check=True,
        capture_output=True,
    )
    driver(directory)
    return directory


def driver(directory: Path, *flags: str) -> Path:
    """Builds the driver alone into a directory."""
    source = SOURCES / "fake" / "libcuda.cpp"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", *flags, str(source)]
    subprocess.run([*command, "-o", str(directory / "libcuda.so"), "-ldl"], check=True)
    return directory


def environment(directory: Path | None, cache: Path, **settings: str) -> dict[str, str]:
    """The environment of a process that finds the driver of a directory, or none at all."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("NYBBLE_", "CUDA_")) and name != "LD_LIBRARY_PATH"
    }
    if directory is not None:
        kept["LD_LIBRARY_PATH"] = str(directory)
        kept["NYBBLE_EMULATOR"] = str(directory / "libnybble_emulator.so")
    return kept | {"XDG_CACHE_HOME": str(cache)} | settings


def run(code: str, env: dict[str, str]) -> str:
    """What Python code prints; warnings are errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
