"""Quantized models under FSDP2: what is sharded, and how to save it.

`torch.distributed.fsdp.fully_shard` takes nybble's layers as they are:

    model = prepare_for_qlora(model)
    model = peft.get_peft_model(model, lora_config(model))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)

Sharded over the processes are the codes (uint8 or int8, along their first dimension, at any byte)
and every ordinary parameter: adapters, norms, embeddings. Each process keeps a whole copy of the
scales, which are buffers: 1/8 of the bytes of 4-bit codes at block size 64, 1/30 with nested
scales. While a layer computes, and again in its backward pass, its codes are whole.

`MixedPrecisionPolicy` casts adapters and norms for the computation, and never codes or scales.
Adapters of a bfloat16 model are float32; FSDP2 wants one dtype among the trainable parameters it
gathers together, which they have.

With accelerate (FSDP2), set `fsdp_cpu_ram_efficient_loading` to false: it rebuilds models from a
state dict of sharded parameters only, and scales are none. FSDP1 flattens parameters of one dtype
and cannot take codes and floats together.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from nybble.nn.quantized import QuantizedModule
from nybble.qtensor import QTensor


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole state of a sharded model, in host memory, under the keys of one that is not.

    All processes must call it together. Quantized weights come under bitsandbytes' key scheme,
    bit for bit.

    Args:
        model: A model after `fully_shard`; also one that is not sharded.

    Returns:
        Every tensor on the first process; nothing on the others.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    tensors: dict[str, Any] = get_model_state_dict(model, options=options)
    for path, module in model.named_modules():
        if isinstance(module, QuantizedModule) and f"{path}.absmax" in tensors:
            tensors.update(_gathered(module, tensors, f"{path}.").state_dict(f"{path}."))
    return tensors


def save_adapter(model: nn.Module, dst: str | os.PathLike[str], **options: object) -> None:
    """Save the adapters of a sharded `PeftModel` as an ordinary adapter directory.

    All processes must call it together; the first one writes. `nybble.hf.load_adapter`, or PEFT
    alone on the dense model, loads the result.

    Args:
        model: A `PeftModel` after `fully_shard`.
        dst: A directory.
        options: Passed to `PeftModel.save_pretrained`, for instance `selected_adapters`.
    """
    import torch.distributed as dist

    tensors = full_state_dict(model)
    if dist.get_rank() == 0:
        model.save_pretrained(dst, state_dict=tensors, **options)  # type: ignore[operator]
    dist.barrier()


def _gathered(module: QuantizedModule, tensors: dict[str, torch.Tensor], prefix: str) -> QTensor:
    """One weight from the tensors of a sharded module, which are taken out."""
    packed = tensors.pop(f"{prefix}weight")
    return QTensor(
        packed=packed if module.format == "int8" else packed.flatten(),
        absmax=tensors.pop(f"{prefix}absmax"),
        format=module.format,
        shape=module.shape,
        dtype=module.dtype,
        blocksize=module.blocksize,
        nested_absmax=tensors.pop(f"{prefix}nested_absmax", None),
        nested_offset=tensors.pop(f"{prefix}nested_offset", None),
    )
