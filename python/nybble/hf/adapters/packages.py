"""Packages that only this part of nybble needs, and what to do where they are missing."""

from __future__ import annotations

import importlib
from typing import Any


def peft() -> Any:
    """The module `peft`.

    Raises:
        ImportError: It is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ImportError(
            f"adapters need the package peft, which cannot be imported ({error});"
            " install it with: pip install 'peft>=0.21'"
        ) from error
