"""A tiny Llama, quantized as bitsandbytes does, its data, and a training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import nybble as nb
import nybble.hf
from nybble.nn.quantized import QuantizedModule

GOLDEN = Path(__file__).parents[2] / "golden"
LLAMA = GOLDEN / "bnb_checkpoints" / "llama_untied"
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"format": "nf4"},
    "nf4_dq": {"format": "nf4", "nested": True},
    "int4": {"format": "int4"},
    "fp4": {"format": "fp4"},
    "int8": {"format": "int8"},
}

# peft 0.21 calls methods that transformers 5.23 has renamed.
RENAMED = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")


def dense(dtype: torch.dtype = torch.float32, layers: int = 2) -> Any:
    """The unquantized model."""
    config = transformers.AutoConfig.from_pretrained(LLAMA / "original")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    nb.load_model(model, LLAMA / "original")
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    return with_dtype(model, dtype)


def with_dtype(model: Any, dtype: torch.dtype) -> Any:
    """Cast parameters; buffers of rotary embeddings stay float32, as transformers loads them."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def quantized(kind: str, dtype: torch.dtype = torch.float32, layers: int = 2) -> Any:
    """The model with the very bytes that bitsandbytes makes of its bfloat16 weights."""
    model = dense(torch.bfloat16, layers)
    nb.quantize_model(model, reference="bitsandbytes-cpu", **KINDS[kind])
    return with_dtype(model, dtype)


def mixture(family: str, **options: Any) -> Any:
    """A small mixture of experts with random weights, the experts quantized."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 320,
        **({} if family == "Mixtral" else {"num_experts": 4, "moe_intermediate_size": 64}),
        **options,
    }
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    nb.quantize_model(model)
    return model.eval()


def decoded(model: nn.Module) -> nn.Module:
    """The same model with its quantized layers decoded in float32."""
    return nb.dequantize_model(model, torch.float32)


def batch() -> torch.Tensor:
    """The tokens of the reference runs."""
    return torch.randint(3, 320, (4, 24), generator=torch.Generator().manual_seed(2))


def adapted(model: nn.Module, **options: Any) -> Any:
    """The model with a LoRA adapter as in the reference runs."""
    torch.manual_seed(1)
    options = {"r": 8, "lora_alpha": 16, **options}
    return peft.get_peft_model(model, nybble.hf.lora_config(model, **options)).eval()


def stir(model: nn.Module, seed: int = 3) -> None:
    """Give an adapter weights that do something: fresh ones have B = 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((0.05 * noise).to(parameter.dtype))


def train(model: nn.Module, ids: torch.Tensor, steps: int, lr: float = 5e-3) -> list[float]:
    """The losses before each step of AdamW, gradients clipped to norm 1."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr)
    model.train()
    losses = []
    for _ in range(steps):
        value = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        losses.append(value.item())
    model.eval()
    return losses


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """Logits of the batch in float32."""
    result: torch.Tensor = model(input_ids=batch(), use_cache=False).logits
    return result.float()


@torch.no_grad()
def loss(model: nn.Module) -> float:
    """Loss of the batch."""
    return float(model(input_ids=batch(), labels=batch(), use_cache=False).loss)


def codes(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all quantized tensors by name."""
    return {
        f"{path}.{name}": tensor.clone()
        for path, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        for name, tensor in module._held("").items()
    }
