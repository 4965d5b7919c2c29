"""Tensors of the CPU stand for those of device 0, and torch's stream for a number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nybble.cuda import place

STREAM = 0xDEAD0

Launches = Callable[[], list[dict[str, str]]]


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    def where(_tensor: torch.Tensor) -> place.Place:
        return 0, STREAM

    place._core.cuda_warmup((0, STREAM), place.nvrtc_library())
    monkeypatch.setattr(place, "where", where)


@pytest.fixture
def launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launches:
    """The launches since the last time it was called."""
    log = tmp_path / "log"
    monkeypatch.setenv("NYBBLE_FAKE_LOG", str(log))

    def since() -> list[dict[str, str]]:
        lines = log.read_text().splitlines() if log.exists() else []
        log.write_text("")
        words = [line.split() for line in lines if line.startswith("launch ")]
        return [
            {"kernel": w[1], "grid": f"{w[3]} {w[4]}", "stream": w[8], "device": w[10]}
            for w in words
        ]

    return since
