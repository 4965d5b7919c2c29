"""Opening checkpoints: what bitsandbytes wrote, what nybble writes, and what is damaged."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nybble as nb

GOLDEN = Path(__file__).parents[2] / "golden" / "bnb_checkpoints"
CHECKPOINTS = sorted(path.parent for path in GOLDEN.glob("*/*/dequant.json"))
W = "fc.weight"


def sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def save(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        directory / "model.safetensors",
    )
    return directory


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_golden_weights_decode_to_the_bits_of_bitsandbytes(path: Path) -> None:
    checkpoint = nb.open_checkpoint(path)
    wanted = json.loads((path / "dequant.json").read_text())
    for module, facts in wanted.items():
        q = checkpoint[f"{module}.weight"]
        assert list(q.shape) == facts["shape"]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            assert sha256(q.dequantize(dtype)) == facts[name]["sha256"], (module, name)
    assert checkpoint.verify().problems == []
    assert checkpoint.summary().quantized.tensors == len(wanted)


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_dense_tensors_are_those_of_safetensors(path: Path) -> None:
    checkpoint = nb.open_checkpoint(path)
    expected = {}
    for file in path.glob("model*.safetensors"):
        expected.update(load_file(file))
    dense = [name for name in checkpoint if checkpoint.entry(name).format is None]
    assert dense
    for name in dense:
        assert checkpoint[name].dtype == expected[name].dtype
        assert torch.equal(checkpoint[name], expected[name])


def test_it_is_a_mapping_of_parameters_without_companions() -> None:
    path = GOLDEN / "llama_tied" / "nf4_dq"
    checkpoint = nb.open_checkpoint(str(path))
    quantized = "model.layers.0.mlp.up_proj.weight"
    assert quantized in checkpoint
    assert f"{quantized}.absmax" not in checkpoint
    assert len(checkpoint) == len(list(checkpoint)) == len(set(checkpoint.keys()))
    assert checkpoint.config == json.loads((path / "config.json").read_text())
    with pytest.raises(KeyError, match=r"did you mean 'model\.layers\.0\.mlp\.up_proj\.weight'"):
        checkpoint["model.layers.0.mlp.up_porj.weight"]
    entry = checkpoint.entry(quantized)
    assert (entry.format, entry.blocksize, entry.nested, entry.dtype) == (
        "nf4",
        64,
        True,
        "bfloat16",
    )
    assert checkpoint[quantized].dtype == torch.bfloat16


def test_summary_counts_every_byte_of_the_file() -> None:
    path = GOLDEN / "llama_tied" / "nf4_dq"
    summary = nb.open_checkpoint(path).summary()
    stored = load_file(path / "model.safetensors")
    assert summary.total.bytes == sum(tensor.nbytes for tensor in stored.values())
    assert set(summary.formats) == {"bf16", "nf4"}
    assert 4 < summary.quantized.bits_per_weight < 4.6
    assert "nf4" in str(summary)


@pytest.mark.parametrize(
    ("format", "nested"),
    [
        (row["name"], nested)
        for row in nb.formats()
        for nested in (False, row["nestable"])
        if row["decode"] != "dense"
    ],
)
def test_what_a_qtensor_writes_is_read_back(tmp_path: Path, format: str, nested: bool) -> None:
    q = nb.quantize(
        torch.randn(8, 96, generator=torch.Generator().manual_seed(1)), format, nested=nested
    )
    again = nb.open_checkpoint(save(tmp_path, q.state_dict(W)))[W]
    assert (again.format, again.shape, again.blocksize) == (q.format, q.shape, q.blocksize)
    for part, expected in zip(again.parts, q.parts, strict=True):
        assert (part is None) == (expected is None)
        assert part is None or torch.equal(part, expected)
    assert torch.equal(again.dequantize(torch.float32), q.dequantize(torch.float32))


def test_dense_dtypes_and_odd_shapes(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
        "bool": torch.tensor([True, False]),
        "float64": torch.randn(3, dtype=torch.float64),
        "complex64": torch.randn(3, dtype=torch.complex64),
        "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
        "float8": torch.randn(5).to(torch.float8_e4m3fn),
    }
    checkpoint = nb.open_checkpoint(save(tmp_path, tensors) / "model.safetensors")
    assert checkpoint.config == {}
    for name, tensor in tensors.items():
        assert checkpoint[name].dtype == tensor.dtype
        assert checkpoint[name].shape == tensor.shape
        assert torch.equal(
            checkpoint[name].view(torch.uint8)
            if tensor.is_floating_point() and tensor.dim()
            else checkpoint[name],
            tensor.view(torch.uint8) if tensor.is_floating_point() and tensor.dim() else tensor,
        )


def test_a_damaged_save_names_the_remedy_and_is_repaired(tmp_path: Path) -> None:
    q = nb.quantize(torch.randn(32, 128, generator=torch.Generator().manual_seed(2)), "nf4")
    tensors = q.state_dict(W)
    # What bitsandbytes saves after a forward pass on a CPU: [columns / 64, rows] in bfloat16.
    tensors[f"{W}.absmax"] = q.absmax.reshape(32, 2).t().to(torch.bfloat16)
    path = save(tmp_path, tensors)
    (problem,) = nb.open_checkpoint(path).verify().problems
    assert problem.tensor == W
    assert "repair=True" in problem.remedy
    with pytest.raises(nb.CheckpointError, match=r"fc\.weight.*transposed.*repair=True"):
        nb.open_checkpoint(path)[W]
    repaired = nb.open_checkpoint(path, repair=True)
    assert repaired.verify().ok
    assert torch.equal(repaired[W].absmax, q.absmax.to(torch.bfloat16).float())


def test_errors_are_of_the_kind_that_python_expects(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        nb.open_checkpoint(tmp_path / "absent")
    with pytest.raises(nb.CheckpointError, match=r"neither model\.safetensors nor"):
        nb.open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(nb.CheckpointError, match=r"model\.safetensors"):
        nb.open_checkpoint(tmp_path)


def test_a_missing_companion_and_a_scale_that_is_not_finite_are_found(tmp_path: Path) -> None:
    source = GOLDEN / "llama_tied" / "fp4"
    tensors = load_file(source / "model.safetensors")
    first, second = sorted(name for name in tensors if name.endswith(".absmax"))[:2]
    tensors[first][3] = float("nan")
    del tensors[second]
    shutil.copy(source / "config.json", tmp_path)
    checkpoint = nb.open_checkpoint(save(tmp_path, tensors))
    problems = {problem.tensor: problem for problem in checkpoint.verify().problems}
    assert set(problems) == {first.removesuffix(".absmax"), second.removesuffix(".absmax")}
    assert "position 3" in str(problems[first.removesuffix(".absmax")])
    assert "absmax is missing" in str(problems[second.removesuffix(".absmax")])
