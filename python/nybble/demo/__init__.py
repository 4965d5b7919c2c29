"""`nybble demo`: the whole main job on a model that is at hand, offline."""

from nybble.demo.run import Demo, Row, run

__all__ = ["Demo", "Row", "run"]
