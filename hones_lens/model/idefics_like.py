"""What Idefics3 and SmolVLM share: a SigLIP tower over tiles, pixel shuffle, a LLaMA decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hones_lens.model.config import VisionConfig, VLMConfig, require
from hones_lens.model.hooked_vlm import HookedVLM
from hones_lens.model.inputs import ImageText, Region, VLMInputs
from hones_lens.model.layout import ImageLayout
from hones_lens.model.nn.tile_tower import PixelShuffle, TileEncoder
from hones_lens.model.positions import expand_positions, text_positions
from hones_lens.model.text_decoders import decoder_sizes, text_decoder
from hones_lens.model.tiles import n_tiles
from hones_lens.model.tokens import image_token_of
from hones_lens.model.typed import to_list
from hones_lens.model.vision_towers import vit_sizes
from hones_lens.model.weights import WeightMap, decoder_weights, parameters, vit_weights

_MODULES = {
    "model.vision_model.embeddings.patch_embedding": "vision_encoder.patch_embedding",
    "model.vision_model.post_layernorm": "vision_encoder.ln_post",
    "model.connector.modality_projection.proj": "vision_projector.linear",
}
_POSITIONS = "model.vision_model.embeddings.position_embedding.weight"
_VISION_TYPES = ("idefics3", "idefics3_vision", "smolvlm", "smolvlm_vision")
_FAKE, _GLOBAL, _VIDEO = "<fake_token_around_image>", "<global-img>", "<video>"


class IdeficsLike(HookedVLM):
    """Tiles of a picture, and the picture as a whole, go through the tower; squares of patches become tokens.

    Each tile, and the whole, is a grid of its own in `inputs.grids[row]`, in the order of the tokens; the
    layout's `picture` says of which picture. The markers between them are text.
    """

    more_inputs = ("pixel_attention_mask",)
    answer_separator = " "
    image_markup = "{image}"
    default_chat_template = (
        "{% for message in messages %}{{ message['role'] | capitalize }}"
        "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '<image>' }}{% endif %}"
        "{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )

    @classmethod
    def from_config(cls, hf_config: Any, name: str, device: torch.device, dtype: torch.dtype) -> IdeficsLike:
        """Build the modules without weights (on the meta device)."""
        require("config", hf_config, {"quantization_config": (None,)})
        cfg = VLMConfig(
            family=hf_config.model_type,
            model_name=name,
            image_token_id=hf_config.image_token_id,
            vision=_tower_sizes(hf_config),
            device=device,
            dtype=dtype,
            **decoder_sizes(hf_config.text_config),
        )
        vision = hf_config.vision_config
        with torch.device("meta"):
            encoder = TileEncoder(cfg.vision, vision.hidden_act, vision.layer_norm_eps)
            projector = PixelShuffle(cfg.vision.d_model, cfg.vision.merge_size, cfg.d_model)
        return cls(cfg, text_decoder(hf_config.text_config, cfg), encoder, projector)

    @classmethod
    def weight_map(cls, cfg: VLMConfig, hf_names: Sequence[str]) -> WeightMap:
        """Hugging Face name → ours."""
        names = decoder_weights(cfg.n_layers, "model.text_model") | parameters(_MODULES)
        names |= vit_weights("model.vision_model.encoder.layers", cfg.vision.n_layers)
        names[_POSITIONS] = "vision_encoder.position_embedding"
        return {name: names[name] for name in hf_names if name in names}

    def encode_images(self, inputs: VLMInputs) -> Float[Tensor, "tile token d_model"]:
        """Embeddings of the tokens of every tile."""
        assert inputs.pixel_values is not None
        return self.vision_projector(self.vision_encoder(inputs.pixel_values))

    def positions(self, inputs: VLMInputs) -> Tensor:
        """Positions [batch pos]: those given, else counted from each row's first token."""
        return text_positions(inputs) if inputs.position_ids is None else inputs.position_ids

    # -- tiles among the tokens ------------------------------------------------------------------

    @property
    def _grid(self) -> tuple[int, int]:
        side = self.cfg.vision.patches_per_side // self.cfg.vision.merge_size
        return (side, side)

    @property
    def _tokens_per_tile(self) -> int:
        return self._grid[0] * self._grid[1]

    def locate_images(self, inputs: VLMInputs) -> VLMInputs:
        """Fill in `image_mask`, `grids` and `layouts`, and check that tiles and image tokens agree.

        `mm_token_type_ids` are dropped: Hugging Face's processor marks the markers, too, and its model reads
        none.

        Raises:
            ValueError: Counts that differ, a tile cut by a row, pixels of another size or hidden by
                `pixel_attention_mask`, positions that are not [batch pos], video, or `image_grid_thw`.
        """
        if inputs.image_grid_thw is not None:
            raise ValueError(
                f"inputs key 'image_grid_thw' is not read by {self.family}, whose tiles have one size"
            )
        if inputs.position_ids is not None:
            inputs = replace(inputs, position_ids=expand_positions(inputs.position_ids, inputs, axes=1))
        self._refuse_video(inputs)
        mask, per_tile = inputs.input_ids == self.cfg.image_token_id, self._tokens_per_tile
        counts: list[int] = to_list(mask.sum(-1))
        pixels = self._tiles(inputs, sum(counts))
        n_expected = 0 if pixels is None else len(pixels) * per_tile
        if sum(counts) != n_expected:
            raise ValueError(
                f"{sum(counts)} image tokens in input_ids, but pixel_values hold "
                f"{n_expected // per_tile} tiles of {per_tile} tokens, {n_expected} in all"
            )
        for row, count in enumerate(counts):
            if count % per_tile:
                raise ValueError(f"row {row} has {count} image tokens, not a multiple of {per_tile}")
        return replace(
            inputs,
            pixel_values=pixels,
            pixel_attention_mask=None,
            pixels_by_row=True,
            mm_token_type_ids=None,
            image_mask_or_none=mask,
            grids=tuple((self._grid,) * (count // per_tile) for count in counts),
            layouts=self._layouts(inputs, mask, [count // per_tile for count in counts]),
        )

    def _layouts(
        self, inputs: VLMInputs, mask: Tensor, n_tiles_of: Sequence[int]
    ) -> tuple[tuple[ImageLayout, ...], ...]:
        """A picture ends with its whole, which a marker of its own precedes."""
        side = self.cfg.vision.patches_per_side
        first_tokens = mask & ((mask.cumsum(-1) - 1) % self._tokens_per_tile == 0)
        whole = first_tokens if (marker := self._marker_of_wholes()) else torch.zeros_like(mask)
        for steps, token in enumerate(reversed(marker), 1):
            shifted = torch.full_like(inputs.input_ids, -1)
            shifted[:, steps:] = inputs.input_ids[:, :-steps]
            whole = whole & (shifted == token)
        flags, layouts = iter(to_list(whole[first_tokens])), list[tuple[ImageLayout, ...]]()
        for n in n_tiles_of:
            of_row, picture = list[ImageLayout](), 0
            for _ in range(n):
                of_row.append(ImageLayout(picture=picture, patches=(side, side)))
                picture += int(next(flags) or not marker)
            layouts.append(tuple(of_row))
        return tuple(layouts)

    def _marker_of_wholes(self) -> list[int]:
        """The ids in front of a whole picture's tokens; without a processor none."""
        if self.processor is None:
            return []
        text = f"{self._name('fake_image_token', _FAKE)}{_GLOBAL}{image_token_of(self)}"
        return self.tokenizer(text, add_special_tokens=False).input_ids[:-1]

    def _name(self, attribute: str, default: str) -> str:
        """A special token as tokenizer or processor name it."""
        named = getattr(self.tokenizer, attribute, None) or getattr(self.processor, attribute, None)
        return named or default

    def _refuse_video(self, inputs: VLMInputs) -> None:
        if self.processor is None:
            return
        video = self.tokenizer.get_vocab().get(self._name("video_token", _VIDEO))
        if video is not None and bool((inputs.input_ids == video).any()):
            raise ValueError("the prompt has video tokens; video is not handled: give still images")

    # -- pixels ----------------------------------------------------------------------------------

    def _tiles(self, inputs: VLMInputs, n_image_tokens: int) -> Tensor | None:
        """Pixels [tile channel height width], without the tiles of zeros that pad Hugging Face's rows."""
        pixels, seen = inputs.pixel_values, inputs.pixel_attention_mask
        if pixels is None:
            if seen is not None:
                raise ValueError("pixel_attention_mask without pixel_values: there are no images")
            return None
        if seen is not None and seen.shape != (*pixels.shape[:-3], *pixels.shape[-2:]):
            raise ValueError(
                f"pixel_attention_mask {list(seen.shape)} does not fit pixel_values {list(pixels.shape)}"
            )
        if pixels.ndim == 5:
            pixels, seen = pixels.flatten(0, 1), None if seen is None else seen.flatten(0, 1)
            if len(pixels) * self._tokens_per_tile != n_image_tokens:
                real = (pixels != 0).flatten(1).any(1)
                pixels, seen = pixels[real], None if seen is None else seen[real]
        self._check_pixels(pixels)
        if seen is not None and not bool(seen.bool().all()):
            raise ValueError("pixel_attention_mask hides a part of a tile; handled: whole tiles")
        return pixels if len(pixels) else None

    def _check_pixels(self, pixels: Tensor) -> None:
        size = self.cfg.vision.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(
                f"pixel_values are {list(pixels.shape)}; this model reads tiles [n_tiles, 3, {size}, {size}]"
            )

    def process_images(self, images: Sequence[Image.Image]) -> tuple[dict[str, Any], list[ImageText]]:
        """Tiles by the checkpoint's image processor, and the text that stands for each picture."""
        tiles, texts = list[Tensor](), list[ImageText]()
        for image in images:
            made = self.image_processor([[image]], return_tensors="pt", return_row_col_info=True)
            tiles.append(made.pixel_values[0])
            self._check_pixels(tiles[-1])
            texts.append(self._text(int(made["rows"][0][0]), int(made["cols"][0][0])))
        return ({"pixel_values": torch.cat(tiles)} if tiles else {}), texts

    def _text(self, rows: int, columns: int) -> str:
        """What stands for a picture of so many tiles; none: the whole alone."""
        fake, tokens = self._name("fake_image_token", _FAKE), image_token_of(self) * self._tokens_per_tile
        of_rows = [
            "".join(f"{fake}<row_{row + 1}_col_{column + 1}>{tokens}" for column in range(columns)) + "\n"
            for row in range(rows)
        ]
        return "".join(of_rows) + ("\n" if rows else "") + f"{fake}{_GLOBAL}{tokens}{fake}"

    def pixel_rows(self, pixels: Any, texts: Sequence[ImageText]) -> list[int]:
        """How many tiles each picture has, its whole among them."""
        token = image_token_of(self)
        return [str(text).count(token) // self._tokens_per_tile for text in texts]

    def pictures(self, inputs: VLMInputs) -> list[Float[Tensor, "channel _ _"]]:
        """The pixels of every tile."""
        return [] if inputs.pixel_values is None else list(inputs.pixel_values)

    def with_pictures(self, inputs: VLMInputs, pictures: Sequence[Float[Tensor, "channel _ _"]]) -> VLMInputs:
        """The same inputs with other pixels of the tiles."""
        return replace(inputs, pixel_values=torch.stack(list(pictures)), image_embeds=None)

    def shown_regions(self, width: int, height: int) -> list[Region]:
        """What each tile, and last the whole, shows of a picture, in whole patches."""
        rows, columns = n_tiles(self.image_processor, width, height)
        tiles = [
            self._part(width / columns * column, height / rows * row, width / columns, height / rows)
            for row in range(rows)
            for column in range(columns)
        ]
        return [*tiles, self.shown_region(width, height)]

    def shown_region(self, width: int, height: int) -> Region:
        """What the whole shows: all but the pixels at the right and at the bottom that fill no patch."""
        return self._part(0.0, 0.0, float(width), float(height))

    def _part(self, left: float, top: float, width: float, height: float) -> Region:
        vision = self.cfg.vision
        assert vision.image_size is not None
        read = vision.patches_per_side * vision.patch_size / vision.image_size
        return (left, top, left + read * width, top + read * height)


def _tower_sizes(hf_config: Any) -> VisionConfig:
    """The sizes of the tower.

    Raises:
        ValueError: A value that the code does not handle; names the key.
    """
    sizes, merge = vit_sizes(hf_config.vision_config, _VISION_TYPES), hf_config.scale_factor
    side = sizes.patches_per_side
    if not side or side % merge:
        raise ValueError(f"config.scale_factor={merge} does not divide the {side} patches of a tile's side")
    return replace(sizes, merge_size=merge)
