"""The stages of `gpu_check.py`, a module each with a function `run`."""
