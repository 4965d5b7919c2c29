"""Quantize a model to nf4 and int8, load the results, and compare them with the original."""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nybble.demo import measure
from nybble.demo.source import Source, prepare

_RUNS = {"nf4": ["-f", "nf4", "--nested"], "int8": ["-f", "int8"]}
_WORST = 3


@dataclass(frozen=True, kw_only=True)
class Row:
    """One form of the model.

    Attributes:
        name: Its format.
        file_bytes: Bytes of its weight files.
        bits_per_weight: Bits for each element of the whole checkpoint.
        top1_agreement: Fraction of positions of the bundled text at which it chooses the same
            next token as the 16-bit model.
        says: Its greedy continuation of the prompt.
        tokens_per_second: While generating, after the first token.
        quantize_seconds: Time of `nybble quantize`, start of the process included.
        quantize_peak_bytes: The most memory that `nybble quantize` used.
        worst: The layers with the least signal to noise: name and decibels.
    """

    name: str
    file_bytes: int
    bits_per_weight: float
    top1_agreement: float
    says: str
    tokens_per_second: float
    quantize_seconds: float | None = None
    quantize_peak_bytes: int | None = None
    worst: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the demo found.

    Attributes:
        model: Name of the model.
        parameters: Its parameters.
        prompt: What each form was asked to continue.
        positions: Positions of the bundled text that were compared.
        threads: Threads of torch.
        kernels: Instruction set of nybble's kernels.
        peak_bytes: The most memory that the demo itself used, torch and the models included.
        rows: The 16-bit model, then its quantized forms.
    """

    model: str
    parameters: int
    prompt: str
    positions: int
    threads: int
    kernels: str
    peak_bytes: int
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        dense, *quantized = self.rows
        lines = [
            f"{self.model}, {self.parameters / 1e6:.1f} million parameters;"
            f" {self.threads} threads, {self.kernels} kernels",
            "",
            f"{'':6} {'size':>9} {'bits/weight':>12} {'top-1 agreement':>16} {'tokens/s':>9}"
            f" {'quantized in':>13} {'using':>9}",
        ]
        for row in self.rows:
            made = ("", "") if row.quantize_seconds is None else _made(row)
            lines.append(
                f"{row.name:6} {row.file_bytes / 1e6:6.1f} MB {row.bits_per_weight:12.2f}"
                f" {row.top1_agreement:15.1%}  {row.tokens_per_second:9.1f}"
                f" {made[0]:>13} {made[1]:>9}"
            )
        lines += ["", "weakest layers (signal to quantization noise)"]
        for row in quantized:
            layers = ", ".join(f"{name} {decibels:.1f} dB" for name, decibels in row.worst)
            lines.append(f"{row.name:6} {layers}")
        lines += ["", f'"{self.prompt}" ...']
        lines += [f"{row.name:6} {row.says}" for row in (dense, *quantized)]
        lines += [
            "",
            f"agreement over {self.positions} positions of a bundled text; peak memory of the demo"
            f" itself {self.peak_bytes / 1e6:.0f} MB, torch and two models included",
        ]
        return "\n".join(lines)


def _made(row: Row) -> tuple[str, str]:
    assert row.quantize_peak_bytes is not None
    return f"{row.quantize_seconds:.1f} s", f"{row.quantize_peak_bytes / 1e6:.0f} MB"


def run(
    *,
    model: str | None = None,
    keep: str | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> Demo:
    """Run the demo.

    Args:
        model: A directory with a 16-bit checkpoint; None for SmolLM2 from its package, or a
            generated model where that is not installed.
        keep: Directory for the checkpoints that are made; None removes them at the end.
        log: Told what is being done.

    Raises:
        Error: transformers is not installed, or a step failed.
    """
    with _work_directory(keep) as work:
        return _run(prepare(model, work, log), work, log)


@contextmanager
def _work_directory(keep: str | None) -> Iterator[Path]:
    if keep is not None:
        Path(keep).mkdir(parents=True, exist_ok=True)
        yield Path(keep)
        return
    with tempfile.TemporaryDirectory(prefix="nybble-demo-") as directory:
        yield Path(directory)


def _run(source: Source, work: Path, log: Callable[[str], None]) -> Demo:
    import transformers

    from nybble import _core
    from nybble.checkpoint.models import load_model
    from nybble.checkpoint.open import open_checkpoint

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    made = {}
    for name, options in _RUNS.items():
        target = work / name
        log(f"nybble quantize {source.directory.name} {' '.join(options)} -o {name}")
        start = time.perf_counter()
        arguments = ["quantize", str(source.directory), *options, "-o", str(target)]
        out, peak = measure.run_command([*arguments, "--overwrite", "--quiet", "--json"])
        made[name] = (target, json.loads(out), time.perf_counter() - start, peak)

    log("running the 16-bit model")
    tokenizer = None
    if source.tokenized:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.directory)
    dense = transformers.AutoModelForCausalLM.from_pretrained(
        source.directory, dtype=torch.bfloat16
    ).eval()
    ids = measure.text_ids(tokenizer)
    reference = measure.choices(dense, ids)
    summary = open_checkpoint(source.directory).summary().total
    says, speed = measure.generate(dense, tokenizer)
    rows = [
        Row(
            name="bf16",
            file_bytes=measure.directory_bytes(source.directory),
            bits_per_weight=summary.bits_per_weight,
            top1_agreement=1.0,
            says=says,
            tokens_per_second=speed,
        )
    ]
    for name, (directory, report, seconds, peak) in made.items():
        log(f"running the {name} model")
        model = load_model(copy.deepcopy(dense), directory)
        says, speed = measure.generate(model, tokenizer)
        noisy = sorted(
            (tensor["stats"]["sqnr_db"], tensor["name"].removesuffix(".weight"))
            for tensor in report["tensors"]
            if tensor["stats"]
        )
        rows.append(
            Row(
                name=name,
                file_bytes=measure.directory_bytes(directory),
                bits_per_weight=open_checkpoint(directory).summary().total.bits_per_weight,
                top1_agreement=measure.agreement(measure.choices(model, ids), reference),
                says=says,
                tokens_per_second=speed,
                quantize_seconds=seconds,
                quantize_peak_bytes=peak,
                worst=tuple((layer, decibels) for decibels, layer in noisy[:_WORST]),
            )
        )
        del model
    return Demo(
        model=source.name,
        parameters=summary.elements,
        prompt=measure.prompt(),
        positions=ids.shape[1],
        threads=torch.get_num_threads(),
        kernels=_core.cpu()[0],
        peak_bytes=measure.peak_memory(),
        rows=tuple(rows),
    )
