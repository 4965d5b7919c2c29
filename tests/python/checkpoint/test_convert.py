"""Whole checkpoints: what Python adds to the core, whose own tests are in Rust."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nybble as nb
from nybble.checkpoint.sizes import format_size, parse_size

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")


def model_at(path: Path, **extra: torch.Tensor) -> Path:
    torch.manual_seed(0)
    tensors = {f"{name}.weight": 0.02 * torch.randn(96, 64, dtype=torch.bfloat16) for name in NAMES}
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.bfloat16)
    tensors["lm_head.weight"] = torch.randn(32, 64, dtype=torch.bfloat16)
    path.mkdir()
    save_file({**tensors, **extra}, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text('{"model_type": "llama", "dtype": "bfloat16"}')
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return model_at(tmp_path / "source")


def left(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.name != "source")


def test_codes_are_those_of_the_tensor_quantized_alone(source: Path, tmp_path: Path) -> None:
    nb.quantize_checkpoint(source, tmp_path / "out", "nf4", nested=True)
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    for name in NAMES:
        q = nb.quantize(before[f"{name}.weight"], "nf4", nested=True)
        assert torch.equal(after[f"{name}.weight"].flatten(), q.packed.flatten())
        assert torch.equal(after[f"{name}.weight.absmax"], q.absmax)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_a_round_trip_differs_as_much_as_the_report_says(source: Path, tmp_path: Path) -> None:
    report = nb.quantize_checkpoint(source, tmp_path / "out", "int8")
    nb.dequantize_checkpoint(tmp_path / "out", tmp_path / "back", "fp32")
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for row in report.worst(10):
        x, y = before[row.name].double(), after[row.name].double()
        sqnr = 10 * torch.log10(x.square().sum() / (x - y).square().sum())
        assert row.stats is not None
        assert row.stats.sqnr_db == pytest.approx(sqnr.item(), abs=0.01)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == {"model_type": "llama", "dtype": "float32"}


def test_the_report_says_what_became_of_each_tensor(source: Path, tmp_path: Path) -> None:
    report = nb.quantize_checkpoint(source, tmp_path / "out", overrides={"*.up_proj": "fp4"})
    rows = {row.name: row for row in report.tensors}
    assert rows[f"{NAMES[0]}.weight"].format == "nf4"
    assert rows[f"{NAMES[1]}.weight"].format == "fp4"
    assert rows["lm_head.weight"].kept == "output head (default skip)"
    assert rows["model.norm.weight"].kept == "one-dimensional"
    assert report.bytes_before == sum(row.bytes_before for row in report.tensors)
    assert report.bytes_after == sum(row.bytes_after for row in report.tensors)
    assert report.bits_per_weight == pytest.approx(8 * report.bytes_after / report.parameters)
    assert [row.format for row in report.worst(1)] == ["fp4"]
    document = json.loads(report.to_json())
    assert document["schema_version"] == 1
    assert len(document["tensors"]) == len(report.tensors)
    assert "output head (default skip)" in str(report)
    assert str(report).count("\n") >= 5


def test_a_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    report = nb.quantize_checkpoint(source, tmp_path / "out", dry_run=True)
    assert report.dry_run
    assert report.memory_bytes > 0
    assert left(tmp_path) == []


def test_progress_reaches_the_end_and_an_exception_ends_the_work(
    source: Path, tmp_path: Path
) -> None:
    calls: list[tuple[int, int, str]] = []
    nb.quantize_checkpoint(source, tmp_path / "a", on_progress=lambda *call: calls.append(call))
    assert calls[-1][0] == calls[-1][1] > 0
    assert calls[-1][2].endswith(".weight")

    def stop(*call: object) -> None:
        raise RuntimeError(f"enough of {call[2]}")

    with pytest.raises(RuntimeError, match=r"enough of .*weight"):
        nb.quantize_checkpoint(source, tmp_path / "b", on_progress=stop)
    assert left(tmp_path) == ["a"]


def test_ctrl_c_ends_the_work_and_leaves_nothing(tmp_path: Path) -> None:
    big = torch.randn(4096, 4096, dtype=torch.bfloat16)
    source = model_at(tmp_path / "source", **{f"layer{i}.weight": big.clone() for i in range(8)})
    begun = threading.Event()

    def interrupt() -> None:
        begun.wait(30)
        os.kill(os.getpid(), signal.SIGINT)

    other = threading.Thread(target=interrupt)
    other.start()
    with pytest.raises(KeyboardInterrupt):
        nb.quantize_checkpoint(
            source, tmp_path / "out", threads=1, on_progress=lambda *_: begun.set()
        )
    other.join()
    assert left(tmp_path) == []


def test_other_threads_run_meanwhile(source: Path, tmp_path: Path) -> None:
    done = []
    thread = threading.Thread(
        target=lambda: done.append(nb.quantize_checkpoint(source, tmp_path / "out"))
    )
    thread.start()
    thread.join(30)
    assert len(done) == 1


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"format": "nf5"}, nb.FormatError, "did you mean 'nf4'"),
        ({"format": "bf16"}, nb.FormatError, "cast"),
        ({"blocksize": 48}, nb.FormatError, "48"),
        ({"format": "int8", "nested": True}, nb.FormatError, "nested"),
        ({"skip": "lm_head"}, nb.FormatError, "list"),
        ({"skip": ["re:("]}, nb.FormatError, r"re:\("),
        ({"overrides": {"x": "nf5"}}, nb.FormatError, "nf5"),
        ({"layout": "gguf"}, nb.FormatError, "gguf"),
        ({"max_memory": "1 parsec"}, nb.FormatError, "parsec"),
        ({"max_memory": 1}, nb.OutOfMemoryError, "max_memory"),
        ({"threads": 0}, nb.FormatError, "threads"),
        ({"dtype": "fp8"}, nb.FormatError, "fp8"),
        ({"reference": "cuda"}, nb.FormatError, "cuda"),
        ({"nonfinite": "ignore"}, nb.FormatError, "ignore"),
    ],
)
def test_an_option_that_cannot_be_is_refused(
    source: Path, tmp_path: Path, options: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        nb.quantize_checkpoint(source, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert left(tmp_path) == []


def test_files_that_are_missing_or_in_the_way_are_os_errors(source: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        nb.quantize_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    nb.quantize_checkpoint(source, tmp_path / "out")
    with pytest.raises(FileExistsError, match="overwrite"):
        nb.quantize_checkpoint(source, tmp_path / "out")
    with pytest.raises(nb.CheckpointError, match="already"):
        nb.quantize_checkpoint(tmp_path / "out", tmp_path / "again")
    with pytest.raises(nb.CheckpointError, match="nothing here is quantized"):
        nb.dequantize_checkpoint(source, tmp_path / "again")
    with pytest.raises(nb.FormatError, match="source"):
        nb.quantize_checkpoint(source, source / "inside")


def test_nan_is_refused_by_name_and_position(tmp_path: Path) -> None:
    bad = torch.ones(8, 8)
    bad[3, 4] = torch.nan
    source = model_at(tmp_path / "source", **{"z.weight": bad})
    with pytest.raises(nb.FormatError, match=r"z\.weight.*28"):
        nb.quantize_checkpoint(source, tmp_path / "out")
    assert left(tmp_path) == []
    report = nb.quantize_checkpoint(source, tmp_path / "out", nonfinite="zero")
    assert [row.stats.zeroed for row in report.tensors if row.name == "z.weight" and row.stats] == [
        1
    ]


def test_new_files_have_ordinary_modes(source: Path, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        nb.quantize_checkpoint(source, tmp_path / "out")
    finally:
        os.umask(old)
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode & 0o777 == 0o640


def test_converting_needs_no_torch(source: Path, tmp_path: Path) -> None:
    code = (
        "import sys, nybble as nb; "
        f"nb.quantize_checkpoint({os.fspath(source)!r}, {os.fspath(tmp_path / 'out')!r}); "
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sizes_are_read_as_people_write_them() -> None:
    assert parse_size("1GB") == 10**9
    assert parse_size("1.5 GiB") == 3 << 29
    assert parse_size("64k") == 65536
    assert parse_size("123") == parse_size(123) == 123
    assert parse_size(None) is None
    for wrong in ("", "GB", "-1GB", "1 parsec", "1e9"):
        with pytest.raises(nb.FormatError):
            parse_size(wrong)
    with pytest.raises(nb.FormatError):
        parse_size(-1)
    assert [format_size(n) for n in (0, 999, 1000, 1_234_567, 999_999)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1.23 MB",
        "999 kB",
    ]
