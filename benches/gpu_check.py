"""Checks and measures nybble on a CUDA machine: `python benches/gpu_check.py --out DIR`.

Needs the wheel, torch and numpy; bitsandbytes is compared with if it is installed or its directory
is given. Each stage is a process with a deadline, so that a crash of one is reported and the next
goes on; a stage of many checks goes on too, in another process, after the check that crashed. Every
finding is written to `DIR/gpu_check.json` at once; a table comes last.

`--backend fake` runs the stages without a GPU on tiny shapes, in an environment whose libcuda is
the one of `tests/cuda/fake`. What times it tells are those of the emulator.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from gpu import child
from gpu.records import LOST, Records
from gpu.report import table

# Seconds that each stage may take at most; together within the budget of `--budget`.
DEADLINES = {
    "env": 120,
    "ceilings": 40,
    "correctness": 150,
    "sanitizer": 120,
    "timing": 200,
    "counters": 60,
}
#: How often a stage goes on after a check that ended its process.
RESTARTS = 8


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all stages")
    parser.add_argument("--backend", choices=["cuda", "fake"], default="cuda")
    parser.add_argument("--stages", nargs="+", choices=list(DEADLINES), help="only these")
    parser.add_argument("--bitsandbytes", type=Path, help="directory that has the package")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--after", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_stage(
    name: str, options: argparse.Namespace, records: Records, seconds: float
) -> dict[str, object]:
    """Run one stage in processes of its own; say how it ended."""
    start = time.monotonic()
    records.begin(name, None)
    after: str | None = None
    restarts = -1
    while restarts < RESTARTS:
        restarts += 1
        left = seconds - (time.monotonic() - start)
        code, text = child.run(
            _command(name, options, after), max(left, 0.1), options.out / f"{name}.log"
        )
        running = records.running(name)
        if code != 0 and code != LOST and running is not None:
            why = "out of time" if code == child.SPENT else f"the process ended with {code}"
            records.add(name, running, ok=False, error=f"{why} in this check: {text[-300:]}")
        after = running
        if code in (0, child.SPENT) or running is None:
            break
    status = {0: "done", child.SPENT: "out of time"}.get(code, "crashed")
    ended: dict[str, object] = {"status": status, "ok": code == 0, "returncode": code}
    ended |= {"seconds": round(time.monotonic() - start, 1), "restarts": restarts}
    if code != 0:
        ended["output"] = text[-2000:]
    return ended


def _command(name: str, options: argparse.Namespace, after: str | None) -> list[str]:
    command = [sys.executable, "-X", "faulthandler", __file__, "--stage", name]
    command += ["--out", str(options.out), "--backend", options.backend]
    if options.bitsandbytes is not None:
        command += ["--bitsandbytes", str(options.bitsandbytes)]
    return command if after is None else [*command, "--after", after]


def main() -> int:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    records = Records(options.out / "gpu_check.json")
    if options.stage is not None:
        if options.bitsandbytes is not None:
            sys.path.insert(0, str(options.bitsandbytes))
        stage = importlib.import_module(f"gpu.{options.stage}")
        stage.run(records, options.backend, options.after)
        return 0
    if options.backend == "fake" and "NYBBLE_EMULATOR" not in os.environ:
        print(
            "--backend fake needs the libraries of tests/cuda in the environment", file=sys.stderr
        )
        return 2
    records.clear(options.backend)
    end = time.monotonic() + options.budget
    for name in options.stages or DEADLINES:
        left = end - time.monotonic()
        if left < 1:
            records.add(name, "stage", ok=False, status="not started: the budget is spent")
            continue
        seconds = min(DEADLINES[name], left)
        records.add(name, "stage", **run_stage(name, options, records, seconds))
    document = records.read()
    print("\n".join(table(document)))
    return 0 if all(record.get("ok", True) for record in document["records"]) else 1


if __name__ == "__main__":
    sys.exit(main())
