"""The tests of `emulated/`, each file in a process whose libcuda runs the kernels on the CPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import fake
import pytest

FILES = sorted((Path(__file__).parent / "emulated").glob("test_*.py"))


@pytest.mark.parametrize("capability", ["90", "75"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_ops_on_an_emulated_device(file: Path, capability: str, cache: Path) -> None:
    env = fake.environment(fake.libraries(), cache, NYBBLE_FAKE_CAPABILITY=capability)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=env, cwd=fake.ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 0, done.stdout
