"""What LLaVA-NeXT and LLaVA-OneVision share: LLaVA with pictures of any resolution, cut into tiles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hones_lens.model.config import VisionConfig, VLMConfig, require
from hones_lens.model.inputs import ImageText, Region, VLMInputs
from hones_lens.model.layout import ImageLayout
from hones_lens.model.llava_like import LlavaLike, llava_config
from hones_lens.model.nn.projector import NewlineProjector
from hones_lens.model.pil_processor import PilProcessor
from hones_lens.model.positions import check_token_types, expand_positions
from hones_lens.model.tiling import Tiling, tiling_of
from hones_lens.model.typed import to_list
from hones_lens.model.weights import WeightMap

_STRATEGY = {
    "clip_vision_model": "default",
    "siglip_vision_model": "full",
}  # such that patches alone are left


class AnyResPilProcessor(PilProcessor):
    """Tokenizer and PIL image processor of such a checkpoint."""

    kept_settings: ClassVar[tuple[str, ...]] = (
        "patch_size",
        "vision_feature_select_strategy",
        "num_additional_image_tokens",
        "image_token",
    )


class AnyResLike(LlavaLike):
    """The picture as a whole, and the tiles of a larger copy of it, go through the tower.

    In `inputs.grids[row]` a picture has two grids: the whole, squeezed into one tile, and that of all tiles
    put together, without the patches that are padding, and with a newline behind each row. The layout's
    `picture` says of which picture a grid is. `hook_image_embed` sees [image_token d_model], newlines too.
    """

    more_inputs = ("image_sizes",)
    projector_class = NewlineProjector

    @classmethod
    def read_config(cls, hf_config: Any, name: str, device: torch.device, dtype: torch.dtype) -> VLMConfig:
        """Hugging Face's config as ours; raises ValueError for a value that the code does not handle."""
        require("vision_config", hf_config.vision_config, {"model_type": tuple(_STRATEGY)})
        strategy = _STRATEGY[hf_config.vision_config.model_type]
        require("config", hf_config, {"vision_feature_select_strategy": (strategy,)})
        cfg = llava_config(hf_config, name, device, dtype, strategy)
        return replace(cfg, vision=replace(cfg.vision, tile_sizes=_tile_sizes(hf_config, cfg.vision)))

    @classmethod
    def weight_map(cls, cfg: VLMConfig, hf_names: Sequence[str]) -> WeightMap:
        """As LLaVA's, and the newline's embedding."""
        newline: WeightMap = {"model.image_newline": "vision_projector.newline"}
        return super().weight_map(cfg, hf_names) | {
            name: newline[name] for name in hf_names if name in newline
        }

    # -- tiles among the tokens ------------------------------------------------------------------

    def encode_images(self, inputs: VLMInputs) -> Float[Tensor, "image_token d_model"]:
        """Embeddings of the tokens of all grids, one after the other, newlines among them."""
        tiles: Tensor = super().encode_images(inputs)
        newline: Tensor = self.vision_projector.newline  # pyright: ignore[reportAssignmentType]
        parts, start = list[Tensor](), 0
        for row, grids in enumerate(inputs.grids):
            for image, grid in enumerate(grids):
                layout = inputs.layout(row, image)
                places = layout.patch_places(layout.patches or grid).to(tiles.device)
                patches = tiles[start : start + layout.entries].flatten(0, 1)[places]
                parts.append(_with_newlines(self.pooled(patches, grid), newline, layout))
                start += layout.entries
        return torch.cat(parts)

    def pooled(
        self, patches: Float[Tensor, "row column d_model"], grid: tuple[int, int]
    ) -> Float[Tensor, "_ _ d_model"]:
        """The embeddings of the cells of a grid, one for each patch."""
        return patches

    def locate_images(self, inputs: VLMInputs) -> VLMInputs:
        """Fill in `image_mask`, `grids` and `layouts`, and check that tiles and image tokens agree.

        Raises:
            ValueError: Counts that differ, a picture cut by a row, pixels of another size or without
                `image_sizes`, positions that are not [batch pos], or `image_grid_thw`.
        """
        if inputs.image_grid_thw is not None:
            raise ValueError(f"inputs key 'image_grid_thw' is not read by {self.family}, give 'image_sizes'")
        if inputs.position_ids is not None:
            inputs = replace(inputs, position_ids=expand_positions(inputs.position_ids, inputs, axes=1))
        mask = inputs.input_ids == self.cfg.image_token_id
        check_token_types(inputs, mask)
        pictures = self._cut(inputs)
        counts: list[int] = to_list(mask.sum(-1))
        n_expected = sum(self.n_tokens(picture) for picture in pictures)
        if sum(counts) != n_expected:
            raise ValueError(
                f"{sum(counts)} image tokens in input_ids, but image_sizes have {len(pictures)} pictures of "
                f"{n_expected} tokens in all"
            )
        by_row = self._by_row(pictures, counts)
        _check_groups(inputs, list(map(len, by_row)))
        return replace(
            inputs,
            batch_num_images=inputs.batch_num_images if pictures else None,
            pixel_values=self._tiles(inputs, pictures),
            image_sizes=torch.as_tensor(inputs.image_sizes) if pictures else None,
            image_mask_or_none=mask,
            grids=tuple(tuple(grid for p in row for grid, _ in self._grids(p, 0)) for row in by_row),
            layouts=tuple(
                tuple(layout for i, p in enumerate(row) for _, layout in self._grids(p, i)) for row in by_row
            ),
        )

    def _grids(self, picture: Tiling | None, number: int) -> list[tuple[tuple[int, int], ImageLayout]]:
        """The grids of a picture that has this number in its row; None: it is not cut."""
        side = self.cfg.vision.patches_per_side
        if picture is None:
            return [((side, side), ImageLayout(trailing=1, picture=number))]
        return [((side, side), ImageLayout(picture=number)), (picture.grid, picture.layout(number))]

    def n_tokens(self, picture: Tiling | None) -> int:
        """How many image tokens a picture has."""
        return sum(layout.n_tokens(grid) for grid, layout in self._grids(picture, 0))

    def _n_entries(self, picture: Tiling | None) -> int:
        return sum(layout.entries for _, layout in self._grids(picture, 0))

    def _cut(self, inputs: VLMInputs) -> list[Tiling | None]:
        """How each picture is cut; None: it is not."""
        if inputs.pixel_values is None:
            if inputs.image_sizes is not None and len(inputs.image_sizes):
                raise ValueError("image_sizes without pixel_values: there are no images")
            return []
        if inputs.image_sizes is None:
            raise ValueError("pixel_values without image_sizes: the size of the images is not known")
        sizes = torch.as_tensor(inputs.image_sizes)
        if sizes.ndim != 2 or sizes.shape[1] != 2:
            raise ValueError(f"image_sizes are {list(sizes.shape)}; this model reads [n_images, 2]")
        pairs: list[list[int]] = to_list(sizes)
        return [
            None if whole else tiling_of((height, width), self.cfg.vision)
            for (height, width), whole in zip(pairs, _wholes(inputs, len(pairs)), strict=True)
        ]

    def _by_row(self, pictures: Sequence[Tiling | None], counts: Sequence[int]) -> list[list[Tiling | None]]:
        """The pictures of each row, by its number of image tokens; these are as many in all."""
        by_row, left = list[list[Tiling | None]](), iter(pictures)
        for row, count in enumerate(counts):
            of_row = list[Tiling | None]()
            while (rest := count - sum(map(self.n_tokens, of_row))) > 0:
                of_row.append(next(left))
                if self.n_tokens(of_row[-1]) > rest:
                    raise ValueError(f"row {row} ends within image {sum(map(len, by_row)) + len(of_row) - 1}")
            by_row.append(of_row)
        return by_row

    # -- pixels ----------------------------------------------------------------------------------

    def _tiles(self, inputs: VLMInputs, pictures: Sequence[Tiling | None]) -> Tensor | None:
        """Pixels [tile channel height width], without the tiles of zeros that pad Hugging Face's pictures."""
        pixels, entries = inputs.pixel_values, [self._n_entries(picture) for picture in pictures]
        if pixels is None or not pictures:
            return None
        if pixels.ndim == 5:
            if len(pixels) != len(pictures) or pixels.shape[1] < max(entries):
                raise ValueError(
                    f"pixel_values are {list(pixels.shape)}; image_sizes ask for [{len(pictures)}, "
                    f"{max(entries)} or more, …]"
                )
            pixels = torch.cat([of_picture[:n] for of_picture, n in zip(pixels, entries, strict=True)])
        side = self.cfg.vision.image_size
        if pixels.shape != (sum(entries), 3, side, side):
            raise ValueError(
                f"pixel_values are {list(pixels.shape)}; image_sizes ask for tiles "
                f"{[sum(entries), 3, side, side]}"
            )
        return pixels

    def process_images(self, images: Sequence[Image.Image]) -> tuple[dict[str, Any], list[int]]:
        """Tiles by the checkpoint's image processor, and the number of image tokens of each picture.

        Raises:
            ValueError: The image processor makes other tiles than the config says.
        """
        if not images:
            return {}, []
        self._check_processor()
        made = [self.image_processor(images=[image], return_tensors="pt") for image in images]
        counts = [self.n_tokens(tiling_of((image.height, image.width), self.cfg.vision)) for image in images]
        tiles = torch.cat([pixels.pixel_values[0] for pixels in made])
        return {"pixel_values": tiles, "image_sizes": torch.cat([m.image_sizes for m in made])}, counts

    def _check_processor(self) -> None:
        """Raise ValueError if the image processor cuts otherwise than the config says."""
        processor, vision = self.image_processor, self.cfg.vision
        tile, found = vision.image_size, tuple(tuple(size) for size in processor.image_grid_pinpoints)
        if found != vision.tile_sizes:
            raise ValueError(
                f"the image processor's image_grid_pinpoints={list(map(list, found))} are not those of the "
                f"config, {list(map(list, vision.tile_sizes))}"
            )
        sides: set[int] = set(dict(processor.size).values())
        if processor.do_center_crop:
            sides |= set(dict(processor.crop_size).values())
        if sides - {None} != {tile}:
            raise ValueError(
                f"the image processor's size={dict(processor.size)} and crop_size={processor.crop_size} are "
                f"not handled; handled: the side of the tower's images, {tile}"
            )

    def pixel_rows(self, pixels: Mapping[str, Tensor], texts: Sequence[ImageText]) -> list[int]:
        """How many tiles each picture has, its whole among them."""
        sizes: list[list[int]] = to_list(pixels["image_sizes"])
        whole = self.n_tokens(None)
        return [
            1 if text == whole else self._n_entries(tiling_of((height, width), self.cfg.vision))
            for text, (height, width) in zip(texts, sizes, strict=True)
        ]

    def pictures(self, inputs: VLMInputs) -> list[Float[Tensor, "channel _ _"]]:
        """The pixels of each grid that the tower reads; the tiles of a picture are put together."""
        if inputs.pixel_values is None:
            return []
        side, found = self.read_side, list[Tensor]()
        for tiles, picture in self._split(inputs):
            found.append(tiles[0, :, :side, :side] if picture is None else picture.stitched(tiles))
        return found

    def with_pictures(self, inputs: VLMInputs, pictures: Sequence[Float[Tensor, "channel _ _"]]) -> VLMInputs:
        """The same inputs with other pixels of the grids; padding stays."""
        side, parts = self.read_side, list[Tensor]()
        for (tiles, picture), pixels in zip(self._split(inputs), pictures, strict=True):
            if picture is not None:
                parts.append(picture.with_stitched(tiles, pixels))
                continue
            parts.append(tiles.clone())
            parts[-1][0, :, :side, :side] = pixels
        return replace(inputs, pixel_values=torch.cat(parts), image_embeds=None)

    def _split(self, inputs: VLMInputs) -> Iterator[tuple[Tensor, Tiling | None]]:
        """The tiles of each grid, and how they are put together; None where it has one."""
        assert inputs.pixel_values is not None
        start = 0
        for picture in self._cut(inputs):
            for _, layout in self._grids(picture, 0):
                tiles = inputs.pixel_values[start : start + layout.entries]
                yield tiles, picture if layout.tile else None
                start += layout.entries

    @property
    def read_side(self) -> int:
        """Pixels of a tile's side that fill a patch."""
        return self.cfg.vision.patches_per_side * self.cfg.vision.patch_size

    def shown_regions(self, width: int, height: int) -> list[Region]:
        """What the whole and the tiles show of a picture, in whole patches."""
        return [self.shown_region(width, height), tiling_of((height, width), self.cfg.vision).region()]

    def shown_region(self, width: int, height: int) -> Region:
        """What the whole shows: all but the pixels at the right and at the bottom that fill no patch."""
        assert self.cfg.vision.image_size is not None
        read = self.read_side / self.cfg.vision.image_size
        return (0.0, 0.0, width * read, height * read)


