"""Sizes of examples in patches and tokens, without a model's weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from hones_lens.app.runs.operations import Segment
from hones_lens.data import Example
from hones_lens.engine import MAX_NEW_TOKENS
from hones_lens.model import HookedVLM, checkpoint_path, find_settings
from hones_lens.tasks import Task

_CHAT_TOKENS = 16  # of a chat template, and of the system prompt that some have
_QUARTER = 4  # characters of English a token, where there is no tokenizer
_BOUNDS = {"min_pixels": 3136, "max_pixels": 12845056}  # of a picture, where a family resizes it


@dataclass(frozen=True)
class Row:
    """Sizes of an example: its picture in patches, its prompts as the engine runs them.

    Attributes:
        grid: Rows and columns of patches.
        answered: Prompt and answer, or prefix and candidates.
        asked: The prompt that the target follows.
        target: Prompt and right answer.
    """

    grid: tuple[int, int]
    answered: tuple[Segment, ...]
    asked: int
    target: Segment

    @property
    def tokens(self) -> int:
        """Tokens that an arm runs."""
        return sum(segment.rows * segment.tokens for segment in self.answered)


class Lengths:
    """Counts tokens: of the checkpoint's tokenizer where it is at hand, else a quarter of the characters.

    Args:
        model: The model, or its sizes.
        min_pixels, max_pixels: Bounds of a picture, for models that resize it.
    """

    def __init__(self, model: HookedVLM, min_pixels: int | None = None, max_pixels: int | None = None):
        self._cfg, self._settings = model.cfg, find_settings(model.cfg.model_name)
        given = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        known = self._settings.images if self._settings is not None and self._settings.images else {}
        self._bounds = {**_BOUNDS, **known, **{name: n for name, n in given.items() if n is not None}}
        self.of_text = self._tokenizer()

    def _tokenizer(self) -> Callable[[str], int]:
        folder = Path(self._cfg.model_name)
        if self._settings is not None and self._settings.checkpoint is None:
            return lambda text: -(-len(text) // _QUARTER)
        if self._settings is not None:
            folder = checkpoint_path(str(self._settings.checkpoint))
        auto: Any = AutoTokenizer
        tokenizer = auto.from_pretrained(folder)
        return lambda text: len(tokenizer(text, add_special_tokens=False).input_ids)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of a picture (width, height)."""
        vision = self._cfg.vision
        if vision.image_size is not None:
            return vision.patches_per_side, vision.patches_per_side
        side = vision.patch_size * vision.merge_size
        height, width = smart_resize(size[1], size[0], side, **self._bounds)
        return height // vision.patch_size, width // vision.patch_size

    def of_picture(self, size: tuple[int, int]) -> int:
        """Tokens of a picture (width, height)."""
        vision, (rows, columns) = self._cfg.vision, self.grid(size)
        return rows * columns // vision.merge_size**2 + int(vision.keep_class_token)

    def asked(self, size: tuple[int, int], prompt: str) -> int:
        """Tokens of a prompt about a picture (width, height)."""
        return self.of_picture(size) + _CHAT_TOKENS + self.of_text(prompt)

    def row(self, task: Task, example: Example) -> Row:
        """The sizes of an example."""
        size = example.image.size
        asked = self.asked(size, task.target_prompt(example))
        right = max(1, self.of_text(task.answer(example)))
        target = Segment(1, asked + right - 1, 0, right)
        if not task.ranks:
            answered = (Segment(1, asked + MAX_NEW_TOKENS - 1, 0, MAX_NEW_TOKENS),)
            return Row(self.grid(size), answered, asked, target)
        prompts = [self.of_text(prompt) for prompt in task.prompts(example)]
        behind = _CHAT_TOKENS // 2 + sum(prompts) // len(prompts)
        shared = self.of_picture(size) + _CHAT_TOKENS // 2
        answered = (Segment(1, shared, 0, 0), Segment(len(prompts), behind, shared, 1))
        return Row(self.grid(size), answered, asked, target)
