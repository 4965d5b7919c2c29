"""Parameters that quantize themselves when they are moved to a device."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

import nybble
from nybble.compat.bitsandbytes._four_bit import quantize_4bit
from nybble.compat.bitsandbytes._quant_state import QuantState
from nybble.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

_DEFAULT_BLOCKSIZE = 64


def _checked_device(device: Any) -> torch.device:
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError("there is no CUDA device here; pass device='cpu'")
    return target


def _rebuild(cls: Any, data: torch.Tensor, requires_grad: bool, attributes: Any) -> Any:
    parameter = cls(data, requires_grad=requires_grad)
    parameter.__dict__.update(attributes)
    return parameter


class _QuantizedParameter(torch.nn.Parameter):
    """A parameter with attributes of its own, which copies and pickles must keep."""

    def _rebuilt(self, data: torch.Tensor, **changes: Any) -> Any:
        """A new parameter with these data and the attributes of this one."""
        return _rebuild(type(self), data, self.requires_grad, {**self.__dict__, **changes})

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self), self.data, self.requires_grad, dict(self.__dict__))

    def __copy__(self) -> Any:
        return self._rebuilt(self.data)

    def cpu(self, memory_format: Any = torch.preserve_format) -> Any:
        """As `to("cpu")`."""
        return self.to("cpu")

    def cuda(
        self, device: Any = None, non_blocking: bool = False, memory_format: Any = None
    ) -> Any:
        """As `to("cuda")`, or to the CUDA device named."""
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def xpu(self, device: Any = None, non_blocking: bool = False, memory_format: Any = None) -> Any:
        """As `to("xpu")`, or to the XPU device named."""
        return self.to("xpu" if device is None else device, non_blocking=non_blocking)


def _of_state(*path: str) -> property:
    """A property that reads an attribute of the quant_state, which FSDP looks up by name."""

    def read(self: Params4bit) -> Any:
        value: Any = self.__dict__.get("quant_state")
        for name in path:
            if value is None:
                raise AttributeError(
                    f"'{type(self).__name__}' has no '{'.'.join(path)}': it is not quantized, or"
                    " its scales are not nested"
                )
            value = getattr(value, name)
        return value

    return property(read, doc=f"`quant_state.{'.'.join(path)}`.")


class Params4bit(_QuantizedParameter):
    """A weight that becomes 4-bit codes at the first move to a device that holds data.

    Attributes:
        blocksize: Consecutive elements that share a scale.
        compress_statistics: Whether the scales are quantized too.
        quant_type: `nf4` or `fp4`.
        quant_state: Scales and shape once it is quantized, else None.
        quant_storage: Dtype as which the codes pose.
        bnb_quantized: Whether it is quantized.
        module: The layer that keeps a second reference to `quant_state`, or None.
    """

    blocksize: int
    compress_statistics: bool | None
    quant_type: str
    quant_state: QuantState | None
    quant_storage: torch.dtype
    bnb_quantized: bool
    module: Any

    def __new__(
        cls,
        data: torch.Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool | None = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: nn.Module | None = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Params4bit:
        """Wrap a weight; see the class. Other keywords are ignored, so that `__dict__` fits."""
        data = torch.empty(0) if data is None else data
        self: Params4bit = torch.Tensor._make_subclass(cls, data.detach(), requires_grad)
        self.blocksize = _DEFAULT_BLOCKSIZE if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        return self

    absmax = _of_state("absmax")
    code = _of_state("code")
    quant_map = _of_state("code")
    offset = _of_state("offset")
    state2 = _of_state("state2")
    nested_absmax = _of_state("state2", "absmax")
    nested_blocksize = _of_state("state2", "blocksize")
    nested_quant_map = _of_state("state2", "code")
    nested_dtype = _of_state("state2", "dtype")
    nested_offset = _of_state("offset")

    @classmethod
    def from_prequantized(
        cls,
        data: torch.Tensor,
        quantized_stats: Mapping[str, Any],
        requires_grad: bool = False,
        device: torch.device | str | int = "cuda",
        module: nn.Module | None = None,
        **kwargs: Any,
    ) -> Params4bit:
        """Make a quantized weight of the tensors of a file.

        Args:
            data: Packed codes.
            quantized_stats: Their companions, as `QuantState.from_dict` takes them.
            requires_grad: False; codes have no gradient.
            device: Where the tensors go.
            module: The layer that it is for.
            kwargs: Ignored.

        Raises:
            CheckpointError: The companions do not describe a weight.
            DeviceError: There is no such device.
        """
        device = _checked_device(device)
        state = QuantState.from_dict(quantized_stats, device=device)
        if module is not None:
            module.quant_state = state  # type: ignore[assignment]
        return cls(
            data.to(device),
            requires_grad=requires_grad,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type or "",
            quant_storage=data.dtype,
            module=module,
            bnb_quantized=True,
        )

    def _quantize(self, device: torch.device | str | int) -> Params4bit:
        """Quantize in place, on a device."""
        self.data, self.quant_state = quantize_4bit(
            self.data.to(device),
            blocksize=self.blocksize,
            compress_statistics=bool(self.compress_statistics),
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        if self.module is not None:
            self.module.quant_state = self.quant_state
        self.bnb_quantized = True
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move; a weight that is not quantized yet is quantized, in place.

        A dtype is followed only before that: codes are never cast.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if self.bnb_quantized:
            # In place: torch keeps this object when a module moves, and takes only the data.
            if self.quant_state is not None and device is not None:
                self.quant_state.to(device)
            return self._rebuilt(self.data.to(device=device, non_blocking=non_blocking))
        if device is not None and device.type != "meta":
            return self._quantize(device)
        return self._rebuilt(self.data.to(device=device, dtype=dtype, non_blocking=non_blocking))

    def _cast(self, dtype: torch.dtype) -> Any:
        return self if self.bnb_quantized else self._rebuilt(self.data.to(dtype))

    def half(self, memory_format: Any = torch.preserve_format) -> Any:
        """float16, unless it is quantized: codes that pose as floats are not cast."""
        return self._cast(torch.float16)

    def bfloat16(self, memory_format: Any = torch.preserve_format) -> Any:
        """bfloat16, unless it is quantized."""
        return self._cast(torch.bfloat16)

    def float(self, memory_format: Any = torch.preserve_format) -> Any:
        """float32, unless it is quantized."""
        return self._cast(torch.float32)

    def double(self, memory_format: Any = torch.preserve_format) -> Any:
        """float64, unless it is quantized."""
        return self._cast(torch.float64)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # The layer is not copied along with its weight, but followed if it is being copied.
        copied = self._rebuilt(
            copy.deepcopy(self.data, memo),
            quant_state=copy.deepcopy(self.quant_state, memo),
            module=memo.get(id(self.module)),
        )
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pieces of a weight stay parameters with its state; all else gives plain tensors."""
        result = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if func in (torch.chunk, torch.split):
            whole = args[0]
            return tuple(whole._rebuilt(piece) for piece in result)
        return result


