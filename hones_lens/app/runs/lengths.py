"""Sizes of examples in patches and tokens, without a model's weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from hones_lens.app.runs.operations import Segment
from hones_lens.data import Example
from hones_lens.engine import MAX_NEW_TOKENS
from hones_lens.model import HookedVLM, checkpoint_path, find_settings, n_tiles, tiling_of
from hones_lens.tasks import Task

_CHAT_TOKENS = 16  # of a chat template, and of the system prompt that some have
_MARKERS = 3  # tokens around a tile: two markers, the end of a row
_QUARTER = 4  # characters of English a token, where there is no tokenizer
_BOUNDS = {"min_pixels": 3136, "max_pixels": 12845056}  # of a picture, where a family resizes it


@dataclass(frozen=True)
class Row:
    """Sizes of an example: its picture in patches, its prompts as the engine runs them.

    Attributes:
        grid: Rows and columns of patches.
        n_grids: How many such grids the picture has.
        answered: Prompt and answer, or prefix and candidates.
        asked: The prompt that the target follows.
        target: Prompt and right answer.
    """

    grid: tuple[int, int]
    answered: tuple[Segment, ...]
    asked: int
    target: Segment
    n_grids: int = 1

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
        images = None if self._settings is None else self._settings.images
        known: dict[str, Any] = dict(images or {})
        self._bounds = {**_BOUNDS, **known, **{name: n for name, n in given.items() if n is not None}}
        self._cutter = self._find_cutter(known)
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
        """Tokens of a picture (width, height), of all its grids and the markers in front of them."""
        vision, (rows, columns), n_grids = self._cfg.vision, self.grid(size), self.n_grids(size)
        if vision.tile_sizes:
            cut = tiling_of((size[1], size[0]), vision)
            return rows * columns + cut.layout(0).n_tokens(cut.grid)
        of_grid = rows * columns // vision.merge_size**2 + int(vision.keep_class_token)
        return of_grid if self._cutter is None else n_grids * (of_grid + _MARKERS)

    def n_grids(self, size: tuple[int, int]) -> int:
        """Tiles of a picture (width, height), the picture as a whole among them."""
        if self._cfg.vision.tile_sizes:
            return tiling_of((size[1], size[0]), self._cfg.vision).n_tiles + 1
        if self._cutter is None:
            return 1
        rows, columns = n_tiles(self._cutter, *size)
        return rows * columns + 1

    def _find_cutter(self, images: dict[str, Any]) -> Any:
        """The settings of an image processor that cuts pictures into tiles; None: it does not."""
        if "longest_edge" in images:
            given: dict[str, Any] = {
                "do_image_splitting": True,
                "do_resize": True,
                "size": {"longest_edge": images["longest_edge"]},
                "max_image_size": {"longest_edge": images["side"]},
            }
            return SimpleNamespace(**given)
        file = Path(self._cfg.model_name) / "preprocessor_config.json"
        if self._settings is not None or not file.is_file():
            return None
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return SimpleNamespace(**found) if "do_image_splitting" in found else None

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
            return Row(self.grid(size), answered, asked, target, self.n_grids(size))
        prompts = [self.of_text(prompt) for prompt in task.prompts(example)]
        behind = _CHAT_TOKENS // 2 + sum(prompts) // len(prompts)
        shared = self.of_picture(size) + _CHAT_TOKENS // 2
        answered = (Segment(1, shared, 0, 0), Segment(len(prompts), behind, shared, 1))
        return Row(self.grid(size), answered, asked, target, self.n_grids(size))
