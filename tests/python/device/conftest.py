"""One cache of compiled kernels for all tests here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# What is in there needs the emulated device; test_emulated.py runs it in a process that has one.
collect_ignore = [] if "NYBBLE_EMULATOR" in os.environ else ["emulated"]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that is empty at first."""
    return tmp_path_factory.mktemp("cache")
