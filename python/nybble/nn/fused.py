"""How a module holds all experts of a layer in one tensor per projection, and each one's part.

transformers 5 keeps the experts of a layer in parameters of rank 3. Its decorator
`use_experts_implementation` (`transformers/integrations/moe.py`) leaves flags on the module that
say how a matrix lies in them; a module without these flags is not guessed at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from nybble.errors import FormatError

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_DOWN = "down_proj"


@dataclass(frozen=True, kw_only=True)
class Fused:
    """The layout of an experts module.

    Attributes:
        num_experts: Number of experts.
        hidden_size: Features that go in and come out.
        intermediate_size: Features between the projections.
        gated: Whether there is a gate beside the up projection, in one parameter with it.
        biased: Whether projections have biases.
        transposed: Whether matrices are stored [in, out].
        interleaved: Whether gate and up alternate row by row; else the gate comes first.
        dtype: Dtype of the parameters.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    gated: bool
    biased: bool
    transposed: bool
    interleaved: bool
    dtype: torch.dtype

    @property
    def roles(self) -> tuple[str, ...]:
        """The projections of one expert, in the order of computation."""
        return ("gate", "up", "down") if self.gated else ("up", "down")

    @property
    def default_names(self) -> tuple[str, ...]:
        """What most files call these projections."""
        return tuple(f"{role}_proj" for role in self.roles)

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the fused parameters."""
        out = self.intermediate_size * (2 if self.gated else 1)
        first, last = (self.hidden_size, out), (self.intermediate_size, self.hidden_size)
        if not self.transposed:
            first, last = first[::-1], last[::-1]
        up = self.parameter("up")
        shapes: dict[str, tuple[int, ...]] = {
            up: (self.num_experts, *first),
            _DOWN: (self.num_experts, *last),
        }
        if self.biased:
            shapes[f"{up}_bias"] = (self.num_experts, out)
            shapes[f"{_DOWN}_bias"] = (self.num_experts, self.hidden_size)
        return shapes

    def shape(self, role: str) -> tuple[int, int]:
        """The shape of one matrix [out, in]."""
        inner, outer = self.intermediate_size, self.hidden_size
        return (outer, inner) if role == "down" else (inner, outer)

    def parameter(self, role: str) -> str:
        """The parameter that holds a projection of all experts."""
        return _DOWN if role == "down" else "gate_up_proj" if self.gated else "up_proj"

    def _rows(self, tensor: torch.Tensor, role: str) -> torch.Tensor:
        """The rows of one projection, of a tensor whose first dimension is the output."""
        if role == "down" or not self.gated:
            return tensor
        if self.interleaved:
            return tensor[0 if role == "gate" else 1 :: 2]
        size = self.intermediate_size
        return tensor[:size] if role == "gate" else tensor[size:]

    def matrix(self, fused: torch.Tensor, role: str, expert: int) -> torch.Tensor:
        """View one matrix [out, in] inside the parameter that holds it."""
        one = fused[expert]
        return self._rows(one.T if self.transposed else one, role)

    def bias(self, fused: torch.Tensor, role: str, expert: int) -> torch.Tensor:
        """View one bias [out] inside the parameter that holds it."""
        return self._rows(fused[expert], role)

    def joined(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """The outputs of gate and up [..., n] as the fused product would give them [..., 2 n]."""
        if self.interleaved:
            return torch.stack((gate, up), dim=-1).flatten(-2)
        return torch.cat((gate, up), dim=-1)


def holds_experts(module: nn.Module) -> bool:
    """Whether a module holds experts in parameters of rank 3, be the layout known or not."""
    return any(
        parameter.dim() == 3
        for name, parameter in module.named_parameters(recurse=False)
        if name.endswith("_proj")
    )


def describe(module: nn.Module) -> Fused:
    """Read the layout of an experts module.

    Raises:
        FormatError: The module does not say how it holds its experts, or its shapes disagree
            with what it says.
    """
    kind = type(module).__name__
    missing = [flag for flag in _FLAGS if not hasattr(module, flag)]
    if missing or not hasattr(module, "num_experts"):
        raise FormatError(
            f"{kind} does not say how its experts lie in memory (no"
            f" {', '.join(missing) or 'num_experts'}; transformers' use_experts_implementation"
            " would set it)"
        )
    down = module._parameters.get(_DOWN)
    if down is None or down.dim() != 3:
        raise FormatError(f"{kind} has no parameter {_DOWN} of rank 3")
    last = down.shape[1:] if not module.is_transposed else down.shape[:0:-1]
    layout = Fused(
        num_experts=down.shape[0],
        hidden_size=last[0],
        intermediate_size=last[1],
        gated=bool(module.has_gate),
        biased=bool(module.has_bias),
        transposed=bool(module.is_transposed),
        interleaved=not module.is_concatenated,
        dtype=down.dtype,
    )
    found = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    if found != layout.parameters:
        raise FormatError(f"{kind} has parameters {found}, its flags say {layout.parameters}")
    return layout
