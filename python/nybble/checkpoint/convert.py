"""Quantize and dequantize checkpoint files, in bounded memory and without torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from nybble import _core
from nybble.checkpoint.report import Report
from nybble.checkpoint.sizes import parse_size
from nybble.errors import FormatError

Path = str | os.PathLike[str]
#: Called with bytes done, bytes in all and the tensor at hand, at most ten times a second.
OnProgress = Callable[[int, int, str], object]

_LAYOUTS = ("bitsandbytes",)


def quantize_checkpoint(
    src: Path,
    dst: Path,
    format: str = "nf4",
    *,
    nested: bool = False,
    blocksize: int | None = None,
    skip: Sequence[str] | None = None,
    overrides: Mapping[str, str] | None = None,
    layout: Literal["bitsandbytes"] = "bitsandbytes",
    max_memory: int | str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    on_progress: OnProgress | None = None,
    reference: Literal["exact", "bitsandbytes-cpu"] | None = "exact",
    nonfinite: Literal["error", "zero"] = "error",
    dtype: str | None = None,
    experts: bool = False,
) -> Report:
    r"""Quantize the linear layers of a checkpoint.

    Tensors are read, quantized and written a piece at a time, so the model need not fit in
    memory. The result appears under its name when it is whole, never before.

    Args:
        src: A directory with safetensors and `config.json`, or one safetensors file.
        dst: A directory, or a path that ends in `.safetensors` for one file.
        format: `nf4`, `fp4`, `int4`, `int8`, `dynamic8` or `mxfp4`.
        nested: Double quantization: the scales are quantized too.
        blocksize: Elements that share a scale; None for the format's default.
        skip: Modules to leave out: plain text, a glob, or `re:` and a regular expression. As in
            bitsandbytes a list replaces the default, the output head.
        overrides: Another format for some modules, or `skip`, or `fp16`, `bf16`, `fp32` to cast.
            The first pattern that matches wins; `skip` wins over all.
        layout: How quantized tensors are stored.
        max_memory: Bytes that the work may use, also as text: `1GB`.
        threads: Threads; None for `OMP_NUM_THREADS` or all.
        overwrite: Replace a model at `dst`, once the new one is whole.
        dry_run: Only say what would be done.
        on_progress: Called with bytes done, bytes in all and the tensor at hand. An exception
            that it raises ends the work.
        reference: `bitsandbytes-cpu` makes every byte as bitsandbytes does on a CPU; that
            includes casting to the config's dtype first.
        nonfinite: What to do with NaN and infinity: `error`, or `zero` to store them as 0.
        dtype: Cast floating point tensors to this first; None leaves them as they are.
        experts: Quantize mixture-of-experts weights too. bitsandbytes could not load those.

    Returns:
        What became of each tensor.

    Raises:
        CheckpointError: The source is damaged, or quantized already.
        FormatError: An option or a value that cannot be.
        OutOfMemoryError: The work does not fit in `max_memory`, or the result on the disk.
        OSError: A file that cannot be read or written; FileExistsError without `overwrite`.
    """
    if layout not in _LAYOUTS:
        raise FormatError(f"unknown layout '{layout}'; known: {' '.join(_LAYOUTS)}")
    return Report.from_json(
        _core.quantize_checkpoint(
            os.fspath(src),
            os.fspath(dst),
            format,
            nested=nested,
            blocksize=blocksize,
            skip=None if skip is None else _names(skip),
            overrides=dict(overrides or {}),
            max_memory=parse_size(max_memory),
            threads=_threads(threads),
            overwrite=overwrite,
            dry_run=dry_run,
            on_progress=on_progress,
            reference=reference or "exact",
            nonfinite=nonfinite,
            dtype=_dtype(dtype),
            experts=experts,
        )
    )


def dequantize_checkpoint(
    src: Path,
    dst: Path,
    dtype: str | None = "bf16",
    *,
    max_memory: int | str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    on_progress: OnProgress | None = None,
) -> Report:
    """Make an ordinary checkpoint of a quantized one.

    Quantized weights become dense tensors of `dtype`; everything else stays as it is stored.

    Args:
        src: A directory with safetensors and `config.json`, or one safetensors file.
        dst: A directory, or a path that ends in `.safetensors` for one file.
        dtype: `bf16`, `fp16` or `fp32`; None for what each weight had before.
        max_memory: Bytes that the work may use, also as text: `1GB`.
        threads: Threads; None for `OMP_NUM_THREADS` or all.
        overwrite: Replace a model at `dst`, once the new one is whole.
        dry_run: Only say what would be done.
        on_progress: Called with bytes done, bytes in all and the tensor at hand.

    Returns:
        What became of each tensor.

    Raises:
        CheckpointError: The source is damaged, or not quantized.
        OutOfMemoryError: The work does not fit in `max_memory`, or the result on the disk.
        OSError: A file that cannot be read or written; FileExistsError without `overwrite`.
    """
    return Report.from_json(
        _core.dequantize_checkpoint(
            os.fspath(src),
            os.fspath(dst),
            _dtype(dtype),
            max_memory=parse_size(max_memory),
            threads=_threads(threads),
            overwrite=overwrite,
            dry_run=dry_run,
            on_progress=on_progress,
        )
    )


def _names(skip: Sequence[str]) -> list[str]:
    # A string is a sequence of letters, and every one would match something.
    if isinstance(skip, str):
        raise FormatError(f"skip must be a list of patterns, not the text '{skip}'")
    return list(skip)


def _threads(threads: int | None) -> int | None:
    if threads is not None and threads < 1:
        raise FormatError(f"threads must be at least 1, got {threads}")
    return threads


def _dtype(dtype: object) -> str | None:
    """A name; torch's own dtype objects print as `torch.bfloat16`."""
    return None if dtype is None else str(dtype).removeprefix("torch.")
