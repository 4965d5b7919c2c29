"""The file of results: one JSON document that is whole after every finding."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
#: How a process ends whose device can no longer be used; what was wrong has been recorded.
LOST = 75


class Records:
    """Findings, written as they come; processes take turns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """The document."""
        document: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return document

    def of(self, stage: str) -> dict[str, dict[str, Any]]:
        """The findings of a stage by name."""
        return {r["name"]: r for r in self.read()["records"] if r["stage"] == stage}

    def clear(self, backend: str) -> None:
        """Begin anew."""
        self._write({"schema_version": SCHEMA_VERSION, "backend": backend, "records": []})

    def begin(self, stage: str, name: str | None) -> None:
        """Note what runs now, so that it is known if the process does not come back from it."""
        self._write(self.read() | {"running": [stage, name]})

    def running(self, stage: str) -> str | None:
        """What ran in a stage when its process ended."""
        noted = self.read().get("running")
        return noted[1] if noted and noted[0] == stage else None

    def add(self, stage: str, name: str, **fields: Any) -> None:
        """One finding: `ok` says whether a check passed, the rest are figures."""
        document = self.read()
        document["records"].append({"stage": stage, "name": name} | fields)
        self._write(document)

    def _write(self, document: dict[str, Any]) -> None:
        hidden = self.path.with_suffix(".part")
        with hidden.open("w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        hidden.replace(self.path)
