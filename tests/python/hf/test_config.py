"""What a `NybbleConfig` accepts, refuses and writes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from nybble.errors import FormatError

hf = pytest.importorskip("nybble.hf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "nf5"}, "did you mean 'nf4'"),
        ({"format": "bf16"}, "bf16 has no quantization"),
        ({"blocksize": 63}, "blocksize 63 is not offered"),
        ({"format": "int8", "nested": True}, "int8 has no nested"),
        ({"nested": 1}, "nested must be True or False"),
        ({"compute_dtype": "float8"}, "compute_dtype must be"),
        ({"skip": "lm_head"}, "skip must be a list"),
        ({"overrides": {"a": "int9"}}, "did you mean 'int4'"),
        ({"overrides": {"re:(": "int8"}}, "not a valid regular expression"),
        ({"threshold": -1.0}, "threshold must be 0 or more"),
        ({"block_size": 64}, "did you mean 'blocksize'"),
        ({"bnb_4bit_quant_type": "nf4"}, "did you mean 'format'"),
        ({"quant_method": "gptq"}, "quant_method 'nybble'"),
        ({"reference": "exactly"}, "reference must be one of"),
        ({"experts": "yes"}, "experts must be True or False"),
    ],
)
def test_a_wrong_option_fails_when_the_config_is_made(options: dict[str, Any], message: str):
    with pytest.raises(FormatError, match=message):
        hf.NybbleConfig(**options)


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4", "int8", "dynamic8", "mxfp4"])
def test_every_format_makes_a_config_that_json_can_hold(format: str):
    config = hf.NybbleConfig(format, skip=["a"], overrides={"re:b": "int8"}, threshold=6)
    again = hf.NybbleConfig(**json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert config.to_dict()["quant_method"] == "nybble"
    assert not any("load_in" in key for key in config.to_dict())


def test_names_that_others_use_are_understood():
    assert hf.NybbleConfig(load_in_4bit=True).format == "nf4"
    assert hf.NybbleConfig(load_in_8bit=True).format == "int8"
    assert hf.NybbleConfig(compute_dtype=torch.bfloat16).compute_dtype == "bfloat16"
    assert hf.NybbleConfig(compute_dtype="fp16").torch_compute_dtype == torch.float16
    assert hf.NybbleConfig("int8", blocksize=0).blocksize is None


def test_importing_twice_registers_once():
    from nybble.hf.register import register

    register()


def test_the_kind_of_arithmetic_is_saved_and_checked() -> None:
    config = hf.NybbleConfig(compute="int8")
    assert hf.NybbleConfig(**config.to_dict()).compute == "int8"
    assert hf.NybbleConfig().to_dict()["compute"] is None
    with pytest.raises(FormatError, match="must be 'int8' or None"):
        hf.NybbleConfig(compute="int4")
    with pytest.raises(FormatError, match="no integer codes"):
        hf.NybbleConfig("dynamic8", compute="int8")
