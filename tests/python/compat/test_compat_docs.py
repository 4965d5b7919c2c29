"""`docs/from_bitsandbytes.md` runs, and names what there is and what there is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import nybble.compat.bitsandbytes as bnb
from nybble.compat.bitsandbytes._offered import NOT_OFFERED

PAGE = Path(__file__).parents[3] / "docs" / "from_bitsandbytes.md"
TEXT = PAGE.read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
PROSE = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
OFFERED, MISSING = PROSE.split("## Not offered")


def names(prose: str) -> set[str]:
    return set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", prose))))


def test_the_examples_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) == 2
    scope: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, PAGE.name, "exec"), scope)
    assert (tmp_path / "layer.safetensors").exists()


@pytest.mark.parametrize("module", [bnb, bnb.functional, bnb.nn, bnb.nn.parametrize, bnb.utils])
def test_every_offered_name_is_in_a_table(module):
    assert set(module.__all__) <= names(OFFERED)


@pytest.mark.parametrize("module", NOT_OFFERED)
def test_every_name_that_is_not_offered_is_in_the_last_table(module):
    assert NOT_OFFERED[module].keys() <= names(MISSING)
    for name in NOT_OFFERED[module]:
        assert f"`{name}`" not in OFFERED, name
