"""The emulated kernels, built once a session."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
EMULATOR = ROOT / "tests" / "cuda" / "emulator"
sys.path[:0] = [str(EMULATOR), str(ROOT / "cuda"), str(Path(__file__).parent)]

import build  # noqa: E402
from params import Emulator  # noqa: E402


@pytest.fixture(scope="session")
def emulator_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library; skips where there is no C++ compiler."""
    if build.compiler() is None:
        pytest.skip("no C++ compiler (g++, or CXX)")
    out: Path = build.build(
        tmp_path_factory.mktemp("emulator") / "libnybble_emulator.so",
        sanitize=bool(os.environ.get("NYBBLE_EMULATOR_SANITIZE")),
    )
    return out


@pytest.fixture(scope="session")
def loaded(emulator_path: Path) -> Emulator:
    return Emulator(emulator_path)


@pytest.fixture(params=[0, 1, 7], ids=["in-order", "shuffled-1", "shuffled-7"])
def emulator(loaded: Emulator, request: pytest.FixtureRequest) -> Iterator[Emulator]:
    """The emulator, in three orders of threads."""
    loaded.order(request.param)
    yield loaded
    loaded.order(0)
