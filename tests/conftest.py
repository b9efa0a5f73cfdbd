"""Set-up of all tests: offline, the same random numbers, few threads.

Variables of the environment: `HONES_TEST_THREADS`, the threads that torch computes on (default 1);
`HONES_CHECK_SHAPES=1`, with which types and tensor shapes are checked at every call into hones_lens; and
`HONES_TRUE_SIZE=1`, with which a model of 14 GB is made and run.
"""

from __future__ import annotations

import gc
import os
import shutil
from typing import Any

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

# Before anything imports hones_lens. Only here: users pay nothing for their annotations.
if os.environ.get("HONES_CHECK_SHAPES") == "1":
    install_import_hook("hones_lens", f"{shape_checks.__name__}.check")

# The models are small: more threads would only wait for each other.
torch.set_num_threads(int(os.environ.get("HONES_TEST_THREADS", "1")))

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
    if os.environ.get("HONES_TRUE_SIZE") != "1":
        missing["true_size"] = "14 GB: `make test-true-size` runs it"
    if os.environ.get("HONES_CHECK_SHAPES") == "1":
        missing["wrong_types"] = "the check of types refuses it first"
    for item in items:
        for marker, why in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=why))


def pytest_collection_finish() -> None:
    """Leave what there is by now, all modules and tests, out of every later search for garbage."""
    gc.collect()
    gc.freeze()


def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> None:
    """What several tests share is made of the same random numbers, whatever ran before."""
    if fixturedef.scope != "function":
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
