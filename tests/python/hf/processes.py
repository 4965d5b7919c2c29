"""Run a function in two processes that talk through gloo on this machine."""

from __future__ import annotations

import datetime
import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
_TIMEOUT = datetime.timedelta(seconds=120)


def spawn(work: Callable[..., Any], directory: Path, *arguments: Any) -> list[Any]:
    """What `work(rank, *arguments)` returned in each process.

    The processes find each other by a file, so that runs side by side do not meet. Warnings are
    errors in them too.
    """
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch was built without gloo")
    meeting = directory / "meeting"
    results = [directory / f"result-{rank}.pt" for rank in range(WORLD)]
    mp.spawn(_process, args=(work, meeting, results, arguments), nprocs=WORLD)
    return [torch.load(path, weights_only=False) for path in results]


def _process(
    rank: int,
    work: Callable[..., Any],
    meeting: Path,
    results: list[Path],
    arguments: tuple[Any, ...],
) -> None:
    warnings.simplefilter("error")
    # As in tiny.RENAMED; this process is not one of pytest's.
    warnings.filterwarnings("ignore", ".*will be removed in v6", FutureWarning)
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD, timeout=_TIMEOUT
    )
    try:
        torch.save(work(rank, *arguments), results[rank])
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()
