"""Loading to a device that is not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import nybble as nb
from nybble.checkpoint import open as checkpoints


@pytest.fixture
def to_a_device(monkeypatch):
    """Loads to `cuda`: tensors there have no memory, but everything else.

    The file is read into real memory; `seen` is told of each value, and None before it.
    """
    read = checkpoints.Checkpoint.__getitem__

    def load(empty: nn.Module, path: Path, seen: Callable[[object], None]) -> None:
        def real(self, name):
            seen(None)
            with unset_fake_temporarily():
                value = read(self, name)
            seen(value)
            return value

        monkeypatch.setattr(checkpoints.Checkpoint, "__getitem__", real)
        with FakeTensorMode(allow_non_fake_inputs=True):
            nb.load_model(empty, path, device="cuda")

    return load
