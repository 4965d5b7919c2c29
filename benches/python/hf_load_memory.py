"""Memory and time of quantizing a model while transformers loads it: nybble and bitsandbytes.

    python benches/python/hf_load_memory.py [MILLION_PARAMETERS]

Each load runs in a process of its own, from the same random bfloat16 Llama. Anonymous memory
(RssAnon) is sampled; the mapped pages of the file, which the system takes back when it needs them,
are not counted. Prints one JSON document.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

WAYS = ("dense", "nybble", "bitsandbytes")


def anonymous() -> int:
    """Anonymous resident memory of this process, bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in text.splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def make(folder: str, million: int) -> None:
    """Save a random Llama of about this size in shards."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = max(1, round(million / 50))
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=8192,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")


def load(folder: str, way: str) -> dict[str, Any]:
    """Load it one way; peak and final memory over what was in use before."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.set_num_threads(2)
    options: dict[str, Any] = {}
    if way == "nybble":
        from nybble.hf import NybbleConfig

        options = {"quantization_config": NybbleConfig("nf4")}
    elif way == "bitsandbytes":
        import bitsandbytes  # noqa: F401 (so that importing it is not counted)

        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        options = {"quantization_config": config}
    before, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    kept = anonymous()
    return {
        "way": way,
        "seconds": round(seconds, 2),
        "peak_mb": round((peak - before) / 1e6, 1),
        "kept_mb": round((kept - before) / 1e6, 1),
        "tensors": sum(1 for _ in model.parameters()),
    }


def main() -> None:
    """Run all ways, or in a child one of them."""
    if len(sys.argv) == 3:
        print(json.dumps(load(sys.argv[1], sys.argv[2])))
        return
    million = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    with tempfile.TemporaryDirectory() as folder:
        make(folder, million)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        rows = []
        for way in WAYS:
            done = subprocess.run(
                [sys.executable, __file__, folder, way],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
            if done.returncode:
                rows.append({"way": way, "error": done.stderr.strip().splitlines()[-1]})
            else:
                rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
    print(json.dumps({"bf16_mb": round(size / 1e6, 1), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
