"""What the machine can do at best: copying, reading, multiplying."""

from __future__ import annotations

import torch

from gpu.clock import microseconds, without_graph
from gpu.records import Records
from gpu.timing import SHAPES

BYTES = 4 << 30


def run(records: Records, _name: str) -> None:
    free, _ = torch.cuda.mem_get_info()
    nbytes = min(BYTES, free // 4)
    a = torch.zeros(nbytes // 4, device="cuda")
    b = torch.empty_like(a)
    us = without_graph(lambda: b.copy_(a))
    records.add("ceilings", "copy", us=us, gb_s=2 * nbytes / us / 1e3)
    us = without_graph(a.sum)
    records.add("ceilings", "read", us=us, gb_s=nbytes / us / 1e3)
    a = b = torch.empty(0)  # makes room
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    us = without_graph(lambda: x @ x)
    records.add("ceilings", "bf16 matmul 8192", us=us, tflops=2 * 8192**3 / us / 1e6)
    for n, k in SHAPES:
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        for rows in (1, 8, 2048):
            x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
            us = microseconds(lambda _i, x=x, w=w: torch.nn.functional.linear(x, w), 5)
            records.add("ceilings", f"bf16 linear {n}x{k} M={rows}", us=us)
