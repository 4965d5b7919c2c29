"""`benches/gpu_check.py` without a GPU, what it says of a crash, and the comparison of results."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fake
import pytest
import torch

BENCHES = fake.ROOT / "benches"
sys.path.insert(0, str(BENCHES))
check_results = importlib.import_module("check_results")
gpu_check_main = importlib.import_module("gpu_check")
child, report, targets = (
    importlib.import_module(f"gpu.{name}") for name in ("child", "report", "targets")
)
LINES = report.LINES


def gpu_check(
    out: Path, cache: Path, *arguments: str, **settings: str
) -> tuple[int, str, dict[str, Any]]:
    command = [sys.executable, str(BENCHES / "gpu_check.py"), "--out", str(out), *arguments]
    env = fake.environment(fake.libraries(), cache, **settings)
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=env)
    found = json.loads((out / "gpu_check.json").read_text())
    return done.returncode, done.stdout, found


def test_every_stage_runs_on_the_fake_driver(tmp_path: Path, cache: Path) -> None:
    code, shown, found = gpu_check(tmp_path, cache, "--backend", "fake")
    records = found["records"]
    assert code == 0, [record for record in records if not record.get("ok", True)]
    stages = {record["stage"]: record["status"] for record in records if record["name"] == "stage"}
    assert stages == dict.fromkeys(gpu_check_main.DEADLINES, "done")
    assert not any(record.get("restarts") for record in records)
    checks = [r for r in records if r["stage"] == "correctness" and r["name"] != "stage"]
    assert len(checks) > 30
    timings = [r for r in records if r["stage"] == "timing" and "us" in r]
    assert len(timings) > 20
    for record in timings:
        # bitsandbytes and dense bf16 stand beside what there is of both.
        wanted = {"us", "gb_s", "of_peak"}
        wanted |= {"dense"} if record["name"].startswith("linear nf4") else set()
        wanted |= {"fused", "decoded"} if record["name"].endswith("M=256") else set()
        assert wanted <= set(record), record
    assert any("of_read" in record for record in timings)
    assert "Emulated device 0" in shown
    assert len(shown.splitlines()) <= LINES


def test_a_way_to_have_kernels_that_is_not_there_is_no_failure(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in fake.environment(fake.libraries(), cache).items():
        monkeypatch.setenv(name, value)
    load = importlib.import_module("gpu.env")._load
    found = load("fake", str(tmp_path), {"NYBBLE_CUDA_IMAGES": "none"})
    assert "names none of cubin, ptx" in found["skipped"]
    # That no way at all is left is a failure, whatever is said of each.
    monkeypatch.setenv("NYBBLE_CUDA_IMAGES", "none")
    assert load("fake", str(tmp_path), {})["ok"] is False
    monkeypatch.setenv("NYBBLE_FAKE_FAIL", "cuModuleLoadData:999")
    found = load("fake", str(tmp_path), {"NYBBLE_CUDA_IMAGES": "ptx"})
    assert "skipped" in found or "999" in found["error"]  # a build may have no text


# A tool of NVIDIA's that runs the program it is given and then says `SAYS`.
TOOL = """#!/bin/sh
while [ "$1" != "$PYTHON_OF_TEST" ]; do shift; done
"$@" || exit 3
cat <<'END'
SAYS
END
exit CODE
"""
NCU = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","linear4_small8_bf16(Linear4)","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","81.5"
"0","1","linear4_small8_bf16(Linear4)","gpu__time_duration.sum","ns","12,345"
"1","1","dequantize4_bf16(Dequantize4)","sm__inst_issued.avg.pct_of_peak_sustained_active","%","30"
"1","1","dequantize4_bf16(Dequantize4)","unknown","%","30"
"""


def with_tool(directory: Path, name: str, says: str, code: int) -> dict[str, str]:
    """The environment in which there is such a tool."""
    tool = directory / name
    tool.write_text(TOOL.replace("SAYS", says).replace("CODE", str(code)))
    tool.chmod(0o755)
    path = f"{directory}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "PYTHON_OF_TEST": sys.executable}


