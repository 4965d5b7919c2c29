"""Settings for every test: property profiles, no network, one seed."""

from __future__ import annotations

import os
import signal

# Before anything imports transformers or huggingface_hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

# A job in the background ignores Ctrl-C, and so would what it starts; the tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "quick", max_examples=40, deadline=None, derandomize=True, print_blob=True
)
settings.register_profile(
    "thorough", max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile(os.environ.get("NYBBLE_TEST_PROFILE", "quick"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20261124)
