"""Mixtures of experts with quantized weights: only experts that were chosen are decoded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nybble import reference as definition
from nybble import state
from nybble.errors import CheckpointError, FormatError
from nybble.nn.fused import Fused, describe
from nybble.nn.linear import QuantizedLinear, linear_class, quantize_weight
from nybble.qtensor import QTensor

if TYPE_CHECKING:
    from typing_extensions import Self

#: What one projection of one expert becomes: `make(name, weight, bias)`, with a name such as
#: `3.up_proj`, a view [out, in] of the weight and a view [out] of the bias or None.
Make = Callable[[str, torch.Tensor, "torch.Tensor | None"], nn.Module]


class QuantizedExperts(nn.Module):
    """The experts of one layer, each with linear layers of its own.

    The module for expert 3 is called `3`, its layers as files call them, so that a state dict
    has the names of checkpoints with one tensor per expert: `3.gate_proj.weight`,
    `3.gate_proj.weight.absmax` and so on. What the original computes beside its products (the
    activation, how gate and up are combined, a norm) is taken from the original.

    Attributes:
        fused: How the original held its weights.
        names: The name of each projection ("gate", "up", "down").
    """

    bits: int  # of the formats that a subclass takes
    _original: nn.Module

    def __init__(self, original: nn.Module, names: Sequence[str] | None, make: Make) -> None:
        """Take an experts module apart; `make` says what each projection becomes.

        Args:
            original: A module as transformers' `use_experts_implementation` makes it. It is not
                changed.
            names: Names of gate, up and down projection (up and down without a gate); None for
                `gate_proj`, `up_proj`, `down_proj`.
            make: Called for one matrix at a time.

        Raises:
            FormatError: The module does not say how it holds its experts.
        """
        super().__init__()
        self.fused = describe(original)
        self.names = _names(self.fused, names)
        # Not a submodule: it has no parameters of its own any more, and its children are ours.
        self.__dict__["_original"] = _emptied(original, self.fused)
        for name, child in original.named_children():
            self.add_module(name, child)
        for expert in range(self.fused.num_experts):
            self.add_module(str(expert), self._expert(original, expert, make))
        self.train(original.training)

    def _expert(self, original: nn.Module, expert: int, make: Make) -> nn.ModuleDict:
        layers = {}
        for role, name in self.names.items():
            parameter = self.fused.parameter(role)
            weight = original._parameters[parameter]
            assert weight is not None
            bias = original._parameters.get(f"{parameter}_bias")
            layers[name] = make(
                f"{expert}.{name}",
                self.fused.matrix(weight, role, expert),
                None if bias is None else self.fused.bias(bias, role, expert),
            )
        return nn.ModuleDict(layers)

    @classmethod
    def from_experts(
        cls,
        experts: nn.Module,
        format: str,
        *,
        blocksize: int | None = None,
        nested: bool = False,
        compute_dtype: torch.dtype | None = None,
        compute: str | None = None,
        reference: str | None = None,
        names: Sequence[str] | None = None,
    ) -> Self:
        """Quantize the weights of an experts module, one matrix at a time.

        Args:
            experts: A module as transformers' `use_experts_implementation` makes it, with
                parameters `gate_up_proj` [experts, 2 intermediate, hidden] (or `up_proj`) and
                `down_proj` [experts, hidden, intermediate], also transposed or interleaved, with
                or without biases; on any device, the meta device included.
            format: Storage format.
            blocksize: Elements that share a scale; None for the format's default.
            nested: Quantize the scales too.
            compute_dtype: Dtype of products; None for that of the input.
            compute: "int8" for products of integers, as `nybble.linear` describes, or None.
            reference: As in `nybble.quantize`.
            names: Names of gate, up and down projection (up and down without a gate); None for
                `gate_proj`, `up_proj`, `down_proj`.

        Raises:
            FormatError: The module does not say how it holds its experts, or the format is not
                of this class's bits.
        """
        bits = definition.spec(format)["bits"]
        if bits != cls.bits:
            raise FormatError(
                f"{cls.__name__} holds {cls.bits}-bit formats, not {format}; use the {bits}-bit"
                " class"
            )

        def make(_: str, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
            return quantized_projection(
                weight,
                bias,
                format=format,
                blocksize=blocksize,
                nested=nested,
                compute_dtype=compute_dtype,
                compute=compute,
                reference=reference,
            )

        return cls(experts, names, make)

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return self.fused.num_experts

    @property
    def hidden_size(self) -> int:
        """Features that go in and come out."""
        return self.fused.hidden_size

    @property
    def intermediate_size(self) -> int:
        """Features between the projections."""
        return self.fused.intermediate_size

    def projection(self, expert: int, role: str) -> nn.Module:
        """The layer of one expert; `role` is "gate", "up" or "down"."""
        return self.get_submodule(f"{expert}.{self.names[role]}")

    def projections(self) -> Iterator[tuple[str, int, str, nn.Module]]:
        """Name (`3.up_proj`), expert, role and layer of every projection."""
        for expert in range(self.num_experts):
            for role, name in self.names.items():
                yield f"{expert}.{name}", expert, role, self.projection(expert, role)

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Send each token through its experts and add up what they say.

        Args:
            hidden_states: Floating point [tokens, hidden].
            top_k_index: Integers [tokens, k]: the experts of each token. Numbers from
                `num_experts` on mean nobody, as in expert parallelism.
            top_k_weights: [tokens, k]: how much each of them counts.

        Returns:
            [tokens, hidden] in the dtype of `hidden_states`, summed in float32 or wider;
            differentiable in `hidden_states` and `top_k_weights`.
        """
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        total = torch.zeros_like(hidden_states, dtype=wide)
        experts, order = top_k_index.flatten().sort(stable=True)
        chosen, counts = torch.unique(experts, return_counts=True)
        start = 0
        for expert, count in zip(chosen.tolist(), counts.tolist(), strict=True):
            pairs = order[start : start + count]
            start += count
            if not 0 <= expert < self.num_experts:
                continue
            tokens, positions = pairs // top_k_index.shape[1], pairs % top_k_index.shape[1]
            out = self._through(expert, hidden_states[tokens])
            out = out * top_k_weights[tokens, positions, None]
            total.index_add_(0, tokens, out.to(wide))
        return total.to(hidden_states.dtype)

    def _through(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """One expert on the tokens [n, hidden] that chose it."""
        layers = self.get_submodule(str(expert))
        up = getattr(layers, self.names["up"])(x)
        original: Any = self._original
        if self.fused.gated:
            gate = getattr(layers, self.names["gate"])(x)
            inner = original._apply_gate(self.fused.joined(gate, up))
        else:
            inner = original.act_fn(up)
        out: torch.Tensor = getattr(layers, self.names["down"])(inner)
        if getattr(original, "has_post_expert_norm", False):
            out = original.post_expert_norm(out)
        return out

    def dequantize(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """The fused parameters that the original had, by name, biases included.

        Args:
            dtype: Dtype of the weights; None for the dtype that they had.
        """
        first = self.projection(0, "down")
        device = next(first.parameters()).device
        tensors = {
            name: torch.empty(shape, dtype=dtype or self.fused.dtype, device=device)
            for name, shape in self.fused.parameters.items()
        }
        for name, expert, role, layer in self.projections():
            weight, bias = _dense_parts(name, layer, dtype)
            parameter = self.fused.parameter(role)
            self.fused.matrix(tensors[parameter], role, expert).copy_(weight)
            if bias is not None:
                self.fused.bias(tensors[f"{parameter}_bias"], role, expert).copy_(bias)
        return tensors

    def to_experts(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The dense module: one of the original's class, with decoded weights."""
        dense = _emptied(self._original, self.fused)
        for name, tensor in self.dequantize(dtype).items():
            dense._parameters[name] = nn.Parameter(tensor)
        return dense.train(self.training)

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
        """Take fused parameters apart first, dense or quantized ones; the layers load the rest."""
        for parameter in self.fused.parameters:
            own = state.keys(state_dict, prefix + parameter)
            tensors = {name: state_dict.pop(name) for name in own}
            if not tensors:
                continue
            try:
                state_dict.update(self._taken_apart(tensors, prefix, parameter))
            except (CheckpointError, FormatError) as error:
                error_msgs.append(f"'{prefix}{parameter}': {error}")
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def _taken_apart(
        self, tensors: dict[str, torch.Tensor], prefix: str, parameter: str
    ) -> dict[str, torch.Tensor]:
        quantized = state.is_quantized(tensors, prefix + parameter)
        value: torch.Tensor | QTensor = (
            QTensor.from_state_dict(tensors, prefix + parameter)
            if quantized
            else tensors[prefix + parameter]
        )
        parts: dict[str, torch.Tensor] = {}
        for name, piece in self.pieces(parameter, value):
            whole = prefix + name
            parts.update(piece.state_dict(whole) if isinstance(piece, QTensor) else {whole: piece})
        return parts

    def pieces(
        self, parameter: str, value: torch.Tensor | QTensor
    ) -> Iterator[tuple[str, torch.Tensor | QTensor]]:
        """Take a fused parameter apart: the name (`3.up_proj.weight`) and value of each piece.

        Args:
            parameter: One that the original had, such as `gate_up_proj`.
            value: What it held, dense (pieces are views) or quantized.

        Raises:
            FormatError: A quantized value cannot be taken apart without decoding it.
            CheckpointError: The value has another shape.
        """
        kind = "bias" if parameter.endswith("_bias") else "weight"
        for expert, role, piece in self.fused.pieces(parameter, value):
            yield f"{expert}.{self.names[role]}.{kind}", piece

    def extra_repr(self) -> str:
        """Describe the experts in one line."""
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size},"
            f" intermediate_size={self.intermediate_size}, gated={self.fused.gated}"
        )


class Experts4bit(QuantizedExperts):
    """Experts whose weights are nf4, fp4, int4 or mxfp4."""

    bits = 4


class Experts8bit(QuantizedExperts):
    """Experts whose weights are int8 (one scale a row) or dynamic8."""

    bits = 8


def experts_class(bits: int) -> type[Experts4bit] | type[Experts8bit]:
    """The module that holds formats of this many bits."""
    return Experts4bit if bits == Experts4bit.bits else Experts8bit


def projection_roles(fused: Fused, names: Sequence[str]) -> list[tuple[str, str]]:
    """Name (`3.up_proj`) and role of every projection of a layer's experts."""
    pairs = list(zip(names, fused.roles, strict=True))
    return [
        (f"{expert}.{name}", role) for expert in range(fused.num_experts) for name, role in pairs
    ]


def quantized_projection(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    format: str,
    blocksize: int | None,
    nested: bool,
    compute_dtype: torch.dtype | None,
    compute: str | None,
    reference: str | None,
) -> QuantizedLinear:
    """A quantized linear layer of one matrix [out, in] and one bias [out] of a fused parameter."""
    q = quantize_weight(weight, format, blocksize=blocksize, nested=nested, reference=reference)
    own = None if bias is None else nn.Parameter(bias.detach().clone())
    cls = linear_class(definition.spec(format)["bits"])
    return cls.from_qtensor(q, own, compute_dtype=compute_dtype, compute=compute)


def dense_projection(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A dense linear layer with a copy of one matrix and one bias of a fused parameter."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
    return layer


def _names(fused: Fused, names: Sequence[str] | None) -> dict[str, str]:
    if names is None:
        names = fused.default_names
    if len(set(names)) != len(fused.roles) or any("." in name or not name for name in names):
        raise FormatError(
            f"these experts need {len(fused.roles)} different names, for"
            f" {', '.join(fused.roles)}; got {list(names)}"
        )
    return dict(zip(fused.roles, names, strict=True))


def _emptied(original: nn.Module, fused: Fused) -> nn.Module:
    """A module with the attributes and children of an experts module, without its parameters."""
    shell = type(original).__new__(type(original))
    shell.__dict__.update(original.__dict__)
    shell._parameters = dict.fromkeys(fused.parameters)
    shell._buffers = copy.copy(original._buffers)
    shell._modules = copy.copy(original._modules)
    return shell


def _dense_parts(
    name: str, layer: nn.Module, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(layer, QuantizedLinear):
        return layer.dequantize(dtype), layer.bias
    if isinstance(layer, nn.Linear):
        return layer.weight.detach(), layer.bias
    raise FormatError(
        f"expert layer '{name}' is a {type(layer).__name__}; merge or remove adapters before"
        " dequantizing"
    )