class Int8Params(_QuantizedParameter):
    """A weight that becomes int8 codes at the first move to a device that holds data.

    Attributes:
        CB: The codes once it is quantized (the same memory as the parameter), else None.
        SCB: float32 scale of each row once it is quantized, else None.
        has_fp16_weights: Whether it stays floating point instead.
    """

    CB: torch.Tensor | None
    SCB: torch.Tensor | None
    has_fp16_weights: bool

    def __new__(
        cls,
        data: torch.Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: torch.Tensor | None = None,
        SCB: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Int8Params:
        """Wrap a weight; see the class. Other keywords are ignored, so that `__dict__` fits."""
        data = torch.empty(0) if data is None else data
        self: Int8Params = torch.Tensor._make_subclass(cls, data.detach(), requires_grad)
        self.CB = CB
        self.SCB = SCB
        self.has_fp16_weights = has_fp16_weights
        return self

    @property
    def is_quantized8(self) -> bool:
        """Whether the data are codes."""
        return self.data.dtype == torch.int8

    def _quantize(self, device: torch.device | str | int) -> Any:
        """Quantize in place, on a device; weights that stay floating point only move."""
        if self.has_fp16_weights:
            return self._rebuilt(self.data.to(device))
        q = nybble.quantize(self.data.to(device), "int8", reference="bitsandbytes-cpu")
        self.data = q.packed
        self.CB, self.SCB = self.data, q.absmax
        return self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move; a weight that is not quantized yet is quantized, in place.

        A dtype is followed only before that: codes are never cast.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if self.is_quantized8:
            data = self.data.to(device=device, non_blocking=non_blocking)
            scales = self.SCB
            if scales is not None and scales.device.type != "meta" and device is not None:
                scales = scales.to(device)
            return self._rebuilt(data, CB=data, SCB=scales)
        on_devices = device is not None and "meta" not in (device.type, self.data.device.type)
        if on_devices and not self.has_fp16_weights:
            assert device is not None
            return self._quantize(device)
        return self._rebuilt(self.data.to(device=device, dtype=dtype, non_blocking=non_blocking))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        data = copy.deepcopy(self.data, memo)
        codes = data if self.is_quantized8 and self.CB is not None else copy.deepcopy(self.CB, memo)
        copied = self._rebuilt(data, CB=codes, SCB=copy.deepcopy(self.SCB, memo))
        memo[id(self)] = copied
        return copied
