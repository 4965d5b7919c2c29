"""Put an adapter into the weights of its model, dense or quantized again."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nybble.errors import DeviceError, FormatError
from nybble.hf.adapters.packages import peft
from nybble.nn.replace import dequantize_model

_LOG = logging.getLogger("nybble")

SAME = "same"
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class MergedLayer:
    """What rounding after a merge did to one layer.

    Attributes:
        name: Name of the layer in the base model.
        before: Format of the layer with the adapter beside it.
        after: Format that the sum is stored in.
        weight_norm: Frobenius norm of the exact sum: decoded weight plus update.
        update_norm: That of the update.
        error_norm: That of the difference between what is stored and the exact sum.
    """

    name: str
    before: str
    after: str
    weight_norm: float
    update_norm: float
    error_norm: float

    @property
    def rel_error(self) -> float:
        """The extra error, relative to the merged weight."""
        return _ratio(self.error_norm, self.weight_norm)

    @property
    def update_error(self) -> float:
        """The extra error, relative to the update: above 1 more is lost than was learned."""
        return _ratio(self.error_norm, self.update_norm)


@dataclass(frozen=True, kw_only=True)
class MergeReport:
    """The extra error of a merge, against the model with its adapter beside it.

    Attributes:
        to: What was asked for: "bf16", "fp16", "fp32" or "same".
        adapters: Names of the adapters that were merged.
        layers: One row for each quantized layer that had an adapter.
    """

    to: str
    adapters: tuple[str, ...]
    layers: tuple[MergedLayer, ...]

    @property
    def rel_error(self) -> float:
        """The extra error of all layers together, relative to their merged weights."""
        return _ratio(
            _norm(layer.error_norm for layer in self.layers),
            _norm(layer.weight_norm for layer in self.layers),
        )

    @property
    def update_error(self) -> float:
        """The same, relative to the updates."""
        return _ratio(
            _norm(layer.error_norm for layer in self.layers),
            _norm(layer.update_norm for layer in self.layers),
        )

    def worst(self, count: int = 5) -> list[MergedLayer]:
        """The layers with the largest extra error relative to their weights."""
        return sorted(self.layers, key=lambda layer: layer.rel_error, reverse=True)[:count]

    def __str__(self) -> str:
        total = (
            f"merged {', '.join(self.adapters) or 'no adapter'} into {len(self.layers)} quantized"
            f" layers, to {self.to}: extra error {self.rel_error:.3%} of the weights,"
            f" {self.update_error:.1%} of the updates"
        )
        rows = [
            f"  {layer.name}: {layer.before} -> {layer.after}, {layer.rel_error:.3%} of the"
            f" weight, {layer.update_error:.1%} of the update"
            for layer in self.worst()
        ]
        return "\n".join([total, *rows])


def merge(model: Any, to: str = "bf16", *, adapter_names: Sequence[str] | None = None) -> nn.Module:
    """Merge adapters into the base model and take PEFT's wrappers off.

    The sum of decoded weight and updates is exact (float32) and rounded once. With "same" that
    means quantizing again, and the error of that is of the size of the first quantization's: often
    larger than the update itself. A dtype keeps the update.

    Args:
        model: A `PeftModel` with adapters on quantized layers; it is used up.
        to: "bf16", "fp16" or "fp32" for an ordinary dense model: every quantized layer, adapted or
            not, becomes `nn.Linear` (`Conv1D` where it was made from one), all other floating
            point parameters are cast, and a transformers model loses its `quantization_config`,
            so that it saves as an ordinary checkpoint. "same" leaves each layer in its format,
            block size and nesting, and other parameters in their dtype.
        adapter_names: Which adapters; None for the active ones.

    Returns:
        The base model. Its attribute `merge_report` is a `MergeReport`: the extra error per layer
        and in total. The report is logged too, as a warning for "same".

    Raises:
        ImportError: PEFT is not installed.
        FormatError: An unknown `to`, a model without adapters, an unknown adapter, or an adapter
            whose values are not finite. Nothing was changed then.
        DeviceError: The weights are sharded over processes.
    """
    if to != SAME and to not in _DTYPES:
        known = [*_DTYPES, SAME]
        close = difflib.get_close_matches(str(to), known, n=1)
        hint = f", did you mean '{close[0]}'?" if close else ""
        raise FormatError(f"cannot merge to {to!r}{hint}; known: {', '.join(known)}")
    if not isinstance(model, peft().PeftModel):
        raise FormatError(
            f"merge takes a PeftModel, got {type(model).__name__}; it has no adapter to merge"
        )
    names = _adapters(model, adapter_names)
    layers = [(name, layer, _own(layer, names)) for name, layer in _lora_layers(model)]
    for name, layer, own in layers:
        _check(name, layer, own)
    dtype = _DTYPES.get(to)
    rows = [_merge_layer(model, name, layer, own, dtype) for name, layer, own in layers]
    merged: nn.Module = model.merge_and_unload(adapter_names=names)
    if dtype is not None:
        _make_dense(merged, dtype)
    report = MergeReport(to=to, adapters=tuple(names), layers=tuple(rows))
    merged.merge_report = report  # type: ignore[assignment]
    _LOG.log(logging.WARNING if to == SAME else logging.INFO, "%s", report)
    return merged


def _adapters(model: Any, names: Sequence[str] | None) -> list[str]:
    chosen = list(model.active_adapters if names is None else names)
    for name in chosen:
        if name not in model.peft_config:
            known = ", ".join(model.peft_config)
            raise FormatError(f"the model has no adapter '{name}'; it has: {known}")
        if not isinstance(model.peft_config[name], peft().LoraConfig):
            raise FormatError(
                f"adapter '{name}' is of kind {model.peft_config[name].peft_type}, and only LoRA"
                " can be merged into weights"
            )
    return chosen


def _lora_layers(model: Any) -> Iterator[tuple[str, Any]]:
    from nybble.hf.adapters.lora import LoraLinear

    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def _own(layer: Any, names: Sequence[str]) -> list[str]:
    """The adapters that this layer has, those that were merged already first."""
    merged = list(layer.merged_adapters)
    return [*merged, *(name for name in names if name in layer.lora_A and name not in merged)]


def _check(name: str, layer: Any, own: Sequence[str]) -> None:
    """Find what could go wrong before anything is changed."""
    base = layer.get_base_layer()
    if hasattr(base.weight, "full_tensor"):
        raise DeviceError(
            f"'{name}' is sharded over processes (FSDP); save the adapter, load it onto the model"
            " in one process, and merge there"
        )
    layer.merged_bias(own)
    for adapter in own:
        for part in (layer.lora_A[adapter], layer.lora_B[adapter]):
            if not all(bool(torch.isfinite(tensor).all()) for tensor in part.parameters()):
                raise FormatError(
                    f"adapter '{adapter}' has values in '{name}' that are not finite; its training"
                    " has diverged, or it was damaged"
                )


def _merge_layer(
    model: Any, name: str, layer: Any, own: Sequence[str], dtype: torch.dtype | None
) -> MergedLayer:
    """Replace one LoRA layer by its base layer with the adapters in it."""
    base, before = layer.get_base_layer(), layer.unmerged
    exact, bias = layer.merged_weight(own), layer.merged_bias(own)
    replacement: Any = base
    if dtype is None:
        base.requantize_(exact)
        stored = base.dequantize(torch.float32)
    else:
        stored = exact.to(dtype)
        replacement = base.to_linear(dtype)
        oriented = stored.T.contiguous() if base.transposed else stored
        replacement.weight = nn.Parameter(oriented, requires_grad=False)
    if bias is not None:
        replacement.bias.data = bias.detach().to(dtype or bias.dtype)
    whole = model.get_base_model()
    for alias, module in list(whole.named_modules(remove_duplicate=False)):
        if module is layer:
            whole.set_submodule(alias, replacement)
    return MergedLayer(
        name=name,
        before=before.format,
        after=base.format if dtype is None else str(dtype).removeprefix("torch."),
        weight_norm=_frobenius(exact),
        update_norm=_frobenius(exact - before.dequantize(torch.float32)),
        error_norm=_frobenius(stored.float() - exact),
    )


def _make_dense(model: nn.Module, dtype: torch.dtype) -> None:
    """Make what is left of quantization dense too, and bring all weights to one dtype."""
    dequantize_model(model, dtype)
    # Buffers keep their dtype: those of rotary embeddings must stay float32.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if hasattr(config, "dtype"):
        config.dtype = dtype


def _frobenius(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _norm(values: Iterable[float]) -> float:
    return math.sqrt(sum(value * value for value in values))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (math.inf if part else 0.0)
