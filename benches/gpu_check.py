"""Checks and measures nybble on a CUDA machine: `python benches/gpu_check.py --out DIR`.

Needs the wheel, torch and numpy; bitsandbytes is compared with if it is installed or its directory
is given. Each stage is a process with a deadline, so that a crash of one is reported and the next
goes on. Every finding is written to `DIR/gpu_check.json` at once; a table comes last.

`--backend fake` runs the stages `env` and `correctness` without a GPU on tiny shapes, in an
environment whose libcuda is the one of `tests/cuda/fake`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from gpu.records import Records
from gpu.report import table

# Seconds that each stage may take at most; together within the budget of `--budget`.
DEADLINES = {
    "env": 60,
    "ceilings": 40,
    "correctness": 150,
    "sanitizer": 120,
    "timing": 200,
    "counters": 60,
}
FAKE_STAGES = ("env", "correctness")
SPENT = 124  # as `timeout` reports it


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all stages")
    parser.add_argument("--backend", choices=["cuda", "fake"], default="cuda")
    parser.add_argument("--stages", nargs="+", choices=list(DEADLINES), help="only these")
    parser.add_argument("--bitsandbytes", type=Path, help="directory that has the package")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_stage(name: str, options: argparse.Namespace, seconds: float) -> dict[str, object]:
    """Run one stage in a process of its own; say how it ended."""
    command = [sys.executable, "-X", "faulthandler", __file__, "--stage", name]
    command += ["--out", str(options.out), "--backend", options.backend]
    if options.bitsandbytes is not None:
        command += ["--bitsandbytes", str(options.bitsandbytes)]
    log = options.out / f"{name}.log"
    start = time.monotonic()
    with log.open("w") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # with what the stage itself started
            child.wait()
            code = SPENT
    status = {0: "done", SPENT: "out of time"}.get(code, "crashed")
    ended: dict[str, object] = {"status": status, "ok": code == 0, "returncode": code}
    ended["seconds"] = round(time.monotonic() - start, 1)
    if code != 0:
        ended["output"] = log.read_text(errors="replace")[-2000:]
    return ended


def main() -> int:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    records = Records(options.out / "gpu_check.json")
    if options.stage is not None:
        if options.bitsandbytes is not None:
            sys.path.insert(0, str(options.bitsandbytes))
        stage = importlib.import_module(f"gpu.{options.stage}")
        stage.run(records, options.backend)
        return 0
    if options.backend == "fake" and "NYBBLE_EMULATOR" not in os.environ:
        print(
            "--backend fake needs the libraries of tests/cuda in the environment", file=sys.stderr
        )
        return 2
    records.clear(options.backend)
    end = time.monotonic() + options.budget
    stages = options.stages or (FAKE_STAGES if options.backend == "fake" else list(DEADLINES))
    for name in stages:
        left = end - time.monotonic()
        if left < 1:
            records.add(name, "stage", ok=False, status="not started: the budget is spent")
            continue
        records.add(name, "stage", **run_stage(name, options, min(DEADLINES[name], left)))
    document = records.read()
    print("\n".join(table(document)))
    return 0 if all(record.get("ok", True) for record in document["records"]) else 1


if __name__ == "__main__":
    sys.exit(main())
