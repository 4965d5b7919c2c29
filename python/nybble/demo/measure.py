"""What a model says, how fast, and how often it agrees with another."""

from __future__ import annotations

import importlib.resources
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from nybble.errors import Error

_PROMPT = "The capital of France is"
_NEW_TOKENS = 24
_MAX_IDS = 512


def sample_text() -> str:
    """The bundled text, written for this demo."""
    return importlib.resources.files("nybble.demo").joinpath("text.txt").read_text("utf-8")


def text_ids(tokenizer: Any) -> torch.Tensor:
    """Ids of the bundled text [1, n], n at most 512; bytes where there is no tokenizer."""
    text = sample_text()
    if tokenizer is None:
        return torch.tensor([list(text.encode())[:_MAX_IDS]])
    ids: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids[:, :_MAX_IDS]
    return ids


@torch.inference_mode()
def choices(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The most likely next token at each position [n]."""
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0].argmax(-1)


def agreement(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The fraction of positions with the same choice."""
    return float((ours == reference).double().mean())


@torch.inference_mode()
def generate(model: Any, tokenizer: Any) -> tuple[str, float]:
    """The greedy continuation of the prompt, and tokens a second after the first one."""
    if tokenizer is None:
        ids = torch.tensor([list(_PROMPT.encode())])
    else:
        ids = tokenizer(_PROMPT, return_tensors="pt").input_ids
    mask = torch.ones_like(ids)
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    model.generate(ids, max_new_tokens=1, **options)  # first calls are slower
    start = time.perf_counter()
    model.generate(ids, max_new_tokens=1, min_new_tokens=1, **options)
    first = time.perf_counter() - start
    start = time.perf_counter()
    out = model.generate(ids, max_new_tokens=_NEW_TOKENS, min_new_tokens=_NEW_TOKENS, **options)
    seconds = time.perf_counter() - start - first
    new = out[0, ids.shape[1] :]
    said = tokenizer.decode(new) if tokenizer is not None else str(new[:8].tolist())
    return " ".join(str(said).split()), (_NEW_TOKENS - 1) / max(seconds, 1e-9)


def prompt() -> str:
    """What every model is asked to continue."""
    return _PROMPT


# A child counts the memory that its parent had when it was started as its own. This small
# process in between has next to none; it writes its child's peak after the child's output.
_RUNNER = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


def run_command(arguments: list[str]) -> tuple[str, int]:
    """Run `nybble ...` in its own process: its output and the most memory that it used, bytes."""
    command = [sys.executable, "-c", _RUNNER, sys.executable, "-m", "nybble", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise Error(f"`nybble {' '.join(arguments)}` failed: {done.stdout}{done.stderr}")
    return done.stdout, _bytes(int(done.stderr.split()[-1]))


def peak_memory() -> int:
    """The most memory that this process has used, bytes."""
    return _bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _bytes(maxrss: int) -> int:
    return maxrss if sys.platform == "darwin" else maxrss * 1024


def directory_bytes(directory: Path) -> int:
    """Bytes of all weight files."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
