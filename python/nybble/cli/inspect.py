"""`nybble inspect`."""

from __future__ import annotations

import argparse
import json
import os

from nybble import _core
from nybble.checkpoint.sizes import format_size
from nybble.cli.console import SCHEMA_VERSION, Console


def inspect(options: argparse.Namespace, console: Console) -> int:
    """Show what a checkpoint holds; with `--verify` also whether it is whole."""
    checkpoint = _core.Checkpoint(options.model)
    problems = None
    if options.verify:
        problems = [
            {"file": os.fspath(file), "tensor": tensor, "problem": problem, "remedy": remedy}
            for file, tensor, problem, remedy in checkpoint.verify()
        ]
    # What cannot be described is among the problems; without --verify it is the error.
    summary = None if problems else checkpoint.summary()
    lines = []
    if summary is not None:
        rows = [*summary["formats"].items(), ("total", summary["total"])]
        for name, row in rows:
            lines.append(
                f"{name:10} {row['tensors']:6} tensors {format_size(row['bytes']):>10}"
                f" {row['bits_per_weight']:7.3f} bits per weight"
            )
    for found in problems or ():
        tensor = f"tensor '{found['tensor']}': " if found["tensor"] else ""
        lines.append(f"{found['file']}: {tensor}{found['problem']}; {found['remedy']}")
    if problems == []:
        lines.append("no damage found")
    if console.verbose:
        names = checkpoint.keys()
        for key in names:
            entry = checkpoint.entry(key)
            kind = entry["format"] or entry["dtype"]
            console.log(f"{key}  {list(entry['shape'])}  {kind}  {format_size(entry['nbytes'])}")
    document = {
        "schema_version": SCHEMA_VERSION,
        "command": "inspect",
        "path": options.model,
        "summary": summary,
        "problems": problems,
    }
    console.result("\n".join(lines), json.dumps(document))
    return 1 if problems else 0
