"""What is looked at before a quantized checkpoint is loaded: headers, but no weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from transformers.utils import logging

from nybble.checkpoint.open import Checkpoint, open_checkpoint
from nybble.errors import CheckpointError

logger = logging.get_logger("nybble.hf")

_WHOLE = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_EXPERT = re.compile(r"\.experts\.(\d+\.|\w+_proj$)")
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the headers of a checkpoint say.

    Attributes:
        damaged: Weights that bitsandbytes damaged and that can be repaired.
        quantized_experts: Whether experts of a mixture are stored quantized.
    """

    damaged: list[str] = field(default_factory=list)
    quantized_experts: bool = False


def before_loading(files: Iterable[str] | None) -> Found:
    """Check the files of a quantized checkpoint; warn of what is repaired.

    Raises:
        CheckpointError: A weight and what describes it disagree.
        OSError: A file is missing.
    """
    paths = [Path(file) for file in files or ()]
    folders = {path.parent for path in paths}
    if len(folders) != 1 or not all(_WHOLE.fullmatch(path.name) for path in paths):
        return Found()  # a variant or another kind of file; each weight is checked when it is read
    folder = folders.pop()
    checkpoint, lenient = open_checkpoint(folder), open_checkpoint(folder, repair=True)
    damaged: dict[str, str] = {}
    problems: list[str] = []
    for name in checkpoint:
        problem = _problem(checkpoint, name)
        if problem is None:
            continue
        if _problem(lenient, name) is None:
            damaged[name] = problem
        else:
            problems.append(problem)
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError("; ".join(problems[:_SHOWN]) + more)
    if damaged:
        first = next(iter(damaged.values()))
        logger.warning(
            "%s",
            f"{folder}: {len(damaged)} weights are damaged and were repaired as well as can be;"
            f" their scales stay rounded. Save the model again to keep the repair. First: {first}",
        )
    experts = any(_EXPERT.search(name) and lenient.entry(name).format for name in lenient)
    return Found(damaged=list(damaged), quantized_experts=experts)


def _problem(checkpoint: Checkpoint, name: str) -> str | None:
    try:
        checkpoint.entry(name)
    except CheckpointError as error:
        return str(error)
    return None
