"""The names and arguments of other libraries, served by nybble's own primitives.

Each module is imported on its own (`import nybble.compat.bitsandbytes as bnb`). Nothing in the
rest of nybble imports them.
"""
