"""Checks the one wheel in a folder: small, stable ABI, typed.

python scripts/check_wheel.py dist
"""

import sys
import zipfile
from pathlib import Path

MAX_BYTES = 10_000_000
FILES = ["nybble/__init__.py", "nybble/_core.pyi", "nybble/py.typed"]
EXTENSIONS = {"nybble/_core.abi3.so", "nybble/_core.pyd"}


def problems(wheel: Path) -> list[str]:
    """What is wrong with the wheel, each with what to do."""
    found = []
    size = wheel.stat().st_size
    if size > MAX_BYTES:
        found.append(f"is {size} bytes, at most {MAX_BYTES} are allowed; see `unzip -lv {wheel}`")
    if "-abi3-" not in wheel.name:
        found.append("is not built for the stable ABI; pyo3 needs its abi3-py310 feature")
    names = zipfile.ZipFile(wheel).namelist()
    found += [f"lacks {name}" for name in FILES if name not in names]
    binaries = {name for name in names if name.endswith((".so", ".pyd", ".dylib"))}
    if len(binaries) != 1 or not binaries <= EXTENSIONS:
        found.append(f"should hold one of {sorted(EXTENSIONS)}, holds {sorted(binaries)}")
    if not any(name.endswith("licenses/LICENSE") for name in names):
        found.append('lacks the licence; pyproject.toml needs license-files = ["LICENSE"]')
    return found


def main(folder: str) -> int:
    wheels = sorted(Path(folder).glob("nybble-*.whl"))
    if len(wheels) != 1:
        print(f"error: {folder} should hold one wheel, holds {[w.name for w in wheels]}")
        return 1
    [wheel] = wheels
    found = problems(wheel)
    for problem in found:
        print(f"error: {wheel.name} {problem}")
    if not found:
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
