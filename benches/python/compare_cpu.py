"""Everything that the CPU kernels are measured by, and every installed peer, in one table.

    python benches/python/compare_cpu.py [--quick] [--only SECTION,...] [--threads N,...]
        [--isa-compare] [--json FILE] [--markdown FILE]

For each number of threads one process measures the machine's read and copy bandwidth, torch's
dense products, nybble and the peers in turns. `--json FILE` keeps sections of an earlier run in
the file that this one does not measure, so that a table can be made piece by piece. Peers that
are not installed are named in the notes; bitsandbytes, onnxruntime with onnx, openvino, and
llama-cpp-python or xllamacpp take part where they are.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

#: Sections, and for which numbers of threads they are worth measuring.
SECTIONS = {
    "products": (2, 1),
    "gradients": (2,),
    "llm_int8": (2,),
    "quantize": (2,),
    "dequantize": (2,),
    "overhead": (2,),
    "isa": (2,),
}
E2E = "e2e"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, fewer repeats and dtypes")
    parser.add_argument("--only", help=f"comma-separated: {', '.join([*SECTIONS, E2E])}")
    parser.add_argument("--threads", help="comma-separated numbers of threads (2,1)")
    parser.add_argument(
        "--isa-compare", action="store_true", help="only the ratio of AVX2 to AVX-512"
    )
    parser.add_argument("--json", type=Path, help="write (and complete) this document")
    parser.add_argument("--markdown", type=Path, help="write the table here, not to the terminal")
    parser.add_argument("--child", nargs=2, metavar=("SECTIONS", "FILE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def child(sections: list[str], target: Path, *, quick: bool) -> None:
    """Measure in this process, whose environment sets threads and kernels."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    import torch
    from compare import codec, gradients, isa, llm_int8, machine, overhead, products, report
    from compare.cell import Run
    from compare.timing import Pace

    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    pace = Pace(rounds=3 if quick else 5, calls=5 if quick else 3)
    limits = machine.Limits(pace)
    facts = machine.facts()
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {text}", file=sys.stderr, flush=True)

    run = Run(
        threads=threads,
        kernels=facts["kernels"],
        quick=quick,
        pace=pace,
        limits=limits,
        figures=limits.figures(pace),
        say=say,
    )
    measures = {
        "products": products.products,
        "gradients": gradients.gradients,
        "llm_int8": llm_int8.llm_int8,
        "quantize": codec.quantize,
        "dequantize": codec.dequantize,
        "overhead": overhead.overhead,
        "isa": isa.isa,
    }
    for section in sections:
        measures[section](run)
    document = {
        "sections": sections,
        "threads": threads,
        "kernels": run.kernels,
        "facts": facts,
        "figures": run.figures,
        "notes": run.notes,
        "cells": report.plain(run.cells),
    }
    target.write_text(json.dumps(document), encoding="utf-8")


def start(sections: list[str], threads: int, *, quick: bool, kernels: str = "") -> dict[str, Any]:
    """Run `child` in a process of its own."""
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "NYBBLE_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[name] = str(threads)
    if kernels:
        environment["NYBBLE_CPU"] = kernels
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "cells.json"
        command = [sys.executable, __file__, "--child", ",".join(sections), str(target)]
        subprocess.run([*command, "--quick"] if quick else command, env=environment, check=True)
        found: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    return found


def models(*, quick: bool) -> list[dict[str, Any]]:
    """The other script's results."""
    script = Path(__file__).with_name("compare_e2e.py")
    command = [sys.executable, str(script), *(["--quick"] if quick else []), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    results: list[dict[str, Any]] = json.loads(done.stdout)["results"]
    return results


def main() -> None:
    options = arguments()
    if options.child:
        sections, target = options.child
        child(sections.split(","), Path(target), quick=options.quick)
        return
    only = options.only.split(",") if options.only else list(SECTIONS)
    if options.isa_compare:
        only = ["isa"]
    unknown = set(only) - {*SECTIONS, E2E}
    if unknown:
        raise SystemExit(f"no such section: {', '.join(sorted(unknown))}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    asked = [int(n) for n in options.threads.split(",")] if options.threads else [2, 1]

    from compare import report

    runs = []
    for threads in (n for n in asked if n <= (cores or 1)):
        wanted = [name for name in only if threads in SECTIONS.get(name, ()) and name != "isa"]
        if wanted:
            runs.append(start(wanted, threads, quick=options.quick))
        if "isa" in only and threads in SECTIONS["isa"]:
            runs.append(start(["isa"], threads, quick=options.quick))
            if runs[-1]["kernels"] != "avx2":
                runs.append(start(["isa"], threads, quick=options.quick, kernels="avx2"))
    document = {
        "schema_version": report.SCHEMA_VERSION,
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "benches/python/compare_cpu.py", *sys.argv[1:]]),
        "runs": [{key: run[key] for key in run if key not in ("cells", "notes")} for run in runs],
        "cells": [cell for run in runs for cell in run["cells"]],
        "notes": list(dict.fromkeys(note for run in runs for note in run["notes"])),
        "e2e": models(quick=options.quick) if E2E in only else [],
    }
    if options.json:
        document = report.merged(report.load(options.json), document)
        options.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    text = report.markdown(document)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
