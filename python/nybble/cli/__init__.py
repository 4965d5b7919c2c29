"""The command `nybble`."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from nybble.cli.arguments import parse
from nybble.cli.console import Console
from nybble.errors import CheckpointError, Error, FormatError

#: Exit codes: what a script can tell apart.
OK, CHECK_FAILED, USAGE, BAD_INPUT, NO_ROOM, INTERRUPTED = 0, 1, 2, 3, 4, 130

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = parse(arguments)
    console = Console(json=options.json, quiet=options.quiet, verbose=options.verbose)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code: int = options.run(options, console)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader has seen enough (`| head`); nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        console.fail("interrupted; nothing was written, run the command again", INTERRUPTED)
        return INTERRUPTED
    except Exception as error:
        expected = exit_code(error)
        if expected is None:
            raise
        console.fail(message(error), expected)
        return expected


def exit_code(error: BaseException) -> int | None:
    """The exit code for an expected error; None for a bug."""
    if isinstance(error, MemoryError):
        return NO_ROOM
    if isinstance(error, CheckpointError):
        return BAD_INPUT
    if isinstance(error, OSError):
        if isinstance(error, FileExistsError):
            return USAGE
        return NO_ROOM if error.errno in _DISK_FULL else BAD_INPUT
    if isinstance(error, (FormatError, Error)):
        return USAGE
    return None


def message(error: BaseException) -> str:
    """What to tell about an error."""
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
        # `organisation/model` is how the hub names models.
        if isinstance(error, FileNotFoundError) and str(error.filename).count("/") == 1:
            text += " (models are not downloaded: give a directory or a safetensors file)"
        return text
    return str(error)


def _terminate(number: int, _frame: FrameType | None) -> None:
    """Leave through the ordinary way out, so that unfinished files are removed."""
    raise SystemExit(128 + number)