def test_counters_are_read_from_what_ncu_prints(tmp_path: Path, cache: Path) -> None:
    settings = with_tool(tmp_path, "ncu", NCU, 0)
    arguments = ("--backend", "fake", "--stages", "counters")
    code, _, found = gpu_check(tmp_path / "out", cache, *arguments, **settings)
    assert code == 0, found
    (small, decode) = [r for r in found["records"] if r["name"] != "stage"]
    assert (small["dram_percent"], small["duration"]) == ("81.5 %", "12,345 ns")
    assert decode == {
        "stage": "counters",
        "name": "dequantize4_bf16(Dequantize4)",
        "issue_percent": "30 %",
    }


def test_what_the_sanitizer_finds_is_a_failed_check(tmp_path: Path, cache: Path) -> None:
    says = "========= Invalid __global__ read of size 16 bytes"
    settings = with_tool(tmp_path, "compute-sanitizer", says, 9)
    arguments = ("--backend", "fake", "--stages", "sanitizer")
    code, _, found = gpu_check(tmp_path / "out", cache, *arguments, **settings)
    assert code == 1, found
    tools = [r for r in found["records"] if r["name"] != "stage"]
    assert [r["name"] for r in tools] == ["memcheck", "racecheck", "synccheck"]
    # The tool's own status: the launches that it watched went well.
    assert [(r["ok"], r["returncode"]) for r in tools] == [(False, 9)] * 3
    assert all(says in r["error"] for r in tools)


def test_a_crash_of_one_stage_is_reported_and_the_next_goes_on(tmp_path: Path, cache: Path) -> None:
    # The fake driver ends the process where it cannot find its kernels.
    settings = {"NYBBLE_EMULATOR": "/nonexistent.so"}
    arguments = ("--backend", "fake", "--stages", "env", "correctness")
    code, shown, found = gpu_check(tmp_path, cache, *arguments, **settings)
    ended = [record for record in found["records"] if record["name"] == "stage"]
    assert code == 1
    assert [record["status"] for record in ended] == ["crashed", "crashed"]
    assert "nonexistent" in ended[1]["output"]
    # What the stage found before it crashed is kept.
    assert any(record["name"] == "device" for record in found["records"])
    assert "crashed" in shown


def test_a_check_that_ends_its_process_is_one_failure_and_the_rest_goes_on(
    tmp_path: Path, cache: Path
) -> None:
    arguments = ("--backend", "fake", "--stages", "correctness")
    code, shown, found = gpu_check(tmp_path, cache, *arguments, NYBBLE_FAKE_EXIT="int8_outliers")
    assert code == 1
    failed = [r for r in found["records"] if not r.get("ok", True)]
    # The two that launch it.
    assert [r["name"] for r in failed] == ["llm.int8", "a row that is not finite gives NaN"]
    assert all("ended with 71 in this check" in r["error"] for r in failed)
    assert "begun again 2 times" in shown
    assert len([r for r in found["records"] if r.get("ok")]) > 50


def test_failed_launches_are_findings_not_crashes(tmp_path: Path, cache: Path) -> None:
    arguments = ("--backend", "fake", "--stages", "correctness", "timing")
    code, shown, found = gpu_check(
        tmp_path, cache, *arguments, NYBBLE_FAKE_FAIL="cuLaunchKernel:719"
    )
    failed = [record for record in found["records"] if not record.get("ok", True)]
    assert code == 1
    assert len(failed) > 40
    assert any("DeviceError" in record["error"] and "719" in record["error"] for record in failed)
    assert len(shown.splitlines()) <= LINES


def test_a_stage_that_takes_too_long_is_ended(tmp_path: Path, cache: Path) -> None:
    arguments = ("--backend", "fake", "--stages", "env", "correctness", "--budget", "1.5")
    code, _, found = gpu_check(tmp_path, cache, *arguments)
    status = [record["status"] for record in found["records"] if record["name"] == "stage"]
    assert code == 1
    assert status[0] == "out of time"
    assert "not started" in status[1]


