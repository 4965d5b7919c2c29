"""The emulator catches what a kernel must not do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import build
import pytest

HERE = Path(__file__).parent
SCRIPT = """
import ctypes, sys
sys.path.insert(0, {here!r})
from params import Emulator
emulator = Emulator({path!r})
class Broken(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p)]
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
x = libc.malloc(ctypes.c_size_t(32 * 4))
ctypes.memset(x, 0, 32 * 4)
emulator.order({order})
emulator.launch({kernel!r}, Broken(x), 1, {block})
print([float(value) for value in (ctypes.c_float * 32).from_address(x)])
"""


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if build.compiler() is None:
        pytest.skip("no C++ compiler (g++, or CXX)")
    return build.build(tmp_path_factory.mktemp("broken") / "plain.so", broken=True)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The library with AddressSanitizer, and the environment that Python needs to load it."""
    tool = build.compiler()
    if tool is None:
        pytest.skip("no C++ compiler (g++, or CXX)")
    found = subprocess.run(
        [tool, "-print-file-name=libasan.so"], check=True, capture_output=True, text=True
    ).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip(f"{tool} has no AddressSanitizer")
    out = build.build(tmp_path_factory.mktemp("sanitized") / "lib.so", sanitize=True, broken=True)
    # Python itself leaks on purpose, and fibers are stacks that the sanitizer does not know.
    options = "detect_leaks=0,detect_stack_use_after_return=0"
    return out, {"LD_PRELOAD": found, "ASAN_OPTIONS": options}


def run(
    path: Path, kernel: str, *, block: int = 32, order: int = 0, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.format(here=str(HERE), path=str(path), kernel=kernel, block=block, order=order)
    environment = {**os.environ, **(env or {})}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_barrier_that_half_of_the_threads_never_reach_is_an_error(broken: Path) -> None:
    done = run(broken, "broken_barrier")
    assert done.returncode != 0
    assert "never reach" in done.stderr


def test_lanes_that_meet_in_different_shuffles_are_an_error(broken: Path) -> None:
    done = run(broken, "broken_shuffle")
    assert done.returncode != 0
    assert "different places" in done.stderr


def test_a_misaligned_wide_load_is_an_error(broken: Path) -> None:
    done = run(broken, "broken_alignment")
    assert done.returncode != 0
    assert "misaligned load of 16 bytes" in done.stderr


def test_a_missing_barrier_shows_as_nan_and_in_another_order_of_threads(broken: Path) -> None:
    results = {run(broken, "broken_order", block=64, order=order).stdout for order in range(4)}
    assert len(results) > 1
    assert any("nan" in result for result in results)


def test_a_copy_that_is_read_before_it_is_waited_for_is_nan(broken: Path) -> None:
    assert run(broken, "broken_early").stdout.split(",")[0] == "[nan"


def test_a_copy_that_nobody_waits_for_is_an_error(broken: Path) -> None:
    done = run(broken, "broken_forgotten")
    assert done.returncode != 0
    assert "before its copies are done" in done.stderr


def test_a_block_of_another_size_is_refused(broken: Path) -> None:
    done = run(broken, "broken_barrier", block=64)
    assert done.returncode != 0
    assert "status 2" in done.stderr


def test_a_write_out_of_bounds_is_caught_with_its_line(
    sanitized: tuple[Path, dict[str, str]],
) -> None:
    path, env = sanitized
    done = run(path, "broken_bounds", env=env)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "broken.cuh" in done.stderr


def test_no_kernel_reads_or_writes_out_of_bounds(
    sanitized: tuple[Path, dict[str, str]],
) -> None:
    path, env = sanitized
    script = str(HERE / "bounds.py")
    environment = {**os.environ, **env}
    done = subprocess.run(
        [sys.executable, script, str(path)],
        env=environment, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "kernels ran" in done.stdout
