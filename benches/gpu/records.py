"""The file of results: one JSON document that is whole after every finding."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1


class Records:
    """Findings, written as they come; processes take turns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """The document."""
        document: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        return document

    def clear(self, backend: str) -> None:
        """Begin anew."""
        self._write({"schema_version": SCHEMA_VERSION, "backend": backend, "records": []})

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
