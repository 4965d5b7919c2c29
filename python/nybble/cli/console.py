"""What the user sees: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from typing import TextIO

#: Of the JSON documents that the commands print.
SCHEMA_VERSION = 1


class Console:
    """Prints as the options and the terminal ask for."""

    def __init__(self, *, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self.verbose = verbose
        self._started = time.monotonic()
        self._line_is_open = False

    def result(self, text: str, document: str) -> None:
        """Print the result: a JSON document, or text for people."""
        self._close_line()
        if self.json:
            print(document)
        elif not self.quiet:
            print(text)

    def log(self, text: str) -> None:
        """Tell what happens."""
        if not self.quiet:
            self._close_line()
            print(text, file=sys.stderr)

    def warn(self, text: str) -> None:
        """Tell what the user should know."""
        self.log(f"{self._paint('33', 'warning')}: {text}")

    def fail(self, text: str, code: int) -> None:
        """Tell why the command ends."""
        self._close_line()
        if self.json:
            error = {"message": text, "exit_code": code}
            print(json.dumps({"schema_version": SCHEMA_VERSION, "error": error}))
        print(f"nybble: {self._paint('31', 'error')}: {text}", file=sys.stderr)

    def progress(self, done: int, total: int, name: str) -> None:
        """Redraw the progress line, on a terminal."""
        if self.quiet or not sys.stderr.isatty():
            return
        seconds = max(time.monotonic() - self._started, 1e-6)
        share = done / total if total else 1.0
        left = seconds / share - seconds if share > 0 else 0.0
        line = f"{share:4.0%}  {done / seconds / 1e6:,.0f} MB/s  {left:,.0f} s left  {name}"
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[K{line[:width]}", end="", file=sys.stderr, flush=True)
        self._line_is_open = True

    def _close_line(self) -> None:
        if self._line_is_open:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._line_is_open = False

    def _paint(self, code: str, text: str, stream: TextIO | None = None) -> str:
        stream = stream or sys.stderr
        plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
        return text if plain or not stream.isatty() else f"\x1b[{code}m{text}\x1b[0m"
