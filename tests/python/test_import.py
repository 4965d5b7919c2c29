"""What importing costs and touches."""

from __future__ import annotations

import subprocess
import sys

import pytest

import nybble as nb


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_importing_nybble_loads_neither_torch_nor_numpy():
    out = run("import nybble, sys; print([m for m in ('torch', 'numpy') if m in sys.modules])")
    assert out.strip() == "[]"


def test_using_nybble_touches_neither_cuda_nor_transformers():
    code = (
        "import nybble, torch, sys; nybble.quantize(torch.ones(64)); "
        "print(torch.cuda.is_initialized(), 'transformers' in sys.modules)"
    )
    assert run(code).split() == ["False", "False"]


def test_every_public_name_is_there():
    for name in nb.__all__:
        assert getattr(nb, name) is not None
    assert set(nb.__all__) <= set(dir(nb))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = nb.nonsense
