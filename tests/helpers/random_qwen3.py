"""Tiny random Qwen3-VLs, for tests that take a module of random models."""

from __future__ import annotations

from typing import Any

from helpers import random_qwen
from helpers.random_qwen import make_images, mixed_batch
from hones_lens import HookedVLM

__all__ = ["make_config", "make_images", "make_pair", "mixed_batch"]


def make_config(**options: Any) -> Any:
    """A config of tiny sizes; arguments overrule them."""
    return random_qwen.make_config(kind="qwen3_vl", **options)


def make_pair(config: Any = None, seed: int = 0) -> tuple[Any, HookedVLM]:
    """A random Hugging Face model, and the same model hooked."""
    return random_qwen.make_pair(config or make_config(), seed)
