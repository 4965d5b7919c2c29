"""The demo on a generated model: what a machine without the model package gets."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")

from nybble.demo import run, source


def test_the_demo_falls_back_to_a_generated_model_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(source, "_smollm2", lambda: None)
    said: list[str] = []
    demo = run(keep=str(tmp_path / "kept"), log=said.append)
    assert any("using a generated model" in line for line in said)
    dense, nf4, int8 = demo.rows
    assert [row.name for row in demo.rows] == ["bf16", "nf4", "int8"]
    assert dense.file_bytes > int8.file_bytes > nf4.file_bytes > 0
    assert dense.bits_per_weight == 16
    assert 0 <= nf4.top1_agreement <= int8.top1_agreement <= 1
    # The planted columns of outliers make o_proj the weakest under one scale a row.
    assert all("o_proj" in layer for layer, _ in int8.worst)
    assert int8.worst[0][1] > nf4.worst[0][1]
    # The converter holds no model and no torch.
    assert nf4.quantize_peak_bytes is not None
    assert nf4.quantize_peak_bytes < 200e6
    assert json.loads(json.dumps(demo.to_dict()))["model"] == demo.model
    assert "weakest layers" in str(demo)
    # What was kept is a model that the demo can start from.
    again = run(model=str(tmp_path / "kept" / "generated"))
    assert again.rows[1].file_bytes == nf4.file_bytes
