"""Write what transformers and bitsandbytes would have written."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from nybble.errors import FormatError
from nybble.hf import choice
from nybble.hf.config import NybbleConfig, ServedConfig, bitsandbytes_entry, plain
from nybble.nn.embedding import QuantizedEmbedding
from nybble.nn.quantized import QuantizedModule

_THEIR_FORMATS = ("nf4", "fp4", "int8")


def save_bitsandbytes(model: Any, dst: str | os.PathLike[str], **kwargs: Any) -> None:
    """Save a quantized transformers model as transformers does with bitsandbytes.

    The tensors and `config.json` are those that bitsandbytes would have written for the same
    quantized weights, so it can load them. They have no field for `compute`, so what is loaded
    from them computes exactly; `save_pretrained` of a model with a `NybbleConfig` keeps it.

    Args:
        model: A `PreTrainedModel` with quantized layers, however they came to be.
        dst: A directory, made if need be.
        **kwargs: As for `save_pretrained` (`max_shard_size`, ...).

    Raises:
        FormatError: A layer has what bitsandbytes lacks; nothing is written then.
    """
    entry = ServedConfig(original=_entry(model))
    config = model.config
    before = getattr(config, "quantization_config", None)
    quantizer = getattr(model, "hf_quantizer", None)
    config.quantization_config = entry
    if quantizer is not None:
        own, quantizer.quantization_config = quantizer.quantization_config, entry
    try:
        model.save_pretrained(os.fspath(dst), **kwargs)
    finally:
        if quantizer is not None:
            quantizer.quantization_config = own
        if before is None:
            del config.quantization_config
        else:
            config.quantization_config = before


def _entry(model: Any) -> dict[str, Any]:
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, QuantizedModule)
    }
    _refuse(model, layers)
    config = getattr(model.config, "quantization_config", None)
    example = next(iter(layers.values()))
    if isinstance(config, (ServedConfig, BitsAndBytesConfig)):
        entry: dict[str, Any] = config.to_dict()
        said = choice.of(config, pre_quantized=True)
        if (said.format, said.nested) == (example.format, example.nested_absmax is not None):
            return plain(entry)
    compute = example.compute_dtype or example.dtype
    return bitsandbytes_entry(
        example.format,
        example.nested_absmax is not None,
        str(compute).removeprefix("torch."),
        _skip(model, layers, config.skip if isinstance(config, NybbleConfig) else None),
        example.storage,
    )


def _refuse(model: Any, layers: dict[str, QuantizedModule]) -> None:
    if not layers:
        raise FormatError(f"{type(model).__name__} has no quantized layers; use save_pretrained")
    kinds = Counter((m.format, m.nested_absmax is not None, m.storage) for m in layers.values())
    formats = sorted({format for format, _, _ in kinds})
    lacking = [format for format in formats if format not in _THEIR_FORMATS]
    embeddings = [path for path, m in layers.items() if isinstance(m, QuantizedEmbedding)]
    experts = [path for path in layers if ".experts." in path]
    if lacking:
        problem = f"layers are {', '.join(lacking)}, which bitsandbytes does not have"
    elif len(kinds) > 1:
        problem = f"layers differ in kind ({formats}); one bitsandbytes checkpoint has one kind"
    elif embeddings:
        problem = f"{embeddings[0]} is a quantized embedding, which transformers would not load"
    elif experts:
        problem = f"{experts[0]} is a quantized expert, which transformers 5 would not load"
    else:
        return
    raise FormatError(
        f"cannot write a bitsandbytes checkpoint: {problem}; use save_pretrained, which nybble"
        " reads, or quantize without it"
    )


def _skip(
    model: Any, layers: dict[str, QuantizedModule], asked: list[str] | None
) -> list[str] | None:
    """The skip list that makes transformers quantize just these layers; None for the default."""
    dense = [
        path
        for path, module in model.named_modules()
        if type(module) is nn.Linear or isinstance(module, Conv1D)
    ]
    fp32 = list(model._keep_in_fp32_modules or ())

    def fits(patterns: list[str]) -> bool:
        return all(should_convert_module(path, patterns) for path in layers) and not any(
            should_convert_module(path, patterns) for path in dense
        )

    if asked and fits([*asked, *fp32]):
        return list(asked)
    if fits([*get_keys_to_not_convert(model), *fp32]):
        return None
    return dense
