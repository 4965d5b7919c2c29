"""`benches/gpu_check.py` without a GPU, what it says of a crash, and the comparison of results."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake
import pytest
import torch

BENCHES = fake.ROOT / "benches"
sys.path.insert(0, str(BENCHES))
check_results = importlib.import_module("check_results")
report = importlib.import_module("gpu.report")
LINES = report.LINES


def gpu_check(
    out: Path, cache: Path, *arguments: str, **settings: str
) -> tuple[int, str, dict[str, Any]]:
    command = [sys.executable, str(BENCHES / "gpu_check.py"), "--out", str(out), *arguments]
    env = fake.environment(fake.libraries(), cache, **settings)
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=env)
    found = json.loads((out / "gpu_check.json").read_text())
    return done.returncode, done.stdout, found


def test_environment_and_correctness_run_on_the_fake_driver(tmp_path: Path, cache: Path) -> None:
    code, shown, found = gpu_check(tmp_path, cache, "--backend", "fake")
    records = found["records"]
    assert code == 0, [record for record in records if not record.get("ok", True)]
    stages = {record["stage"]: record["status"] for record in records if record["name"] == "stage"}
    assert stages == {"env": "done", "correctness": "done"}
    checks = [r for r in records if r["stage"] == "correctness" and r["name"] != "stage"]
    assert len(checks) > 30
    assert "Emulated device 0" in shown
    assert len(shown.splitlines()) <= LINES


def test_a_crash_of_one_stage_is_reported_and_the_next_goes_on(tmp_path: Path, cache: Path) -> None:
    # The fake driver ends the process where it cannot find its kernels.
    settings = {"NYBBLE_EMULATOR": "/nonexistent.so"}
    code, shown, found = gpu_check(tmp_path, cache, "--backend", "fake", **settings)
    ended = [record for record in found["records"] if record["name"] == "stage"]
    assert code == 1
    assert [record["status"] for record in ended] == ["crashed", "crashed"]
    assert "nonexistent" in ended[1]["output"]
    # What the stage found before it crashed is kept.
    assert any(record["name"] == "device" for record in found["records"])
    assert "crashed" in shown


def test_failed_launches_are_findings_not_crashes(tmp_path: Path, cache: Path) -> None:
    arguments = ("--backend", "fake", "--stages", "correctness")
    code, shown, found = gpu_check(
        tmp_path, cache, *arguments, NYBBLE_FAKE_FAIL="cuLaunchKernel:719"
    )
    failed = [record for record in found["records"] if not record.get("ok", True)]
    assert code == 1
    assert len(failed) > 20
    assert any("DeviceError" in record["error"] and "719" in record["error"] for record in failed)
    assert len(shown.splitlines()) <= LINES


def test_a_stage_that_takes_too_long_is_ended(tmp_path: Path, cache: Path) -> None:
    code, _, found = gpu_check(tmp_path, cache, "--backend", "fake", "--budget", "1.5")
    status = [record["status"] for record in found["records"] if record["name"] == "stage"]
    assert code == 1
    assert status[0] == "out of time"
    assert "not started" in status[1]


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
