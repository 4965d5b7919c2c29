"""Save the quantized state of a torch model, and load it into one."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nybble import _core
from nybble.checkpoint.fill import fill
from nybble.checkpoint.open import open_checkpoint
from nybble.nn.choice import is_linear
from nybble.nn.linear import QuantizedLinear
from nybble.nn.quantized import QuantizedModule

_WEIGHTS = "model.safetensors"
_CONFIG = "config.json"
_METHOD = "nybble"


def save_model(model: nn.Module, dst: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the state of a model in bitsandbytes' layout.

    Quantized layers are stored as they are, bit for bit; everything else as it is. A tensor that
    several names share is stored once. A transformers model's `config.json` is written too, with
    a `quantization_config` that says what was done. `compute` of the layers is in it only if that
    is nybble's own entry; bitsandbytes' (all layers nf4, fp4 or int8) has no field for it.

    Args:
        model: Any module, with or without quantized layers.
        dst: A directory, made if need be.
        overwrite: Replace weights that are there.

    Returns:
        The directory.

    Raises:
        FileExistsError: There are weights already.
    """
    from safetensors.torch import save_file

    directory = Path(dst)
    weights = directory / _WEIGHTS
    if weights.exists() and not overwrite:
        raise FileExistsError(f"{weights} exists; choose another place, or pass overwrite=True")
    directory.mkdir(parents=True, exist_ok=True)
    tensors = dict(_unshared(model.state_dict()))
    partial = directory / f".{_WEIGHTS}.partial-{os.getpid()}"
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
        _make_readable(partial)
        config = _config(model)
        if config is not None:
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            (directory / _CONFIG).write_text(text, encoding="utf-8")
        os.replace(partial, weights)
    finally:
        partial.unlink(missing_ok=True)
    return directory


def load_model(
    model: nn.Module,
    src: str | os.PathLike[str],
    *,
    compute_dtype: torch.dtype | None = None,
    compute: str | None = None,
    device: torch.device | str | int | None = None,
    repair: bool = False,
) -> nn.Module:
    """Fill a model from a checkpoint, in place; layers that are quantized there become quantized.

    The model may be on the meta device (then tensors are taken as they are) or hold weights
    (then dense tensors are cast to the dtypes and moved to the devices that the model has).
    Tensors are read one at a time, so a model on the meta device needs no memory but that of
    `device` and of its largest tensor. Buffers that no checkpoint has are computed by models of
    transformers; those of others stay on the meta device, which is warned of.

    Args:
        model: The architecture, with dense or quantized layers.
        src: A checkpoint, as for `open_checkpoint`.
        compute_dtype: Dtype of products of layers that are dense in the model and quantized in
            the checkpoint; None for that of the input. Layers that are quantized in the model
            keep theirs.
        compute: "int8" for products of integers in the same layers, where their codes are
            integers, as `nybble.linear` describes; a checkpoint of tensors does not say it.
        device: Where tensors go that the model has on the meta device; None for the CPU.
        repair: As in `open_checkpoint`.

    Returns:
        `model`.

    Raises:
        CheckpointError: A tensor has no place in the model, another shape, or is missing from
            the file. Nothing was changed then.
        FormatError: An unknown `compute`.
    """
    fill(model, open_checkpoint(src, repair), compute_dtype, compute, device)
    return model


def _unshared(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor once, contiguous; the first name keeps a shared one."""
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in state.items():
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        # A view of a larger storage would otherwise drag all of it along.
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        yield name, tensor if whole else tensor.contiguous().clone()


def _make_readable(path: Path) -> None:
    """Give a file the usual mode: safetensors makes files that only their owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _config(model: nn.Module) -> dict[str, Any] | None:
    """The config of a transformers model, with what was quantized; None for other models."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_string"):
        return None
    content: dict[str, Any] = json.loads(config.to_json_string())
    content["architectures"] = [type(model).__name__]
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedModule)
    }
    content.pop("quantization_config", None)
    if layers:
        dense = [name for name, module in model.named_modules() if is_linear(module)]
        content["quantization_config"] = _quantization(layers, dense)
    return content


def _quantization(layers: dict[str, QuantizedModule], dense: list[str]) -> dict[str, Any]:
    kinds = Counter((m.format, m.blocksize, m.nested_absmax is not None) for m in layers.values())
    rows = Counter[str]()
    for (format, _, _), count in kinds.items():
        rows[format] += count
    main = rows.most_common(1)[0][0]
    example = next(module for module in layers.values() if module.format == main)
    compute = example.compute_dtype or example.dtype
    overrides = {name: m.format for name, m in layers.items() if m.format != main}
    text = _core.quantization_config(
        main,
        0 if main == "int8" else example.blocksize,
        example.nested_absmax is not None,
        str(compute).removeprefix("torch."),
        dense,
        overrides,
    )
    described: dict[str, Any] = json.loads(text)
    if "compute_dtype" in described and example.compute_dtype is not None:
        described["compute_dtype"] = str(example.compute_dtype).removeprefix("torch.")
    if described["quant_method"] == _METHOD:  # bitsandbytes' entry has no such field
        linear = (m for m in layers.values() if isinstance(m, QuantizedLinear) and m.format == main)
        described["compute"] = next((module.compute for module in linear), None)
    return described
