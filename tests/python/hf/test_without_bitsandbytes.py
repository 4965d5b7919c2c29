"""The same in an environment that has no bitsandbytes, whether or not this one has it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import nybble

pytest.importorskip("transformers")

SCRIPT = """
import importlib.util, sys, tempfile
assert importlib.util.find_spec("bitsandbytes") is None
import numpy, torch, transformers
from pathlib import Path
from safetensors.torch import load_file
import nybble.hf as hf

golden = Path(sys.argv[1])
Auto = transformers.AutoModelForCausalLM
try:
    Auto.from_pretrained(golden / "llama_tied" / "fp4")
except ImportError as error:
    assert "bitsandbytes" in str(error)
else:
    raise AssertionError("transformers loaded it without bitsandbytes")

def check(model, path):
    ids = torch.from_numpy(numpy.load(path.parent / "input_ids.npy")).long()
    want = load_file(path / "ref_logits.safetensors")["dequant_fp32"]
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False).logits
    assert float((found - want).norm() / want.norm()) <= 1e-5, path
    assert model.num_parameters() > 0
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        hf.from_pretrained(folder)

paths = [golden / kind for kind in sys.argv[2:]]
for path in paths:
    check(hf.from_pretrained(path, dtype=torch.float32), path)
hf.enable_bitsandbytes_checkpoints()
for path in paths:
    check(Auto.from_pretrained(path, dtype=torch.float32), path)
config = transformers.BitsAndBytesConfig(load_in_4bit=True)
Auto.from_pretrained(golden / "llama_tied" / "original", quantization_config=config)
print("served", len(paths))
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is installed here, but for bitsandbytes, as links."""
    folder = tmp_path_factory.mktemp("site-packages")
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.lower().startswith("bitsandbytes"):
            (folder / entry.name).symlink_to(entry)
    return folder


def test_every_kind_is_served_without_bitsandbytes(packages: Path, golden: Path):
    kinds = [
        "llama_tied/fp4",
        "llama_tied/int8",
        "llama_tied/nf4_dq",
        "llama_untied/nf4_stbf16",
        "mixtral/nf4_dq_legacy_experts",
    ]
    home = Path(nybble.__file__).parents[1]  # of a source tree, or the packages themselves
    paths = [packages] if home == Path(sysconfig.get_paths()["purelib"]) else [home, packages]
    done = subprocess.run(
        [sys.executable, "-S", "-c", SCRIPT, str(golden), *kinds],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith(f"served {len(kinds)}")
