"""Set-up of all tests: offline, one thread, shapes and types checked at every call."""

from __future__ import annotations

import os
import shutil

# Before anything imports Hugging Face's libraries or matplotlib.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch
from helpers import shape_checks
from hypothesis import settings
from jaxtyping import install_import_hook

# Before anything imports hones_lens. Only here: users pay nothing for it.
install_import_hook("hones_lens", f"{shape_checks.__name__}.check")

# The models are small: more threads would only wait for each other.
torch.set_num_threads(1)

# The same examples in every run, and no time limit of its own on a busy machine.
settings.register_profile("hones", derandomize=True, deadline=None)
settings.load_profile("hones")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine can't run, and say why."""
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "no CUDA device"
    if not (shutil.which("chromium") or shutil.which("google-chrome")):
        missing["browser"] = "no Chromium"
    for item in items:
        for marker, why in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
