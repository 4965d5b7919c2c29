"""What the command line accepts."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nybble import __version__
from nybble.cli.console import Console

if TYPE_CHECKING:
    # argparse has no public name for this, and it is generic in its stub only.
    _Verbs = argparse._SubParsersAction[argparse.ArgumentParser]

Run = Callable[[argparse.Namespace, Console], int]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the arguments; `run` of the result does the work."""
    parser = argparse.ArgumentParser(
        prog="nybble",
        description="Quantize language models to 8 and 4 bits.",
        epilog="Exit codes: 0 ok, 1 a check failed, 2 usage, 3 unreadable or damaged input, "
        "4 not enough memory or disk, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"nybble {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    _quantize(verbs)
    _dequantize(verbs)
    _inspect(verbs)
    _demo(verbs)
    _doctor(verbs)
    return parser.parse_args(arguments)


def _verb(verbs: _Verbs, name: str, help: str, run: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    verb.set_defaults(command=name, run=_later(run))
    verb.add_argument("--json", action="store_true", help="one JSON document on standard output")
    verb.add_argument("-q", "--quiet", action="store_true", help="only errors on standard error")
    verb.add_argument("-v", "--verbose", action="store_true", help="a line for each tensor")
    return verb


def _later(run: str) -> Run:
    """Import the function when it is called: help must not wait for it."""

    def call(options: argparse.Namespace, console: Console) -> int:
        module, function = run.split(":")
        code: int = getattr(importlib.import_module(module), function)(options, console)
        return code

    return call


def _quantize(verbs: _Verbs) -> None:
    verb = _verb(
        verbs,
        "quantize",
        "quantize the linear layers of a checkpoint",
        "nybble.cli.convert:quantize",
    )
    _paths(verb)
    verb.add_argument("-f", "--format", default="nf4", help="nf4, fp4, int4, int8, ... (nf4)")
    verb.add_argument(
        "--blocksize",
        "--group-size",
        type=int,
        metavar="N",
        help="elements that share a scale (64)",
    )
    verb.add_argument(
        "--nested",
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="quantize the scales too",
    )
    verb.add_argument(
        "--skip",
        action="append",
        metavar="PATTERN",
        help="leave modules out: text, a glob, or re:REGEX; replaces the default, the output head",
    )
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATTERN=FORMAT",
        help="another format for some modules, or skip, or fp16, bf16, fp32",
    )
    verb.add_argument("--dtype", help="cast floating point tensors to this first")
    verb.add_argument(
        "--reference",
        default="exact",
        help="exact, or bitsandbytes-cpu for its bytes to the last one (exact)",
    )
    verb.add_argument(
        "--nonfinite",
        default="error",
        help="what to do with NaN: error, or zero to store 0 (error)",
    )
    verb.add_argument(
        "--experts", action="store_true", help="quantize mixture-of-experts weights too"
    )
    _run(verb)


def _dequantize(verbs: _Verbs) -> None:
    verb = _verb(
        verbs,
        "dequantize",
        "make an ordinary checkpoint of a quantized one",
        "nybble.cli.convert:dequantize",
    )
    _paths(verb)
    verb.add_argument("--dtype", default="bf16", help="bf16, fp16 or fp32 (bf16)")
    _run(verb)


def _inspect(verbs: _Verbs) -> None:
    verb = _verb(verbs, "inspect", "show what a checkpoint holds", "nybble.cli.inspect:inspect")
    verb.add_argument("model", help="directory or safetensors file")
    verb.add_argument("--verify", action="store_true", help="read everything and look for damage")


def _demo(verbs: _Verbs) -> None:
    verb = _verb(
        verbs, "demo", "quantize a small model and show what came of it", "nybble.cli.demo:demo"
    )
    verb.add_argument("--model", metavar="DIR", help="a 16-bit checkpoint to use instead")
    verb.add_argument("--keep", metavar="DIR", help="keep the checkpoints that are made here")


def _doctor(verbs: _Verbs) -> None:
    _verb(
        verbs,
        "doctor",
        "show versions, processor, kernels and threads, and what is wrong with them",
        "nybble.cli.doctor:doctor",
    )


def _paths(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", help="directory or safetensors file")
    verb.add_argument(
        "-o", "--output", metavar="OUT", help="directory, or a path that ends in .safetensors"
    )


def _run(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--max-memory", metavar="SIZE", help="memory to use at most, like 1GB")
    verb.add_argument("--threads", type=int, metavar="N", help="threads to use (all)")
    verb.add_argument("--overwrite", action="store_true", help="replace a model at OUT")
    verb.add_argument("--dry-run", action="store_true", help="only show what would be done")
