"""`nybble quantize` and `nybble dequantize`."""

from __future__ import annotations

import argparse

from nybble.checkpoint.convert import dequantize_checkpoint, quantize_checkpoint
from nybble.checkpoint.report import Report
from nybble.checkpoint.sizes import format_size
from nybble.cli.console import Console
from nybble.errors import CheckpointError, FormatError


def quantize(options: argparse.Namespace, console: Console) -> int:
    """Quantize a checkpoint."""
    overrides = dict(_override(text) for text in options.set)
    output = _output(options)

    def run(dry_run: bool) -> Report:
        return quantize_checkpoint(
            options.model,
            output,
            options.format,
            nested=options.nested,
            blocksize=options.blocksize,
            skip=options.skip,
            overrides=overrides,
            max_memory=options.max_memory,
            threads=options.threads,
            overwrite=options.overwrite,
            dry_run=dry_run,
            on_progress=console.progress,
            reference=options.reference,
            nonfinite=options.nonfinite,
            dtype=options.dtype,
            experts=options.experts,
        )

    # Options that cannot be are found here, before any weight is read.
    report = run(dry_run=True)
    if not options.dry_run:
        console.log(
            f"{report.source} -> {report.destination}: {format_size(report.bytes_before)} to "
            f"{format_size(report.bytes_after)} as {report.format}"
        )
        try:
            report = run(dry_run=False)
        except FormatError as error:
            # The options are good, so it is the weights: NaN, or too large for their format.
            raise CheckpointError(str(error)) from error
    _show(report, console)
    return 0


def dequantize(options: argparse.Namespace, console: Console) -> int:
    """Make an ordinary checkpoint of a quantized one."""
    report = dequantize_checkpoint(
        options.model,
        _output(options),
        options.dtype,
        max_memory=options.max_memory,
        threads=options.threads,
        overwrite=options.overwrite,
        dry_run=options.dry_run,
        on_progress=console.progress,
    )
    _show(report, console)
    return 0


def _show(report: Report, console: Console) -> None:
    if console.verbose:
        for row in report.tensors:
            noise = f"{row.stats.sqnr_db:6.2f} dB" if row.stats else f"kept: {row.kept}"
            console.log(f"{row.name}  {list(row.shape)}  {row.format}  {noise}")
    for warning in report.warnings:
        console.warn(warning)
    console.result(str(report), report.to_json())


def _output(options: argparse.Namespace) -> str:
    output: str | None = options.output
    if output is None:
        if not options.dry_run:
            raise FormatError("name the result with -o OUT, or pass --dry-run")
        # A plan does not depend on it.
        return f"{options.model.rstrip('/')}-{options.command}d"
    return output


def _override(text: str) -> tuple[str, str]:
    """`PATTERN=FORMAT`; the pattern may have `=` in it, a format does not."""
    pattern, equals, value = text.rpartition("=")
    if not equals or not pattern or not value:
        raise FormatError(f"--set takes PATTERN=FORMAT, got '{text}'")
    return pattern, value
