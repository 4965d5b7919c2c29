"""The device's own counters for two kernels, where ncu is installed and may read them."""

from __future__ import annotations

import glob
import shutil
import subprocess
import sys

from gpu.records import Records

METRICS = {
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue_percent": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
}

LAUNCHES = """
import torch, nybble as nb
q = nb.quantize(torch.randn(14336, 4096, device="cuda", dtype=torch.bfloat16))
x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
nb.linear(x, q); q.dequantize(torch.bfloat16); torch.cuda.synchronize()
"""


def run(records: Records, _name: str) -> None:
    program = shutil.which("ncu") or next(iter(glob.glob("/usr/local/cuda*/bin/ncu")), None)
    if program is None:
        records.add("counters", "ncu", skipped="it is not installed")
        return
    command = [program, "--csv", "--metrics", ",".join(METRICS.values())]
    command += ["-k", "regex:linear4_small8_bf16|dequantize4_bf16", sys.executable, "-c", LAUNCHES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=55)
    names = {metric: name for name, metric in METRICS.items()}
    rows = [line.strip('"').split('","') for line in done.stdout.splitlines() if line[:1] == '"']
    if done.returncode != 0 or len(rows) < 2:
        text = (done.stdout + done.stderr)[-500:]
        records.add("counters", "ncu", skipped=f"it could not read them: {text}")
        return
    columns = {name: i for i, name in enumerate(rows[0])}
    found: dict[str, dict[str, str]] = {}
    for row in rows[1:]:
        kernel = found.setdefault(row[columns["Kernel Name"]], {})
        kernel[names.get(row[columns["Metric Name"]], "?")] = row[columns["Metric Value"]]
    for kernel, figures in found.items():
        records.add("counters", kernel, **figures)
