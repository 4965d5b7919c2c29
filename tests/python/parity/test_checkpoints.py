"""Checkpoints of many architectures: every byte as transformers and bitsandbytes save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import nybble as nb

pytestmark = pytest.mark.parity
pytest.importorskip("bitsandbytes")
tf = pytest.importorskip("transformers")

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
BERT = {**LLAMA, "num_key_value_heads": 4}
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64}
T5 = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 128,
}
DEEPSEEK = {
    **BERT,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
QWEN_MOE = {
    **LLAMA,
    "num_experts": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}

# config class, model class, options
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "gpt_bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", GPT2),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", LLAMA),
    "opt": ("OPTConfig", "OPTForCausalLM", {**LLAMA, "ffn_dim": 96, "word_embed_proj_dim": 32}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**LLAMA, "head_dim": 16}),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", QWEN_MOE),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", DEEPSEEK),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**LLAMA, "head_dim": 16}),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5),
    "bert": ("BertConfig", "BertForSequenceClassification", BERT),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", BERT),
    "llama_classifier": ("LlamaConfig", "LlamaForSequenceClassification", LLAMA),
    "mamba": ("MambaConfig", "MambaForCausalLM", {**LLAMA, "state_size": 8}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_every_byte_is_the_same(tmp_path: Path, name: str, dtype: torch.dtype, format: str) -> None:
    config, model_class, options = MODELS[name]
    torch.manual_seed(0)
    cls = getattr(tf, model_class)
    cls(getattr(tf, config)(**options)).to(dtype).save_pretrained(tmp_path / "source")
    if format == "nf4":
        quantization = tf.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    else:
        quantization = tf.BitsAndBytesConfig(load_in_8bit=True)
    theirs = cls.from_pretrained(
        tmp_path / "source", quantization_config=quantization, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "theirs")

    nested = format == "nf4"
    nb.quantize_checkpoint(
        tmp_path / "source", tmp_path / "ours", format, nested=nested, reference="bitsandbytes-cpu"
    )
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    want = load_file(tmp_path / "theirs" / "model.safetensors")
    assert ours.keys() == want.keys()
    for key, tensor in want.items():
        assert (ours[key].dtype, ours[key].shape) == (tensor.dtype, tensor.shape), key
        mine, its = ours[key].reshape(-1), tensor.reshape(-1)
        assert torch.equal(mine.view(torch.uint8), its.view(torch.uint8)), key
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("ours", "theirs")]
    assert configs[0] == configs[1]
