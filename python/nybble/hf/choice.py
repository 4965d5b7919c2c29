"""Which modules of a transformers model become quantized, and how."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from nybble import reference
from nybble.errors import CheckpointError, FormatError
from nybble.hf.config import NybbleConfig, ServedConfig
from nybble.nn.coverage import Coverage
from nybble.nn.linear import Linear8bit
from nybble.nn.quantized import QuantizedModule
from nybble.nn.replace import quantize_model

logger = logging.get_logger("nybble.hf")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How a model is to be quantized, whoever described it.

    Attributes:
        format: Format of what no override names.
        blocksize: Elements that share a scale; None for the default.
        nested: Whether scales are quantized too.
        compute_dtype: Dtype of products.
        compute: "int8" for products of integers.
        skip: Patterns as nybble reads them.
        their_skip: bitsandbytes' list, read as transformers reads it.
        default_skip: Whether the output head, as transformers chooses it, stays dense.
        overrides: Pattern to format.
        experts: Whether fused experts are quantized.
        threshold: Of int8 layers.
        storage: Dtype under which 4-bit codes are stored.
        reference: As in `nybble.quantize`.
        strict: Whether an override that fits nothing is an error.
    """

    format: str
    blocksize: int | None = None
    nested: bool = False
    compute_dtype: torch.dtype | None = None
    compute: str | None = None
    skip: Sequence[str] = ()
    their_skip: Sequence[str] = ()
    default_skip: bool = True
    overrides: dict[str, str] = field(default_factory=dict)
    experts: bool = False
    threshold: float | None = None
    storage: torch.dtype = torch.uint8
    reference: str | None = None
    strict: bool = False


def of(config: Any, pre_quantized: bool) -> Wanted:
    """Understand a config.

    Raises:
        CheckpointError: A bitsandbytes entry that asks for what bitsandbytes does not have.
    """
    if isinstance(config, NybbleConfig):
        row_wise = reference.is_row_wise(config.format)
        return Wanted(
            format=config.format,
            blocksize=None if row_wise else config.blocksize,
            nested=config.nested,
            compute_dtype=config.torch_compute_dtype,
            compute=config.compute,
            skip=config.skip or (),
            default_skip=config.skip is None,
            overrides=config.overrides,
            experts=config.experts,
            threshold=config.threshold,
            reference=config.reference,
            strict=not pre_quantized,
        )
    if isinstance(config, ServedConfig):
        named = config.compute_dtype
        compute_dtype = None if named is None else getattr(torch, named)
        return replace(_theirs(config.original), compute_dtype=compute_dtype)
    if isinstance(config, BitsAndBytesConfig):
        wanted = _theirs(config.to_dict())
        if pre_quantized:  # of a stored model, bitsandbytes' default compute dtype says nothing
            return wanted
        compute_dtype = config.bnb_4bit_compute_dtype if config.load_in_4bit else None
        return replace(wanted, compute_dtype=compute_dtype, reference="bitsandbytes-cpu")
    raise TypeError(f"cannot quantize as a {type(config).__name__} says; pass a NybbleConfig")


def _theirs(entry: dict[str, Any]) -> Wanted:
    eight = bool(entry.get("load_in_8bit", entry.get("_load_in_8bit", False)))
    format = "int8" if eight else entry.get("bnb_4bit_quant_type", "fp4")
    if format not in ("int8", "nf4", "fp4"):
        raise CheckpointError(
            f"quantization_config says bnb_4bit_quant_type {format!r}; bitsandbytes has nf4 and"
            " fp4. Correct config.json, or download it again"
        )
    storage = getattr(torch, str(entry.get("bnb_4bit_quant_storage") or "uint8"), None)
    if not isinstance(storage, torch.dtype):
        raise CheckpointError(
            "quantization_config says bnb_4bit_quant_storage"
            f" {entry.get('bnb_4bit_quant_storage')!r}, which is no dtype; correct config.json"
        )
    return Wanted(
        format=format,
        nested=not eight and bool(entry.get("bnb_4bit_use_double_quant", False)),
        their_skip=entry.get("llm_int8_skip_modules") or (),
        default_skip=entry.get("llm_int8_skip_modules") is None,
        storage=torch.uint8 if eight else storage,
    )


def apply(wanted: Wanted, model: Any) -> Coverage:
    """Put quantized modules, still empty, in the place of those that are chosen."""
    alone = [f"re:^{re.escape(path)}$" for path in _left_alone(wanted, model)]
    coverage = quantize_model(
        model,
        wanted.format,
        blocksize=wanted.blocksize,
        nested=wanted.nested,
        compute_dtype=wanted.compute_dtype,
        compute=wanted.compute,
        skip=[*wanted.skip, *alone],
        overrides=wanted.overrides,
        experts=wanted.experts,
    )
    lacking = [pattern for pattern in coverage.unused if pattern in wanted.overrides]
    if wanted.strict and lacking:
        raise FormatError(
            f"overrides name modules that {type(model).__name__} lacks: {lacking}; its quantized"
            f" modules are called like {[row.name for row in coverage.quantized[:2]]}"
        )
    idle = [pattern for pattern in coverage.unused if pattern in wanted.skip]
    if wanted.strict and idle:
        logger.warning("%s", f"skip names nothing in {type(model).__name__}: {idle}")
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            module.storage = wanted.storage
        if isinstance(module, Linear8bit) and module.format == "int8":
            module.threshold = wanted.threshold
    return coverage


def _left_alone(wanted: Wanted, model: Any) -> list[str]:
    """Paths of modules that stay dense, whatever nybble's own patterns say."""
    always = [*_tied(model), *(model._keep_in_fp32_modules or ()), *wanted.their_skip]
    if wanted.default_skip:
        always += get_keys_to_not_convert(model)
    return [
        path
        for path, module in model.named_modules()
        if path
        and next(module.parameters(recurse=False), None) is not None
        and not should_convert_module(path, always)
    ]


def _tied(model: Any) -> set[str]:
    """Modules whose weight is another one's too."""
    names = getattr(model, "all_tied_weights_keys", None) or {}
    return {name.removesuffix(".weight") for pair in names.items() for name in pair}
