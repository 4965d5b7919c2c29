"""Exceptions of nybble. The Rust core raises these same classes."""

from __future__ import annotations


class Error(Exception):
    """Base of every error that nybble itself raises."""


class FormatError(Error, ValueError):
    """A format, shape, block size, value or option that cannot be."""


class DtypeError(Error, TypeError):
    """An element type that the operation does not take."""


class RowIndexError(Error, IndexError):
    """A row that a table does not have."""


class CheckpointError(Error, ValueError):
    """A checkpoint file that is damaged, odd or hostile; names file, tensor and remedy."""


class DeviceError(Error, RuntimeError):
    """A device that is not there or cannot do what was asked."""


class OutOfMemoryError(Error, MemoryError):
    """Work that does not fit in the memory or disk allowed for it."""
