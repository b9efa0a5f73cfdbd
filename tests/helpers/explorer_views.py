"""Explorers of one question of the shapes world, on both shipped models."""

from __future__ import annotations

from functools import cache

from hones_lens import HookedVLM, load_examples, load_task
from hones_lens.app.explorer.views import ExplorerViews
from hones_lens.data.examples import Example


@cache
def shipped(name: str) -> HookedVLM:
    return HookedVLM.from_pretrained(name)


@cache
def example() -> Example:
    """A green cross and a purple triangle: what shape is the green one?"""
    return load_examples("shapes", "vqa", "test", limit=2)[1]


def prompt() -> str:
    return load_task("vqa").prompt(example())  # type: ignore[attr-defined]


def views(name: str = "tiny-llava", **options) -> ExplorerViews:
    return ExplorerViews(shipped(name), example().image, prompt(), **options)
