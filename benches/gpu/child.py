"""Running a program with a deadline, and all that it starts."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

SPENT = 124  # as `timeout` reports it
# Seconds for a process to end once it was told to. One that waits for a device may never.
_ENDING = 10.0


def run(
    command: Sequence[str], seconds: float, log: Path, env: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """(how it ended, what it said); the latter goes to `log` as it comes."""
    with log.open("w", encoding="utf-8") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=env
        )
        try:
            code = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = SPENT
        _end(child)
    return code, log.read_text(encoding="utf-8", errors="replace")


def _end(child: subprocess.Popen[bytes]) -> None:
    """End what is left of it: a child may have ended before what it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return  # nothing is left
    try:
        child.wait(timeout=_ENDING)
    except subprocess.TimeoutExpired:
        return  # stuck in the driver; the next stage may still tell something
