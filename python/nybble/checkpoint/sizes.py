"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

from nybble.errors import FormatError

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
    "K": 1 << 10,
    "M": 1 << 20,
    "G": 1 << 30,
    "T": 1 << 40,
}


def parse_size(size: int | str | None) -> int | None:
    """Read a size: a number of bytes, or text like `1GB` (10^9) or `1.5GiB` (2^30).

    Raises:
        FormatError: The text is no size.
    """
    if size is None:
        return None
    if isinstance(size, int):
        if size < 0:
            raise FormatError(f"a size cannot be negative, got {size}")
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
    unit = _UNITS.get(found.group(2).upper()) if found else None
    if found is None or unit is None:
        raise FormatError(f"'{size}' is no size; write it like 500MB, 1GB or 1.5GiB")
    return int(float(found.group(1)) * unit)


def format_size(size: int) -> str:
    """Write a size with three digits: `1.23 GB`."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return (
                f"{size / factor:.3g} {unit}"
                if size < 999.5 * factor
                else f"{size // factor} {unit}"
            )
    return f"{size} B"
