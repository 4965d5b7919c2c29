"""LLM.int8(): activations without outliers, and with some."""

from __future__ import annotations

import torch

from compare import ours, peer_bitsandbytes, peer_torch
from compare.cell import Run, entry
from compare.weights import BF16, F32, Unavailable, Weight, short

_SHAPE = (4096, 4096)
_ROWS = (1, 4, 16, 512)

#: Share of the columns that hold outliers, and the threshold above which a value is one.
_OUTLIERS, THRESHOLD = 0.005, 6.0


def activations(m: int, dtype: torch.dtype, *, outliers: bool) -> torch.Tensor:
    """Normal values below the threshold; with outliers, some columns are twenty times as large."""
    x = torch.randn(m, _SHAPE[1]).clamp(-5, 5)
    if outliers:
        columns = torch.randperm(_SHAPE[1])[: round(_OUTLIERS * _SHAPE[1])]
        x[:, columns] = x[:, columns].sign() * 20
    return x.to(dtype)


def llm_int8(run: Run) -> None:
    """Thresholds 0 and 6, 0.5 % of the columns outliers or none."""
    torch.manual_seed(0)
    weight = torch.randn(*_SHAPE) * 0.02
    weights: list[Weight] = [ours.eight_bit(weight, 0.0), ours.eight_bit(weight, THRESHOLD)]
    try:
        weights.append(peer_bitsandbytes.eight_bit(weight, 0.0))
        weights.append(peer_bitsandbytes.eight_bit(weight, THRESHOLD))
    except Unavailable as reason:
        run.notes.append(str(reason))
    weights += peer_torch.int8(weight)
    for m in _ROWS:
        entries = []
        for candidate in weights:
            takes_threshold = candidate.name.endswith(f"{THRESHOLD:g}")
            for outliers in (False, True) if takes_threshold else (False,):
                dtype = BF16 if BF16 in candidate.dtypes else F32
                if m > candidate.limit:
                    continue
                x = activations(m, dtype, outliers=outliers)
                entries.append(
                    entry(
                        candidate.name + (", 0.5 % outliers" if outliers else ""),
                        candidate.package,
                        candidate.bind(x),
                        dtype=short(dtype),
                        nbytes=candidate.nbytes,
                        warm=min(4, candidate.copies),
                    )
                )
        run.measure(
            "llm_int8",
            entries,
            beside=[run.limits.read] if m <= 4 else (),
            shape="x".join(map(str, _SHAPE)),
            m=m,
            elements=_SHAPE[0] * _SHAPE[1],
        )
