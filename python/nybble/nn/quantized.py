"""What every layer with one quantized weight shares: its tensors, moving, saving, loading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from nybble import _core, reference, state
from nybble.cuda import place
from nybble.errors import CheckpointError, DeviceError, FormatError
from nybble.functional import quantize
from nybble.products import Memo
from nybble.qtensor import QTensor

_SCALES = ("absmax", "nested_absmax", "nested_offset")


class QuantizedModule(nn.Module):
    """A module whose weight is quantized.

    The codes are a frozen uint8 (int8 for `int8`) parameter `weight`; the scales are plain
    tensors `absmax`, `nested_absmax`, `nested_offset`. No operation casts any of them:
    `.to(device)` moves them, `.half()` and `.to(dtype)` leave them alone. Nothing is ever
    repacked, so a state dict is the same before and after any number of forward passes.

    FSDP2 (`fully_shard`) spreads the codes over processes like any parameter and leaves a copy of
    the scales in each. The state dict of such a module has its tensors under their names here,
    since torch's distributed checkpoints look each key up as an attribute; it can be loaded into
    a module of the same format, sharded or not.

    Attributes:
        format: Name of the format.
        blocksize: Elements that share a scale.
        shape: Shape of the weight that is stored.
        dtype: Dtype that the weight had.
        compute_dtype: Dtype in which products are computed; None for that of the input.
        storage: Dtype under which a state dict shows the bytes of 4-bit codes, bitsandbytes'
            `quant_storage`. In memory they are always uint8.
    """

    bits: int  # of the formats that a subclass takes
    storage: torch.dtype = torch.uint8

    weight: nn.Parameter
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    nested_offset: torch.Tensor | None

    def __init__(self, q: QTensor, compute_dtype: torch.dtype | None) -> None:
        super().__init__()
        bits = reference.spec(q.format)["bits"]
        if bits != self.bits:
            raise FormatError(
                f"{type(self).__name__} holds {self.bits}-bit formats, not {q.format}; use the"
                f" {bits}-bit class"
            )
        self.compute_dtype = compute_dtype
        self._memo = Memo()
        self.hold(q)

    def hold(self, q: QTensor) -> None:
        """Take over the tensors and the description of a quantized weight."""
        self.format = q.format
        self.blocksize = q.blocksize
        self.shape = q.shape
        self.dtype = q.dtype
        packed = q.packed if q.format == "int8" else q.packed.reshape(-1, 1)
        self.weight = nn.Parameter(packed, requires_grad=False)
        # Buffers, so that every way of moving a module finds them; persistent, since loaders may
        # make other buffers anew. State dicts have them under other names all the same.
        self.register_buffer("absmax", q.absmax)
        self.register_buffer("nested_absmax", q.nested_absmax)
        self.register_buffer("nested_offset", q.nested_offset)

    @property
    def qtensor(self) -> QTensor:
        """The weight, sharing memory with this module.

        Raises:
            DeviceError: The codes are spread over processes.
        """
        self._check_whole()
        flat = self.weight.detach()
        return QTensor(
            packed=flat if self.format == "int8" else flat.reshape(-1),
            absmax=self.absmax,
            format=self.format,
            shape=self.shape,
            dtype=self.dtype,
            blocksize=self.blocksize,
            nested_absmax=self.nested_absmax,
            nested_offset=self.nested_offset,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The decoded weight in its own shape; `dtype` None for the dtype that it had."""
        decoded: torch.Tensor = self.qtensor.dequantize(dtype)
        return decoded

    def requantize_(self, weight: torch.Tensor, *, reference: str | None = None) -> None:
        """Quantize another weight of the same shape into this module, with the same settings.

        Args:
            weight: Floating point, of `shape`.
            reference: As in `nybble.quantize`.
        """
        self._check_whole()
        if weight.shape != self.shape:
            raise FormatError(
                f"this module stores a weight of shape {tuple(self.shape)}, got"
                f" {tuple(weight.shape)}"
            )
        self.hold(self._quantized_like(weight, reference))

    def _check_whole(self) -> None:
        if is_sharded(self.weight):
            raise DeviceError(
                "this weight is sharded over processes (FSDP); it is whole only while the model"
                " computes. Gather it with nybble.hf.full_state_dict(model)"
            )

    def _quantized_like(self, weight: torch.Tensor, reference: str | None = None) -> QTensor:
        blocksize = None if self.format == "int8" else self.blocksize
        nested = self.nested_absmax is not None
        return quantize(
            weight.detach(), self.format, blocksize=blocksize, nested=nested, reference=reference
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move the quantized tensors, but never cast them; the bias follows the usual rules."""

        def without_cast(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        held = {id(tensor) for tensor in self._held("").values()}
        # Parameters are handed to `fn` as themselves, so identity tells ours from the bias.
        applied = super()._apply(  # type: ignore[no-untyped-call]
            lambda tensor: without_cast(tensor) if id(tensor) in held else fn(tensor), recurse
        )
        place.follow(self.weight)
        return applied

    def _held(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors of the quantized weight by their names in this module."""
        named = {name: getattr(self, name) for name in ("weight", *_SCALES)}
        return {prefix + name: tensor for name, tensor in named.items() if tensor is not None}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Write the weight under bitsandbytes' key scheme; a sharded one as it is held."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if is_sharded(self.weight):
            return
        for name in ("weight", *_SCALES):
            destination.pop(prefix + name, None)
        if self.weight.device.type == "meta":
            # The text of nested scales needs their offset; a meta module has no bytes to save.
            destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
            return
        tensors = self.qtensor.state_dict(prefix)
        if self.storage != torch.uint8 and self.bits == 4:
            tensors[prefix + "weight"] = _stored_as(self.storage, tensors[prefix + "weight"])
        destination.update(tensors)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take a quantized weight as it is, or quantize a dense one of the right shape."""
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if is_sharded(self.weight) or prefix + _SCALES[0] in state_dict:
            if self._is_held_alike(state_dict, prefix, error_msgs):
                super()._load_from_state_dict(state_dict, prefix, *rest)
            return
        own = state.keys(state_dict, prefix)
        others = {key: value for key, value in state_dict.items() if key not in own}
        others.update(self._held(prefix))  # already in place for the base class
        name = prefix + "weight"
        if name not in state_dict:
            missing_keys.append(name)
        else:
            try:
                q = self._loaded(state_dict, prefix)
                if q.shape != self.shape:
                    raise CheckpointError(
                        f"'{name}' has shape {tuple(q.shape)}, this module stores"
                        f" {tuple(self.shape)}"
                    )
                if not local_metadata.get("assign_to_params_buffers", False):
                    q = self._on_own_device(q)
                self.hold(q)
                others.update(self._held(prefix))
            except (CheckpointError, FormatError) as error:
                error_msgs.append(str(error))
        super()._load_from_state_dict(others, prefix, *rest)

    def _is_held_alike(self, state_dict: Any, prefix: str, error_msgs: list[str]) -> bool:
        """Whether a state dict has the tensors of this module under their names here."""
        for name, held in self._held(prefix).items():
            found = state_dict.get(name)
            if found is not None and found.dtype == held.dtype:
                continue
            what = "nothing" if found is None else f"{found.dtype}"
            error_msgs.append(
                f"'{name}' should be {held.dtype}, found {what}; a sharded module takes the state"
                " dict of a sharded module of its format. Load other checkpoints before"
                " fully_shard"
            )
            return False
        return True

    def _loaded(self, state_dict: Any, prefix: str) -> QTensor:
        if state.is_quantized(state_dict, prefix):
            q = QTensor.from_state_dict(state_dict, prefix)
            if q.format == "int8":
                q = replace(q, dtype=self.dtype)  # int8 files do not say what it was
            if reference.spec(q.format)["bits"] != self.bits:
                raise CheckpointError(
                    f"'{prefix}weight' is {q.format}; a {type(self).__name__} cannot hold it"
                )
            return q
        weight = state_dict[prefix + "weight"]
        if not weight.is_floating_point():
            raise CheckpointError(
                f"'{prefix}weight' is {weight.dtype} without a quant_state; its companions are"
                " missing"
            )
        return self._quantized_like(weight)

    def _on_own_device(self, q: QTensor) -> QTensor:
        device = self.weight.device
        if device.type == "meta":
            raise CheckpointError(
                "this module is on the meta device; pass assign=True to load_state_dict"
            )
        moved = q.to(device)
        # A loaded module must not share memory with the state dict that it came from.
        return replace(
            moved,
            packed=moved.packed.clone(),
            absmax=moved.absmax.clone(),
            nested_absmax=_clone(moved.nested_absmax),
            nested_offset=_clone(moved.nested_offset),
        )

    def extra_repr(self) -> str:
        """Describe the weight in one line."""
        nested = ", nested" if self.nested_absmax is not None else ""
        blocks = "" if self.format == "int8" else f", blocksize={self.blocksize}"
        compute = "" if self.compute_dtype is None else f", compute_dtype={self.compute_dtype}"
        return f"{', '.join(map(str, self.shape))}, format={self.format}{blocks}{nested}{compute}"


def _stored_as(dtype: torch.dtype, packed: torch.Tensor) -> torch.Tensor:
    """The same bytes as [n, 1] of another dtype; zeros fill the last element."""
    flat = packed.flatten()
    missing = -flat.numel() % dtype.itemsize
    return nn.functional.pad(flat, (0, missing)).view(dtype).reshape(-1, 1)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is spread over processes: torch's DTensor, told by its method."""
    return hasattr(tensor, "full_tensor")


def _clone(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.clone()


def empty_quantized(
    shape: tuple[int, ...],
    format: str,
    blocksize: int | None,
    nested: bool,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> QTensor:
    """The quantized form of zeros: what a module holds before its weight is loaded."""
    if device is not None and torch.device(device).type == "meta":
        size, packed, scales, nested_scales = _core.layout(format, list(shape), blocksize, nested)
        rows = reference.is_row_wise(format)
        return QTensor(
            packed=torch.empty(
                shape if rows else (packed,),
                dtype=torch.int8 if rows else torch.uint8,
                device="meta",
            ),
            absmax=torch.empty(scales, dtype=reference.scale_dtype(format, nested), device="meta"),
            format=format,
            shape=torch.Size(shape),
            dtype=dtype,
            blocksize=size,
            nested_absmax=torch.empty(nested_scales, device="meta") if nested else None,
            nested_offset=torch.empty((), device="meta") if nested else None,
        )
    zeros = torch.zeros(shape, dtype=dtype, device=device)
    return quantize(zeros, format, blocksize=blocksize, nested=nested)
