"""How a transformers model is quantized: what `quantization_config` says."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from nybble import _core, reference
from nybble.errors import FormatError
from nybble.integer import check_compute

METHOD = "nybble"
SERVED_METHOD = "nybble_bitsandbytes"

_COMPUTE_DTYPES = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float32"} | {
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
}
_REFERENCES = (None, "exact", "bitsandbytes-cpu")
_ALIASES = {"load_in_4bit": "nf4", "load_in_8bit": "int8"}


class NybbleConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Pass it as `quantization_config` to quantize a model while it is loaded.

    Everything is checked here, before a model is touched.
    """

    def __init__(
        self,
        format: str = "nf4",
        blocksize: int | None = None,
        nested: bool = False,
        compute_dtype: torch.dtype | str | None = None,
        compute: str | None = None,
        skip: Sequence[str] | None = None,
        overrides: Mapping[str, str] | None = None,
        experts: bool = True,
        threshold: float | None = None,
        reference: str | None = None,
        **others: Any,
    ) -> None:
        """Describe a quantized model.

        Args:
            format: Format of every layer that no rule names.
            blocksize: Elements that share a scale; None for the format's default (64 for nf4,
                fp4 and int4).
            nested: Quantize the scales too (double quantization).
            compute_dtype: float16, bfloat16 or float32, as torch dtype or name: the dtype of
                products; None for that of the input.
            compute: "int8" for products of integers, as in `nybble.linear`; None is exact.
            skip: Patterns of modules to leave alone: plain names, globs, or `re:` and a regular
                expression. None stands for the output head, as transformers chooses it. Tied
                weights, and modules that the model wants in float32, are left alone always.
            overrides: Pattern to format name, or to "skip".
            experts: Quantize fused weights of a mixture of experts too.
            threshold: For int8 layers, as in `nybble.nn.Linear8bit`: None decodes the weight,
                a number (bitsandbytes uses 6.0) also quantizes activations as LLM.int8() does.
            reference: "bitsandbytes-cpu" quantizes, on a CPU, to the bytes that bitsandbytes
                gives there, as in `nybble.quantize`; files do not record it.
            **others: None but `quant_method`, and `load_in_4bit` or `load_in_8bit` in place of
                a format.

        Raises:
            FormatError: An unknown name or a value that cannot be.
        """
        method = others.pop("quant_method", METHOD)
        if method != METHOD:
            raise FormatError(f"NybbleConfig describes quant_method '{METHOD}', got {method!r}")
        for alias, meaning in _ALIASES.items():
            if others.pop(alias, False):
                format = meaning
        _refuse_unknown(others)
        self.quant_method = METHOD
        self.format = format
        self.blocksize = blocksize or None  # files write 0 where a format has no blocks
        self.nested = _boolean("nested", nested)
        self.compute_dtype = _compute_dtype(compute_dtype)
        self.compute = compute
        self.skip = _patterns(skip)
        self.overrides = dict(overrides or {})
        self.experts = _boolean("experts", experts)
        self.threshold = None if threshold is None else float(threshold)
        self.reference = reference
        self._check()

    def _check(self) -> None:
        _core.layout(self.format, [1], None, False)  # is it a format to quantize to?
        blocksize = None if reference.is_row_wise(self.format) else self.blocksize
        _core.layout(self.format, [1], blocksize, self.nested)
        _core.Rules(self.skip or [], self.overrides)
        check_compute(self.compute, self.format)
        if self.reference not in _REFERENCES:
            raise FormatError(f"reference must be one of {_REFERENCES}, got {self.reference!r}")
        if self.threshold is not None and not self.threshold >= 0:
            raise FormatError(f"threshold must be 0 or more, or None; got {self.threshold}")

    @property
    def torch_compute_dtype(self) -> torch.dtype | None:
        """`compute_dtype` as torch knows it."""
        return None if self.compute_dtype is None else getattr(torch, self.compute_dtype)

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds."""
        return {
            "quant_method": self.quant_method,
            "format": self.format,
            "blocksize": self.blocksize,
            "nested": self.nested,
            "compute_dtype": self.compute_dtype,
            "compute": self.compute,
            "skip": None if self.skip is None else list(self.skip),
            "overrides": dict(self.overrides),
            "experts": self.experts,
            "threshold": self.threshold,
        }


class ServedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a bitsandbytes checkpoint whose weights nybble serves.

    It keeps what the checkpoint says, and writes it again when the model is saved.

    Attributes:
        original: bitsandbytes' entry.
        compute_dtype: Dtype of products; None for that of the input.
    """

    def __init__(
        self,
        original: Mapping[str, Any] | None = None,
        compute_dtype: torch.dtype | str | None = None,
        **others: Any,
    ) -> None:
        """Take over an entry; `others` may be only `quant_method`."""
        others.pop("quant_method", None)
        _refuse_unknown(others)
        self.quant_method = SERVED_METHOD
        self.original = dict(original or {})
        self.compute_dtype = _compute_dtype(compute_dtype)

    def to_dict(self) -> dict[str, Any]:
        """The entry as bitsandbytes wrote it."""
        return dict(self.original)


def bitsandbytes_entry(
    format: str,
    nested: bool,
    compute_dtype: str,
    skip: list[str] | None,
    storage: torch.dtype = torch.uint8,
    threshold: float = 6.0,
) -> dict[str, Any]:
    """What transformers writes for a model that bitsandbytes quantized.

    The entry of transformers' `BitsAndBytesConfig(...).to_dict()`; options that are not in use
    have that class's defaults.
    """
    from transformers import BitsAndBytesConfig

    common = {"llm_int8_skip_modules": skip, "llm_int8_threshold": threshold}
    if format == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, **common)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=format,
            bnb_4bit_use_double_quant=nested,
            bnb_4bit_compute_dtype=compute_dtype,
            bnb_4bit_quant_storage=storage,
            **common,
        )
    return plain(config.to_dict())


def plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry with text in place of transformers' enumeration of methods."""
    method = entry.get("quant_method")
    return {**entry, "quant_method": str(getattr(method, "value", method))}


def _refuse_unknown(others: Mapping[str, Any]) -> None:
    known = [name for name in inspect.signature(NybbleConfig).parameters if name != "others"]
    for name in others:
        close = difflib.get_close_matches(name, known, n=1)
        theirs = {"bnb_4bit_quant_type": "format", "bnb_4bit_use_double_quant": "nested"} | {
            "bnb_4bit_compute_dtype": "compute_dtype",
            "llm_int8_skip_modules": "skip",
            "llm_int8_threshold": "threshold",
            "bnb_4bit_blocksize": "blocksize",
        }
        meant = theirs.get(name) or (close[0] if close else None)
        hint = f"; did you mean {meant!r}?" if meant else ""
        raise FormatError(f"unknown option {name!r}{hint} Options: {', '.join(known)}")


def _boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise FormatError(f"{name} must be True or False, got {value!r}")
    return value


def _compute_dtype(value: torch.dtype | str | None) -> str | None:
    if value is None:
        return None
    name = _COMPUTE_DTYPES.get(str(value).removeprefix("torch."))
    if name is None:
        raise FormatError(
            f"compute_dtype must be float16, bfloat16, float32 or None, got {value!r}"
        )
    return name


def _patterns(value: Sequence[str] | None) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, str) or not all(isinstance(item, str) for item in value):
        raise FormatError(f"skip must be a list of patterns, got {value!r}")
    return list(value)
