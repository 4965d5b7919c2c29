"""Put a saved adapter onto a model with quantized layers."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from nybble.errors import CheckpointError
from nybble.hf.adapters.config import base_model, register
from nybble.hf.adapters.packages import peft
from nybble.hf.adapters.support import check_supported
from nybble.hf.adapters.targets import named_layers
from nybble.nn.linear import QuantizedLinear

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Of a LoRA matrix: where its name is cut, which of its dimensions faces the layer, and how many
# features the layer has there.
_FACING = {".lora_A.": (1, "in_features"), ".lora_B.": (0, "out_features")}
_PREFIX = "base_model.model."


def load_adapter(
    model: nn.Module,
    path_or_id: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
    **options: Any,
) -> Any:
    """Load a LoRA adapter that PEFT has saved.

    As `peft.PeftModel.from_pretrained`, which cannot wrap nybble's layers by itself. The adapter
    may have been trained on this quantized model, another quantized form or the dense model.

    Args:
        model: The base model, or a `PeftModel`, which gets one adapter more. An adapter that is
            added to a `PeftModel` is not active until `set_adapter` says so.
        path_or_id: A directory that `save_pretrained` wrote, or an id on the Hub.
        adapter_name: Name for it in the model.
        is_trainable: Whether training goes on; else its weights are frozen.
        options: Passed to PEFT, for instance `revision`, `token`, `autocast_adapter_dtype`.

    Returns:
        The `PeftModel`.

    Raises:
        ImportError: PEFT is not installed.
        FileNotFoundError: The directory is missing or has no adapter.
        CheckpointError: The adapter is no LoRA adapter, or belongs to another model. Nothing was
            changed then.
    """
    library = peft()
    path = os.fspath(path_or_id)
    _check_files(path, options.get("subfolder"))
    hub = ("subfolder", "revision", "cache_dir", "token")
    config = library.PeftConfig.from_pretrained(path, **_chosen(options, hub))
    if not isinstance(config, library.LoraConfig):
        raise CheckpointError(
            f"{path} holds an adapter of kind {config.peft_type}; only LoRA goes around quantized"
            " layers"
        )
    check_supported(config)
    base = base_model(model)
    _check_fit(path, _shapes(path, options.get("subfolder")), base)
    config.inference_mode = not is_trainable
    register(config)
    if not isinstance(model, library.PeftModel):
        return library.PeftModel.from_pretrained(
            model, path, adapter_name, is_trainable=is_trainable, config=config, **options
        )
    if adapter_name in model.peft_config:
        raise CheckpointError(
            f"the model has an adapter '{adapter_name}' already; pass another adapter_name, or"
            f" delete_adapter('{adapter_name}') first"
        )
    making = ("autocast_adapter_dtype", "low_cpu_mem_usage")
    model.add_adapter(adapter_name, config, **_chosen(options, making))
    model.load_adapter(path, adapter_name, is_trainable=is_trainable, **options)
    if is_trainable:
        model.set_requires_grad(adapter_name)
    return model


def _chosen(options: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in names}


def _check_files(path: str, subfolder: str | None) -> None:
    """Whether there is an adapter, if the path can only be meant as a local one."""
    directory = Path(path) / (subfolder or "")
    if not directory.is_dir():
        if Path(path).is_absolute() or path.startswith(".") or path.count("/") > 1:
            raise FileNotFoundError(f"there is no adapter directory {directory}")
        return  # an id on the Hub
    found = {entry.name for entry in directory.iterdir()}
    if _CONFIG not in found:
        what = "a model" if "config.json" in found else "no adapter"
        raise FileNotFoundError(
            f"{directory} holds {what}, not {_CONFIG}; pass the directory that save_pretrained of"
            " a PEFT model wrote"
        )
    if not found & set(_WEIGHTS):
        raise FileNotFoundError(
            f"{directory} has {_CONFIG} but none of {', '.join(_WEIGHTS)}; save the adapter again"
        )


def _shapes(path: str, subfolder: str | None) -> dict[str, tuple[int, ...]]:
    """Shapes in a local safetensors file; nothing for other adapters, which PEFT checks later."""
    from safetensors import safe_open

    file = Path(path) / (subfolder or "") / _WEIGHTS[0]
    if not file.is_file():
        return {}
    with safe_open(file, "pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def _check_fit(path: str, shapes: Mapping[str, tuple[int, ...]], base: nn.Module) -> None:
    layers = dict(named_layers(base))
    problems = []
    for name, shape in shapes.items():
        cut = next((part for part in _FACING if part in name), None)
        if cut is None or len(shape) != 2:
            continue
        layer_name = name.split(cut)[0].removeprefix(_PREFIX)
        dimension, feature = _FACING[cut]
        layer = layers.get(layer_name)
        if layer is None:
            close = difflib.get_close_matches(layer_name, layers, n=1)
            hint = f" (did you mean '{close[0]}'?)" if close else ""
            problems.append(f"the model has no '{layer_name}'{hint}")
        elif isinstance(layer, (QuantizedLinear, nn.Linear)):
            features = getattr(layer, feature)
            if shape[dimension] != features:
                problems.append(
                    f"'{name}' has shape {list(shape)}, and '{layer_name}' has {features} {feature}"
                )
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"the adapter in {path} belongs to another model: {'; '.join(problems[:3])}{more};"
            " load the base model that its adapter_config.json names"
        )
