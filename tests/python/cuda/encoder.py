"""What the launcher hands to quantize4 and quantize8, made again from the tables of values.

The Rust launcher copies format::cells::Cells and Codebook; here the same tables follow from the
values alone, with torch's float32 arithmetic.
"""

from __future__ import annotations

import functools
import math

import torch
from emulated import values_of
from params import Encoder4


@functools.cache
def pivots_and_order(format: str) -> tuple[torch.Tensor, list[int]]:
    """Midpoints of neighbours in ascending order, the last infinite, and the codes in order."""
    values = torch.tensor(values_of(format), dtype=torch.float32)
    # -0.0 is below +0.0; equal values keep the order of their codes.
    order = sorted(
        range(len(values)), key=lambda i: (float(values[i]), math.copysign(1, float(values[i])))
    )
    ordered = values[order]
    pivots = ((ordered[:-1].double() + ordered[1:].double()) / 2).float()
    if format == "mxfp4":  # ties go to the even code
        even = torch.tensor([code % 2 == 0 for code in order[1:]])
        pivots = torch.where(even, pivots.nextafter(torch.tensor(-math.inf)), pivots)
    return torch.cat((pivots, torch.tensor([math.inf]))), order


@functools.cache
def encoder(format: str) -> Encoder4:
    """The cells of a four-bit codebook."""
    pivots, order = pivots_and_order(format)
    largest, reach = max(values_of(format)), 1.0
    while reach < largest:
        reach *= 2
    cells = Encoder4(step=15.0 / reach)
    cells.order[:] = order
    cells.pivots[:] = [math.inf] * 32
    cells.extra[:] = [math.inf] * 2
    extra = 0
    for pivot in pivots[:15].tolist():
        cell = round(pivot * cells.step) + 16  # ties to even
        if cells.pivots[cell] == math.inf:
            cells.pivots[cell] = pivot
            for above in range(cell + 1, 32):
                cells.below[above] += 1
        else:
            cells.extra[extra] = pivot
            extra += 1
    return cells
