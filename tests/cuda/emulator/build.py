"""Build the emulated kernels as one shared library: `build.py OUT.so [--sanitize] [--broken]`."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[2] / "cuda"
# The kernels read words of bytes, and round where the definition rounds.
FLAGS = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared"]
FLAGS += ["-fPIC", "-pthread", "-fno-strict-aliasing", "-ffp-contract=off", "-DNYBBLE_EMULATOR"]


def compiler() -> str | None:
    """The C++ compiler, or None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def build(out: Path, *, sanitize: bool = False, broken: bool = False) -> Path:
    """Compile; `broken` adds kernels that break the rules, to show that they are caught."""
    found = compiler()
    if found is None:
        raise RuntimeError("no C++ compiler: install g++, or name one in CXX")
    extra = ["-g", "-fsanitize=address"] if sanitize else []
    extra += ["-DNYBBLE_EMULATOR_BROKEN"] if broken else []
    includes = [f"-I{HERE}", f"-I{KERNELS}"]
    source = str(HERE / "library.cpp")
    subprocess.run([found, *FLAGS, *extra, *includes, source, "-o", str(out)], check=True)
    return out


def main() -> None:
    """Build what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer")
    parser.add_argument("--broken", action="store_true", help="with kernels that break the rules")
    options = parser.parse_args()
    print(build(options.out, sanitize=options.sanitize, broken=options.broken))


if __name__ == "__main__":
    main()
