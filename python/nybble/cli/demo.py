"""`nybble demo`."""

from __future__ import annotations

import argparse
import json

from nybble.cli.console import SCHEMA_VERSION, Console


def demo(options: argparse.Namespace, console: Console) -> int:
    """Quantize a model and compare what the results say with what it says."""
    from nybble.demo import run

    found = run(model=options.model, keep=options.keep, log=console.log)
    document = {"schema_version": SCHEMA_VERSION, "command": "demo", **found.to_dict()}
    console.result(str(found), json.dumps(document))
    return 0
