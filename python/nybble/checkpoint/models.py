"""Save the quantized state of a torch model, and load it into one."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nybble import _core, reference
from nybble.checkpoint.open import Checkpoint, open_checkpoint
from nybble.errors import CheckpointError
from nybble.nn.embedding import QuantizedEmbedding, embedding_class
from nybble.nn.linear import QuantizedLinear, linear_class
from nybble.nn.quantized import QuantizedModule
from nybble.nn.replace import is_linear

if TYPE_CHECKING:
    from nybble.qtensor import QTensor

_WEIGHTS = "model.safetensors"
_CONFIG = "config.json"


def save_model(model: nn.Module, dst: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the state of a model in bitsandbytes' layout.

    Quantized layers are stored as they are, bit for bit; everything else as it is. A tensor that
    several names share is stored once. A transformers model's `config.json` is written too, with
    a `quantization_config` that says what was done.

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
    repair: bool = False,
) -> nn.Module:
    """Fill a model from a checkpoint, in place; layers that are quantized there become quantized.

    The model may be on the meta device (then tensors are taken as they are) or hold weights
    (then dense tensors are cast to the dtypes and moved to the devices that the model has).
    Tensors are read one at a time.

    Args:
        model: The architecture, with dense or quantized layers.
        src: A checkpoint, as for `open_checkpoint`.
        compute_dtype: Dtype of products of quantized layers; None for that of the input.
        repair: As in `open_checkpoint`.

    Returns:
        `model`.

    Raises:
        CheckpointError: A tensor has no place in the model, another shape, or is missing from
            the file. Nothing was changed then.
    """
    checkpoint = open_checkpoint(src, repair)
    _check_names(model, checkpoint)
    ties = _ties(model)
    for name in checkpoint:
        value = checkpoint[name]
        if isinstance(value, torch.Tensor):
            _fill(model, name, value)
        else:
            _hold(model, name, value, compute_dtype)
    _tie_again(model, ties)
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
    return described


def _check_names(model: nn.Module, checkpoint: Checkpoint) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(model)}
    problems = []
    for name in checkpoint:
        entry = checkpoint.entry(name)
        if name not in shapes:
            problems.append(f"'{name}' has no place in {type(model).__name__}")
            continue
        expected = shapes[name]
        module, _ = _owner(model, name)
        found = entry.shape
        if entry.format is not None and not isinstance(module, QuantizedModule):
            if not (is_linear(module) or isinstance(module, nn.Embedding)):
                problems.append(f"'{name}' is quantized, but {type(module).__name__} cannot be")
                continue
            if is_linear(module) and not isinstance(module, nn.Linear):
                found = found[::-1]
        if found != expected:
            problems.append(f"'{name}' has shape {list(found)}, the model {list(expected)}")
    names = {name: [name] for name, _ in model.named_parameters()}
    names.update({group[0]: group for group in _ties(model)})
    problems += [
        f"'{name}' is missing"
        for name, group in names.items()
        if not any(alias in checkpoint for alias in group)
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{checkpoint.path} does not fit the model: {'; '.join(problems[:5])}{more}"
        )


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers under every name, quantized weights with the shape they decode to."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            if isinstance(module, QuantizedModule) and name == "weight":
                tensor = torch.empty(module.shape, device="meta")
            yield prefix + name, tensor


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _fill(model: nn.Module, name: str, value: torch.Tensor) -> None:
    module, attribute = _owner(model, name)
    if isinstance(module, QuantizedModule) and attribute == "weight":
        module.requantize_(value.to(module.weight.device))
        return
    target = getattr(module, attribute)
    if target.device.type != "meta":
        with torch.no_grad():
            target.copy_(value)
    elif isinstance(target, nn.Parameter):
        setattr(module, attribute, nn.Parameter(value, requires_grad=target.requires_grad))
    else:
        module._buffers[attribute] = value


def _hold(model: nn.Module, name: str, q: QTensor, compute_dtype: torch.dtype | None) -> None:
    module, _ = _owner(model, name)
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if weight.device.type != "meta":
        q = q.to(weight.device)
    if reference.is_row_wise(q.format):  # whose files do not say what the weight was
        q = replace(q, dtype=module.dtype if isinstance(module, QuantizedModule) else weight.dtype)
    if isinstance(module, QuantizedModule):
        module.hold(q)
        return
    bits = reference.spec(q.format)["bits"]
    replacement: QuantizedLinear | QuantizedEmbedding
    if isinstance(module, nn.Embedding):
        replacement = embedding_class(bits).from_qtensor(
            q, module.padding_idx, compute_dtype=compute_dtype
        )
    else:
        bias = getattr(module, "bias", None)
        replacement = linear_class(bits).from_qtensor(q, bias, compute_dtype=compute_dtype)
        replacement.transposed = not isinstance(module, nn.Linear)
    replacement.train(module.training)
    model.set_submodule(name.rpartition(".")[0], replacement)


def _ties(model: nn.Module) -> list[list[str]]:
    """Groups of names of one parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _tie_again(model: nn.Module, ties: list[list[str]]) -> None:
    """Give a parameter back to all its names, where loading has replaced it under one."""
    for group in ties:
        owners = [(*_owner(model, name), name) for name in group]
        held = [getattr(module, attribute) for module, attribute, _ in owners]
        loaded = next((p for p in held if p.device.type != "meta"), held[0])
        for (module, attribute, _), parameter in zip(owners, held, strict=True):
            if parameter.device.type == "meta" and not isinstance(module, QuantizedModule):
                setattr(module, attribute, loaded)
