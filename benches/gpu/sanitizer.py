"""A few launches of every kernel under compute-sanitizer, where that is installed."""

from __future__ import annotations

import glob
import shutil
import subprocess
import sys

from gpu.records import Records

TOOLS = ("memcheck", "racecheck", "synccheck")
SECONDS = 38

# Small, since everything takes a hundred times as long.
LAUNCHES = """
import torch, nybble as nb
for name in ("nf4", "nf4 nested", "mxfp4", "dynamic8", "int8"):
    format, nested = name.split()[0], "nested" in name
    w = torch.randn(72, 128, device="cuda", dtype=torch.bfloat16)
    q = nb.quantize(w, format, nested=nested)
    q.dequantize()
    nb.error(w, q)
    for rows in (1, 9, 40, 140):
        x = torch.randn(rows, 128, device="cuda", dtype=torch.bfloat16)
        nb.linear(x, q)
        if format in ("nf4", "mxfp4") and rows < 10:
            torch.ops.nybble.integer_linear(x, *q.parts, None, *q.how)
    if format == "int8":
        nb.ops.int8_linear(torch.randn(3, 128, device="cuda"), q.packed, q.absmax, None, 2.0)
torch.cuda.synchronize()
"""


def _find() -> str | None:
    places = glob.glob("/usr/local/cuda*/bin/compute-sanitizer")
    return shutil.which("compute-sanitizer") or next(iter(sorted(places)), None)


def run(records: Records, _name: str) -> None:
    program = _find()
    if program is None:
        records.add("sanitizer", "compute-sanitizer", skipped="it is not installed")
        return
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", LAUNCHES]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            records.add("sanitizer", tool, skipped=f"not done in {SECONDS} s")
            continue
        found = {} if done.returncode == 0 else {"error": (done.stdout + done.stderr)[-1500:]}
        records.add("sanitizer", tool, ok=done.returncode == 0, **found)
