"""What bitsandbytes quantized on a CPU has bitsandbytes' bits on the device."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import pytest
import torch

import nybble as nb
from nybble import cuda

GOLDEN = Path(__file__).parents[3] / "golden" / "bnb_checkpoints"
CHECKPOINTS = sorted(path.parent for path in GOLDEN.glob("*/*/dequant.json"))


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_golden_weights_decode_to_the_bits_of_bitsandbytes(path: Path) -> None:
    checkpoint = nb.open_checkpoint(path)
    wanted = json.loads((path / "dequant.json").read_text())
    dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.float16))
    for (module, facts), dtype in zip(list(wanted.items())[:8], dtypes, strict=False):
        q = checkpoint[f"{module}.weight"]
        got = cuda.ops.dequantize(*q.parts, *q.how, dtype)
        digest = hashlib.sha256(got.view(torch.uint8).numpy().tobytes()).hexdigest()
        name = str(dtype).removeprefix("torch.")
        assert digest == facts[name]["sha256"], (module, name)
