"""Times quantize and dequantize beside what the memory gives in the same minute.

    python benches/python/quantize_cpu.py [--json FILE] [--threads 1 2] [--formats nf4 int8]

Each number of threads is a process of its own, since the libraries read their settings once. A row
has the median time of at least 15 repeats, elements and bytes a second, and two ratios: to the
read bandwidth (bytes read and written / time / bandwidth) and to torch's `copy_` of as many bytes.
Both are measured in the same run, between the repeats of the row.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone

ROWS, COLUMNS = 4096, 4096
REPEATS = 15
FORMATS = ("nf4", "fp4", "int4", "mxfp4", "dynamic8", "int8")
HEADER = (
    f"{'threads':>7} {'work':<11} {'format':<9} {'dtype':<9} {'ms':>7} {'Gelem/s':>8} "
    f"{'GB/s':>6} {'of read':>8} {'of copy_':>9}"
)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(threads: int, formats: list[str]) -> Iterator[dict[str, object]]:
    import torch

    import nybble as nb

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    elements = ROWS * COLUMNS
    stream = torch.ones(1 << 26)  # 256 MiB: beyond every cache
    source, target = torch.ones(2, elements, dtype=torch.float32)

    def row(
        work: str, format: str, dtype: torch.dtype, run: Callable[[], object], read: int, write: int
    ) -> dict[str, object]:
        half = (read + write) // 2 // 4
        times: list[float] = []
        bandwidth: list[float] = []
        copies: list[float] = []
        run()
        for _ in range(REPEATS):
            # The quicker of two ways to read everything: neither is the faster everywhere.
            took = min(seconds(lambda: torch.dot(stream, stream)), seconds(stream.sum))
            bandwidth.append(stream.nbytes / took)
            copies.append(seconds(lambda: target[:half].copy_(source[:half])))
            times.append(seconds(run))
        took = statistics.median(times)
        copy = statistics.median(copies)
        return {
            "threads": threads,
            "work": work,
            "format": format,
            "dtype": str(dtype).removeprefix("torch."),
            "ms": took * 1e3,
            "best_ms": min(times) * 1e3,
            "gelem": elements / took / 1e9,
            "gb": (write if work.startswith("dequantize") else read) / took / 1e9,
            "of_read": (read + write) / took / statistics.median(bandwidth),
            "of_copy": copy / took,
            "read_gb": statistics.median(bandwidth) / 1e9,
            "repeats": REPEATS,
        }

    for name in formats:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            w = (torch.randn(ROWS, COLUMNS) * 0.02).to(dtype)
            q = nb.quantize(w, name)
            out = torch.empty_like(w)
            yield row(
                "quantize",
                name,
                dtype,
                lambda w=w, name=name: nb.quantize(w, name),
                w.nbytes,
                q.nbytes,
            )
            if dtype == torch.float16:
                continue
            nested = q
            if name == "nf4":
                nested = nb.quantize(w, name, nested=True)
                yield row(
                    "quantize", "nf4 nested", dtype,
                    lambda w=w: nb.quantize(w, "nf4", nested=True), w.nbytes, nested.nbytes,
                )  # fmt: skip
                yield row(
                    "error", name, dtype, lambda w=w, q=q: nb.error(w, q), w.nbytes + q.nbytes, 0
                )
            yield row(
                "dequantize=", name, dtype,
                lambda q=q, out=out: nb.dequantize(q, out=out), q.nbytes, out.nbytes,
            )  # fmt: skip
            if nested is not q:
                yield row(
                    "dequantize=", "nf4 nested", dtype,
                    lambda q=nested, out=out: nb.dequantize(q, out=out), q.nbytes, out.nbytes,
                )  # fmt: skip
            yield row("dequantize", name, dtype, lambda q=q: nb.dequantize(q), q.nbytes, out.nbytes)


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            names = (line.split(":")[1].strip() for line in info if line.startswith("model name"))
            return next(names)
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="also write the rows, with date and processor, to this file")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        for row in measure(options.worker, options.formats):
            print(json.dumps(row), flush=True)
        return
    print(HEADER)
    rows = []
    for threads in options.threads:
        names = ("NYBBLE_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
        command = [sys.executable, __file__, "--worker", str(threads)]
        worker = subprocess.Popen(
            [*command, "--formats", *options.formats],
            env=os.environ | dict.fromkeys(names, str(threads)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for line in worker.stdout:
            row = json.loads(line)
            rows.append(row)
            print(
                f"{row['threads']:>7} {row['work']:<11} {row['format']:<9} {row['dtype']:<9} "
                f"{row['ms']:>7.2f} {row['gelem']:>8.2f} {row['gb']:>6.1f} {row['of_read']:>8.2f} "
                f"{row['of_copy']:>9.2f}",
                flush=True,
            )
        if worker.wait():
            raise SystemExit(f"the run on {threads} threads failed")
    print("dequantize= writes into a given tensor, dequantize makes one; error compares the two.")
    if options.json:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        report = {"date": now, "processor": processor(), "shape": [ROWS, COLUMNS], "rows": rows}
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