def test_a_program_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    script = "import subprocess, sys, time; subprocess.Popen(['sleep', '77.5']); time.sleep(60)"
    start = time.monotonic()
    code, _ = child.run([sys.executable, "-c", script], 1.0, tmp_path / "log")
    assert code == child.SPENT
    assert time.monotonic() - start < 20
    end = time.monotonic() + 20
    while runs("77.5") and time.monotonic() < end:
        time.sleep(0.05)  # a killed process takes a moment to go
    assert not runs("77.5")


def runs(argument: str) -> bool:
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if argument.encode() in process.read_bytes().split(b"\0"):
                return True
    return False


def test_targets_say_what_was_met_and_what_was_missed() -> None:
    timing = {"stage": "timing", "ok": True}
    name = "linear nf4 14336x4096"
    records = [
        timing | {"name": f"{name} M=1", "us": 10.0, "of_peak": 0.9, "bitsandbytes": 1.5},
        timing | {"name": f"{name} M=8", "us": 12.0, "of_peak": 0.8, "bitsandbytes": 0.9},
        timing | {"name": f"{name} M=2048", "us": 400.0, "dense": 0.86},
        timing | {"name": "quantize nf4 14336x4096", "us": 9.0, "of_read": 0.5},
        {
            "stage": "correctness",
            "name": "products nf4 64 (4096, 4096)",
            "error_bfloat16_1_row": 2e-3,
            "error_bfloat16_1_row_decoded": 4e-3,
        },
    ]
    lines = targets.lines(records)
    assert [line.split()[0] for line in lines] == [
        "met",
        "MISSED",
        "MISSED",
        "met",
        "MISSED",
        "met",
    ]
    assert "1.200 (<= 1.1)" in lines[1]
    assert "0.900 (>= 1)" in lines[2]
    assert targets.lines([]) == []


def test_the_table_fits_a_screen_whatever_was_measured() -> None:
    timings = [
        {"stage": "timing", "name": f"linear {i}", "us": float(i), "of_peak": 0.5, "gb_s": 9.0}
        for i in range(200)
    ]
    failed = [{"stage": "correctness", "name": f"check {i}", "ok": False} for i in range(50)]
    lines = report.table({"backend": "cuda", "records": failed + timings})
    assert len(lines) <= LINES
    assert any("linear 0" in line for line in lines)
    assert "more failures" in "".join(lines)


def results(directory: Path, date: str, us: float, device: str = "H100", ok: bool = True) -> None:
    records = [
        {"stage": "env", "name": "device", "device": device},
        {"stage": "correctness", "name": "blocks", "ok": ok, "error": "bits differ"},
        {"stage": "timing", "name": "linear", "us": us},
    ]
    (directory / f"{date}-x.json").write_text(json.dumps({"records": records}))


@pytest.mark.parametrize(
    ("second", "code", "says"),
    [
        ({"us": 10.5}, 0, "0 worse, 0 better"),
        ({"us": 12.0}, 1, "linear: 10.00 us to 12.00 us (1.20x)"),
        ({"us": 5.0}, 0, "0 worse, 1 better"),
        ({"us": 99.0, "device": "A100"}, 0, "another device"),
        ({"us": 10.0, "ok": False}, 1, "blocks failed: bits differ"),
    ],
)
def test_the_last_two_results_are_compared(
    second: dict[str, Any], code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results(tmp_path, "2026-01-01", 1.0)  # older ones do not matter
    results(tmp_path, "2026-01-02", 10.0)
    results(tmp_path, "2026-01-03", **second)
    assert check_results.main(tmp_path) == code
    assert says in capsys.readouterr().out


def test_one_result_or_none_is_nothing_to_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_results.main(tmp_path) == 0
    results(tmp_path, "2026-01-01", 1.0)
    assert check_results.main(tmp_path) == 0
    assert "nothing to compare" in capsys.readouterr().out


def test_results_in_the_repository_have_no_failures() -> None:
    assert check_results.main() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_correctness_on_a_cuda_device(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHES / "gpu_check.py"), "--out", str(tmp_path)]
    command += ["--stages", "env", "correctness", "--budget", "250"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
