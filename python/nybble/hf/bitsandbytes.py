"""Checkpoints that transformers wrote with bitsandbytes: served by nybble, and written."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import auto
from transformers.utils import logging

from nybble.errors import CheckpointError
from nybble.hf.config import METHOD, SERVED_METHOD
from nybble.hf.quantizer import NybbleHfQuantizer
from nybble.hf.writing import save_bitsandbytes

__all__ = [
    "disable_bitsandbytes_checkpoints",
    "enable_bitsandbytes_checkpoints",
    "from_pretrained",
    "save_bitsandbytes",
]

logger = logging.get_logger("nybble.hf")

_THEIRS = "bitsandbytes"
_ENTRIES = (f"{_THEIRS}_4bit", f"{_THEIRS}_8bit")
_before: dict[str, type] = {}

# Arguments that say where a checkpoint is, which finding its config needs too.
_WHERE = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    model_class: Any = None,
    compute_dtype: torch.dtype | str | None = None,
    **kwargs: Any,
) -> Any:
    """Load a model, quantized by bitsandbytes, by nybble or not at all, with nybble's layers.

    bitsandbytes need not be installed; nothing of transformers is changed. The weights decode to
    the same bits as with bitsandbytes. Products have the dtype of their input, unless
    `compute_dtype` says otherwise; activations are not quantized.

    Args:
        path: Directory or hub id, as for transformers.
        model_class: Class with a `from_pretrained`, such as `transformers.AutoModel`; None for
            the one that the config names, or else `AutoModelForCausalLM`.
        compute_dtype: Dtype of products of quantized layers.
        **kwargs: What that `from_pretrained` takes (`dtype`, `device_map`,
            `quantization_config`, ...).

    Raises:
        CheckpointError: The checkpoint is damaged, or another method quantized it.
        OSError: A file is missing.
    """
    path = os.fspath(path)
    where = {name: kwargs[name] for name in _WHERE if name in kwargs}
    config = kwargs.pop("config", None)
    if config is None:
        config = AutoConfig.from_pretrained(path, **where)
    holder = config
    entry = _entry(config)
    if entry is None:
        holder = config.get_text_config(decoder=True)
        entry = _entry(holder)
    if entry is not None:
        method = _method(entry)
        if kwargs.get("quantization_config") is not None:
            raise CheckpointError(
                f"{path} is quantized already, by '{method}'; leave quantization_config out, or"
                " quantize the original model"
            )
        if method == _THEIRS:
            name = None if compute_dtype is None else str(compute_dtype).removeprefix("torch.")
            holder.quantization_config = {
                "quant_method": SERVED_METHOD,
                "original": entry,
                "compute_dtype": name,
            }
        elif method != METHOD:
            raise CheckpointError(
                f"{path} is quantized by '{method}'; nybble reads bitsandbytes' and its own."
                f" Load it with transformers and {method}, or quantize the original model"
            )
        elif compute_dtype is not None:
            name = str(compute_dtype).removeprefix("torch.")
            holder.quantization_config = {**entry, "compute_dtype": name}
    if model_class is None:
        names = getattr(config, "architectures", None) or [""]
        model_class = getattr(transformers, names[0], AutoModelForCausalLM)
    return model_class.from_pretrained(path, config=config, **kwargs)


def _entry(config: Any) -> dict[str, Any] | None:
    entry = getattr(config, "quantization_config", None)
    if entry is None or isinstance(entry, dict):
        return entry
    described: dict[str, Any] = entry.to_dict()
    return described


def _method(entry: dict[str, Any]) -> str:
    if any(entry.get(f"{start}load_in_{bits}bit") for start in ("", "_") for bits in (4, 8)):
        return _THEIRS
    method = entry.get("quant_method")
    return str(getattr(method, "value", method))


def enable_bitsandbytes_checkpoints() -> None:
    """Let plain `from_pretrained` calls use nybble where they would use bitsandbytes.

    That is for checkpoints that bitsandbytes quantized, and for `BitsAndBytesConfig`. It holds
    for the whole process until `disable_bitsandbytes_checkpoints`; again does nothing. Models that
    were loaded before keep their layers.
    """
    if _before:
        return
    logger.info("%s", "bitsandbytes checkpoints are served by nybble from now on")
    for name in _ENTRIES:
        _before[name] = auto.AUTO_QUANTIZER_MAPPING[name]
        auto.AUTO_QUANTIZER_MAPPING[name] = NybbleHfQuantizer


def disable_bitsandbytes_checkpoints() -> None:
    """Undo `enable_bitsandbytes_checkpoints`; models that are loaded stay as they are."""
    auto.AUTO_QUANTIZER_MAPPING.update(_before)
    _before.clear()
