"""`VLMInputs`: the inputs of a model, and the positions of its images among the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hones_lens.model.image_grids import ImageGrids
from hones_lens.model.layout import ImageLayout
from hones_lens.model.typed import to_list

_FROM_HF = (
    "input_ids",
    "attention_mask",
    "pixel_values",
    "pixel_attention_mask",
    "image_grid_thw",
    "image_sizes",
    "batch_num_images",
    "position_ids",
    "mm_token_type_ids",
    "token_type_ids",
    "labels",
)
_BY_ROW_AND_POSITION = (
    "input_ids",
    "attention_mask",
    "mm_token_type_ids",
    "token_type_ids",
    "labels",
    "image_mask_or_none",
    "question_mask",
    "answer_mask",
)
_POSITIONS = ("position_ids", "counted_position_ids")
Region = tuple[float, float, float, float]
ImageText = int | str  # what stands for a picture in a prompt: so many image tokens, or a text with some
_UNSEEN_MASK = "which tokens are padding is the model's to say: use model.as_inputs(inputs)"


@dataclass(frozen=True, eq=False)
class VLMInputs(ImageGrids):
    """A left-padded batch of prompts with their images. Make it with `model.prepare`.

    Attributes:
        input_ids: Token ids, [batch pos].
        attention_mask: 1 at tokens, 0 at padding, [batch pos].
        pixel_values: What the vision tower reads; images of all rows in order. None without images.
        pixel_attention_mask: 1 at the pixels of pictures that are not padding, as Hugging Face's processor
            returns it (Idefics3); None once a model has seen the inputs.
        image_grid_thw: Patch counts (time, height, width) of each image, [n_images 3] (Qwen).
        position_ids: Rotary positions, [batch pos], or [3 batch pos] (Qwen); None where they follow from the
            mask.
        labels: Targets of the loss, [batch pos]; −100 leaves a position out. None: those of `answer_mask`.
        image_mask: True at image tokens, [batch pos].
        grids: `grids[row][image]` = (rows, columns) of image tokens, in raster order.
        regions: `regions[row][image]` = (left, top, right, bottom): the part of the picture that its grid
            covers, in pixels of the upright picture; filled in by `prepare`. Smaller than the picture if the
            processor crops it.
        layouts: `layouts[row][image]`: how the tokens of the image lie around its grid; empty where there are
            no others than the grid's.
        question_mask: True at the tokens of the user's own prompt, [batch pos], if prepared.
        answer_mask: True at the tokens of the answer, [batch pos], if prepared with answers.
        image_embeds: Image embeddings as the decoder reads them, if computed already (see
            `HookedVLM.with_image_embeds`); the vision tower is then not run.
        mask_is_assumed: The inputs came without an attention mask, and which of the tokens are padding is not
            known yet: `attention_mask` is 1 everywhere until a model has seen them (`HookedVLM.as_inputs`).
        counted_position_ids: The positions that the model counted itself, [3 batch pos] (Qwen); other
            `position_ids` were given.
        token_type_ids: 1 at image tokens, [batch pos], where Hugging Face's model reads it (Gemma 3). Some
            tokenizers return it for others, too: None once such a model has seen the inputs.
        image_sizes: Height and width of each picture in pixels, [n_pictures 2] (LLaVA-NeXT).
        batch_num_images: Numbers of pictures that belong together, one after the other, as LLaVA-OneVision
            has them, which cuts into tiles what is alone; None: each is alone.
        pixels_by_row: Hugging Face's model takes `pixel_values` with a first axis of rows; `to_hf` adds one.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None
    position_ids: Tensor | None = None
    mm_token_type_ids: Tensor | None = field(default=None, repr=False)
    labels: Tensor | None = field(default=None, repr=False)
    image_mask_or_none: Tensor | None = field(default=None, repr=False)
    grids: tuple[tuple[tuple[int, int], ...], ...] = ()
    regions: tuple[tuple[Region, ...], ...] = ()
    layouts: tuple[tuple[ImageLayout, ...], ...] = ()
    question_mask: Tensor | None = field(default=None, repr=False)
    answer_mask: Tensor | None = field(default=None, repr=False)
    image_embeds: Tensor | None = field(default=None, repr=False)
    mask_is_assumed: bool = field(default=False, repr=False)
    counted_position_ids: Tensor | None = field(default=None, repr=False)
    pixel_attention_mask: Tensor | None = field(default=None, repr=False)
    pixels_by_row: bool = field(default=False, repr=False)
    token_type_ids: Tensor | None = field(default=None, repr=False)
    image_sizes: Tensor | None = None
    batch_num_images: Tensor | None = field(default=None, repr=False)

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Tensor | None]) -> VLMInputs:
        """Make inputs from the output of a Hugging Face processor.

        If the mapping does not mark the image tokens, only a model can fill in `image_mask`, `grids` and
        `token_groups`; if it has no attention mask, only a model knows its padding token: use
        `model.as_inputs(mapping)`.

        Raises:
            ValueError: A key that would be ignored, or no input_ids [batch pos].
        """
        for key, value in mapping.items():
            if "video" in key and value is not None:
                raise ValueError(f"inputs key {key!r}: video is not handled; give still images")
            if key not in _FROM_HF and value is not None:
                raise ValueError(f"inputs key {key!r} is not handled; handled: {', '.join(_FROM_HF)}")
        if (ids := mapping.get("input_ids")) is None:
            raise ValueError("inputs have no 'input_ids'")
        ids = torch.as_tensor(ids)
        if ids.ndim != 2 or ids.is_floating_point():
            raise ValueError(f"input_ids are {ids.dtype} {list(ids.shape)}; give ids [batch, pos]")
        mask = mapping.get("attention_mask")
        token_types = mapping.get("mm_token_type_ids")
        image_mask = token_types == 1 if token_types is not None else None
        if image_mask is None and mapping.get("pixel_values") is None:
            image_mask = torch.zeros_like(ids, dtype=torch.bool)
        return cls(
            input_ids=ids,
            attention_mask=torch.ones_like(ids) if mask is None else _as_mask(mask, ids),
            pixel_values=mapping.get("pixel_values"),
            pixel_attention_mask=mapping.get("pixel_attention_mask"),
            image_grid_thw=mapping.get("image_grid_thw"),
            image_sizes=mapping.get("image_sizes"),
            batch_num_images=mapping.get("batch_num_images"),
            position_ids=mapping.get("position_ids"),
            labels=mapping.get("labels"),
            mm_token_type_ids=token_types,
            token_type_ids=mapping.get("token_type_ids"),
            image_mask_or_none=image_mask,
            mask_is_assumed=mask is None,
        )

    def to_hf(self) -> dict[str, Tensor]:
        """Keyword arguments for the Hugging Face model's `forward` and `generate`, without `labels`."""
        names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "image_sizes")
        names = (*names, "batch_num_images", "mm_token_type_ids", "token_type_ids")
        if self.positions_are_given:
            names = (*names, "position_ids")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.pixels_by_row and self.pixel_values is not None:
            given["pixel_values"] = self.pixel_values[None]
        return given

    @property
    def positions_are_given(self) -> bool:
        """Whether `position_ids` are others than the model's own."""
        given, counted = self.position_ids, self.counted_position_ids
        if given is None or counted is None:
            return given is not None
        return given is not counted and not torch.equal(given, counted)

    @property
    def mask_holes(self) -> Tensor:
        """True where `attention_mask` is 0 between two tokens of a row, [batch pos]."""
        tokens = self.attention_mask.bool()
        behind_a_token = tokens.cumsum(-1) > 0
        return ~tokens & behind_a_token & (tokens.flip(-1).cumsum(-1).flip(-1) > 0)

    @property
    def image_mask(self) -> Tensor:
        """True at image tokens, [batch pos].

        Raises:
            ValueError: The inputs came from a bare mapping and no model has seen them yet.
        """
        if self.image_mask_or_none is None:
            raise ValueError(
                "which tokens are image tokens is the model's to say: use model.as_inputs(mapping)"
            )
        return self.image_mask_or_none

    @property
    def token_groups(self) -> dict[str, Tensor]:
        """Boolean masks [batch pos]: `image`, `text`, `last`, and `question`, `answer` where prepared.

        `last` is the last token of each row that is not padding. Where a family writes newlines into the
        pictures, those of the tokens of `image` are `newline`, too.

        Raises:
            ValueError: No model has seen the inputs yet.
        """
        if self.mask_is_assumed:
            raise ValueError(_UNSEEN_MASK)
        tokens = self.attention_mask.bool()
        last = tokens & (tokens.flip(-1).cumsum(-1).flip(-1) == 1)
        groups = {"image": self.image_mask, "text": tokens & ~self.image_mask, "last": last}
        if any(layout.row_end or layout.trailing for row in self.layouts for layout in row):
            groups["newline"] = self.newline_mask
        if self.question_mask is not None:
            groups["question"] = self.question_mask
        if self.answer_mask is not None:
            groups["answer"] = self.answer_mask
        return groups

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.input_ids.shape[0]

    def __len__(self) -> int:
        """Number of rows."""
        return self.batch_size

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> VLMInputs:
        """Move every tensor; `dtype` is for the pixels alone."""
        moved: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device=device, dtype=dtype if name == "pixel_values" else None)
        return replace(self, **moved)

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> VLMInputs:
        """Select rows, with their images; padding is kept.

        Raises:
            IndexError: A row that does not exist, or no rows.
        """
        all_rows = torch.arange(self.batch_size)
        if isinstance(rows, int):
            row_index = all_rows[rows : rows + 1 or None]
        else:
            row_index = (
                all_rows[torch.as_tensor(rows).cpu()] if not isinstance(rows, slice) else all_rows[rows]
            )
        if len(row_index) == 0:
            raise IndexError(f"rows {rows!r} select nothing from {self.batch_size} rows")
        selected: dict[str, Any] = {}
        row_numbers: list[int] = to_list(row_index)
        for name in _BY_ROW_AND_POSITION:
            selected[name] = _take_rows(getattr(self, name), row_index)
        for name in _POSITIONS:
            if (positions := getattr(self, name)) is not None:
                selected[name] = positions[..., row_index.to(positions.device), :]
        if self.pixel_values is not None:
            selected.update(self._take_images(row_numbers))
        elif len(self.grids) == self.batch_size:
            selected["grids"] = tuple(self.grids[row] for row in row_numbers)
        for name in ("regions", "layouts"):
            if len(by_row := getattr(self, name)) == self.batch_size:
                selected[name] = tuple(by_row[row] for row in row_numbers)
        return replace(self, **selected)

    def _take_images(self, rows: list[int]) -> dict[str, object]:
        if len(self.grids) != self.batch_size:
            raise ValueError("which image is whose is the model's to say: use model.as_inputs(mapping) first")
        starts = [0]
        for row in self.grids:
            starts.append(starts[-1] + len(row))
        images = [i for row in rows for i in range(starts[row], starts[row + 1])]
        pixels, grid_thw = self.pixel_values, self.image_grid_thw
        assert pixels is not None
        sizes = [n for row in self.tower_entries for n in row]
        if grid_thw is not None:
            sizes = to_list(grid_thw.prod(-1))
        return {
            "pixel_values": _take_images_of(pixels, sizes, images) if images else None,
            "image_embeds": self._take_embeds(images),
            "image_grid_thw": None if grid_thw is None or not images else grid_thw[images],
            **self._take_pictures(rows if images else []),
            "grids": tuple(self.grids[row] for row in rows),
        }

    def _take_pictures(self, rows: list[int]) -> dict[str, Tensor | None]:
        """What is known by picture, of which each may have several grids, of these rows."""
        ends = [0, *accumulate(self.n_pictures(row) for row in range(self.batch_size))]
        sizes, groups = self.image_sizes, self.batch_num_images
        taken: dict[str, Tensor | None] = {"image_sizes": None, "batch_num_images": None}
        if sizes is not None and rows:
            taken["image_sizes"] = sizes[[i for row in rows for i in range(ends[row], ends[row + 1])]]
        if groups is not None and rows:
            of_group: list[int] = to_list(groups.cumsum(0))
            index = [i for row in rows for i, end in enumerate(of_group) if ends[row] < end <= ends[row + 1]]
            taken["batch_num_images"] = groups[index]
        return taken

    def _take_embeds(self, images: list[int]) -> Tensor | None:
        if self.image_embeds is None or not images:
            return None
        by_token = self.image_embeds.ndim == 2
        sizes = [n if by_token else 1 for row in self.image_tokens for n in row]
        return _take_images_of(self.image_embeds, sizes, images)

    def extended(self, tokens: Tensor) -> VLMInputs:
        """The same rows with text tokens [batch new] appended."""
        if tokens.shape[1] == 0:
            return self
        zeros = torch.zeros_like(tokens)
        fields: dict[str, Tensor] = {
            "input_ids": torch.cat((self.input_ids, tokens), dim=1),
            "attention_mask": torch.cat((self.attention_mask, zeros + 1), dim=1),
            "image_mask_or_none": torch.cat((self.image_mask, zeros.bool()), dim=1),
        }
        for name in ("question_mask", "answer_mask"):
            if (mask := getattr(self, name)) is not None:
                fields[name] = torch.cat((mask, zeros.bool()), dim=1)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if (types := getattr(self, name)) is not None:
                fields[name] = torch.cat((types, zeros), dim=1)
        if self.labels is not None:
            fields["labels"] = torch.cat((self.labels, zeros - 100), dim=1)
        steps = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        counted = not self.positions_are_given
        for name in _POSITIONS:
            if (positions := getattr(self, name)) is not None:
                last = positions[..., -1:]  # as Hugging Face's generate goes on behind positions it was given
                if counted:
                    last = positions.amax((0, -1))[:, None].expand_as(
                        last
                    )  # behind the larger side of an image
                fields[name] = torch.cat((positions, last + steps), dim=-1)
        return replace(self, **fields)

    def positions_for_generation(self) -> VLMInputs:
        """The same inputs, with positions as Hugging Face's `generate` counts them.

        Other than its `forward`, it doesn't count what the mask hides between two tokens; where images give
        the positions (mRoPE), neither does.
        """
        if self.positions_are_given or self.image_grid_thw is not None or not bool(self.mask_holes.any()):
            return self
        positions = (self.attention_mask.cumsum(-1) - 1).clamp(min=0)
        counted = self.position_ids
        return replace(self, position_ids=positions if counted is None else positions.expand_as(counted))

    def require_left_padding(self, purpose: str) -> None:
        """Check that every row ends in a token: for what reads the last position.

        Raises:
            ValueError: A row that is padded on the right, or inputs without a mask that no model has seen.
        """
        if self.mask_is_assumed:
            raise ValueError(_UNSEEN_MASK)
        right_padded: list[int] = to_list((self.attention_mask[:, -1] == 0).nonzero()[:, 0])
        if right_padded:
            raise ValueError(f"row {right_padded[0]} is padded on the right; pad on the left to {purpose}")

    def without_padding(self) -> VLMInputs:
        """The same rows without the leading columns that are padding in every row."""
        first = int(self.attention_mask.bool().any(0).int().argmax())
        return self._columns(slice(first, None))

    def before_answers(self) -> VLMInputs:
        """The prompts alone, of inputs that were prepared with answers, padded on the left again.

        Raises:
            ValueError: The inputs mark no answer.
        """
        if self.answer_mask is None:
            raise ValueError("inputs mark no answer: prepare(images, prompts, answers=[...])")
        return replace(self.without_last(self.answer_mask.sum(-1)), answer_mask=None).without_padding()

    def without_last(self, counts: Tensor) -> VLMInputs:
        """The same rows without the last `counts` [batch] tokens of each, padded on the left instead."""
        width = self.input_ids.shape[1]
        columns = torch.arange(width, device=counts.device)
        rolled = self._columns((columns - counts[:, None]) % width)
        wrapped = columns < counts[:, None]  # they were rolled to the front
        return replace(rolled, attention_mask=rolled.attention_mask.masked_fill(wrapped, 0))

    def _columns(self, columns: slice | Tensor) -> VLMInputs:
        """Select the same columns of every row (slice), or columns for each row (indices [batch pos])."""
        selected: dict[str, Any] = {}
        for name in (*_BY_ROW_AND_POSITION, *_POSITIONS):
            if (value := getattr(self, name)) is None:
                continue
            per_row = isinstance(columns, Tensor)
            selected[name] = value.gather(-1, columns.expand_as(value)) if per_row else value[..., columns]
        return replace(self, **selected)


def _as_mask(mask: Any, ids: Tensor) -> Tensor:
    """An attention mask of 0 and 1, [batch pos].

    Raises:
        ValueError: Another shape, or other values.
    """
    mask = torch.as_tensor(mask)
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask {list(mask.shape)} does not fit input_ids {list(ids.shape)}; masks of queries "
            "by keys are not handled"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask has values other than 0 (padding) and 1 (a token)")
    return mask.long()


def _take_images_of(values: Tensor, sizes: Sequence[int], images: Sequence[int]) -> Tensor:
    """The parts of some images; images that follow each other are a view, and take no memory."""
    if images == list(range(images[0], images[0] + len(images))):
        start = sum(sizes[: images[0]])
        return values[start : start + sum(sizes[i] for i in images)]
    parts = torch.split(values, list(sizes))
    return torch.cat([parts[i] for i in images])


def _take_rows(value: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if value is None else value[rows.to(value.device)]


ModelInput = VLMInputs | Mapping[str, Tensor] | Tensor | str | Sequence[str]
"""What a model takes: inputs, what a Hugging Face processor returns, ids [batch pos] or [pos], or text."""
