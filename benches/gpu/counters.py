"""The device's own counters for a few kernels, where ncu is installed and may read them."""

from __future__ import annotations

import csv

from gpu import child
from gpu.records import Records
from gpu.sanitizer import environment, find, launches

METRICS = {
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue_percent",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor_percent",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "bank_conflicts",
    "gpu__time_duration.sum": "duration",
}
KERNELS = "linear4_small8_bf16|linear4_mid_bf16|dequantize4_bf16"
SECONDS = 50


def run(records: Records, name: str, _after: str | None) -> None:
    program = find("ncu", "/usr/local/cuda*/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu")
    if program is None:
        records.add("counters", "ncu", skipped="it is not installed")
        return
    command = [program, "--csv", "--metrics", ",".join(METRICS), "-k", f"regex:{KERNELS}"]
    log = records.path.with_name("counters.ncu.log")
    code, text = child.run([*command, *launches(name, "large")], SECONDS, log, env=environment())
    found = parse(text)
    if code != 0 or not found:
        records.add("counters", "ncu", skipped=f"it could not read them: {text[-500:]}")
    for kernel, figures in found.items():
        records.add("counters", kernel, **figures)


def parse(text: str) -> dict[str, dict[str, str]]:
    """Figures by kernel, of what ncu prints: lines of its own, then a table of CSV."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines):
        metric = METRICS.get(row.get("Metric Name") or "")
        if metric is not None:
            unit = row.get("Metric Unit") or ""
            value = f"{row.get('Metric Value')} {unit}".strip()
            found.setdefault(str(row.get("Kernel Name")), {})[metric] = value
    return found