def _with_newlines(
    cells: Float[Tensor, "row column d_model"], newline: Float[Tensor, " d_model"], layout: ImageLayout
) -> Float[Tensor, "token d_model"]:
    """The tokens of a grid in their order."""
    of_rows = newline.to(cells.dtype).expand(cells.shape[0], layout.row_end, -1)
    tokens = torch.cat((cells, of_rows), dim=1).flatten(0, 1)
    return torch.cat((tokens, newline.to(cells.dtype).expand(layout.trailing, -1)))


def _wholes(inputs: VLMInputs, n_pictures: int) -> list[bool]:
    """Which pictures are not cut: those of groups of several in `batch_num_images`.

    Raises:
        ValueError: Groups of more or fewer pictures.
    """
    if inputs.batch_num_images is None:
        return [False] * n_pictures
    counts: list[int] = to_list(torch.as_tensor(inputs.batch_num_images))
    if sum(counts) != n_pictures:
        raise ValueError(f"batch_num_images={counts} have {sum(counts)} pictures, image_sizes {n_pictures}")
    return [count != 1 for count in counts for _ in range(count)]


def _check_groups(inputs: VLMInputs, n_pictures: Sequence[int]) -> None:
    """Raise ValueError if a group of `batch_num_images` has pictures of several rows."""
    if inputs.batch_num_images is None:
        return
    counts: list[int] = to_list(torch.as_tensor(inputs.batch_num_images))
    ends, rows = set(accumulate(counts)), list(accumulate(n_pictures))
    for row, end in enumerate(rows):
        if end and end not in ends:
            raise ValueError(f"batch_num_images={counts} put pictures of row {row} and the next together")


def _tile_sizes(hf_config: Any, vision: VisionConfig) -> tuple[tuple[int, int], ...]:
    """The sizes to which pictures are brought.

    Raises:
        ValueError: No size, or one that is no whole number of tiles.
    """
    sizes, tile = hf_config.image_grid_pinpoints, vision.image_size
    assert tile is not None
    if not sizes or any(side <= 0 or side % tile for size in sizes for side in size):
        raise ValueError(
            f"config.image_grid_pinpoints={sizes} are not handled; handled: multiples of the side of a tile, "
            f"{tile}"
        )
    return tuple((height, width) for height, width in sizes)
