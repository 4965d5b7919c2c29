"""`nybble demo`."""

from __future__ import annotations

import argparse
import json

from nybble.cli.console import SCHEMA_VERSION, Console


def demo(_options: argparse.Namespace, console: Console) -> int:
    """Run the demonstration; it returns figures to print, and tells what it does meanwhile."""
    from nybble.demo import run

    figures = run(log=console.log)
    text = "\n".join(f"{name}: {value}" for name, value in figures.items())
    document = {"schema_version": SCHEMA_VERSION, "command": "demo", **figures}
    console.result(text, json.dumps(document))
    return 0
