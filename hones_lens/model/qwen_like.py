"""What Qwen2-VL, Qwen2.5-VL and Qwen3-VL share: a tower with 2-D rotary positions, a merger, mRoPE.

Images keep their own size, so the tower sees a padded batch: [image patch …], patches in raster
order, padding behind them. Hugging Face's order (squares of patches that become one token, and
windows) is undone on the way in, so every hook has raster order, whatever attends to what.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

from hones_lens.model.config import VisionConfig, VLMConfig, require, require_integers, special_ids
from hones_lens.model.hooked_vlm import HookedVLM
from hones_lens.model.inputs import ModelInput, VLMInputs
from hones_lens.model.nn.block import Block
from hones_lens.model.nn.decoder import Decoder, llama_decoder
from hones_lens.model.nn.mrope import mrope_positions
from hones_lens.model.nn.patch_tower import PatchMerger, PatchTower
from hones_lens.model.nn.patches import PatchLayout, PatchShape, pack_pictures, unpack_patches
from hones_lens.model.nn.rotary import Rotary, rotary_frequencies
from hones_lens.model.pil_processor import PilProcessor
from hones_lens.model.positions import check_token_types, expand_positions
from hones_lens.model.typed import activation_names, to_list
from hones_lens.model.weights import WeightMap, decoder_weights, parameters

VISION_EPS = 1e-6  # not in the config: Hugging Face's code has this number
VISION_THETA = 10000.0
_PATCHES = {"model.visual.patch_embed.proj": "vision_encoder.patch_embedding"}
_MERGER = {
    "model.visual.merger.ln_q": "vision_projector.ln",
    "model.visual.merger.mlp.0": "vision_projector.linear_1",
    "model.visual.merger.mlp.2": "vision_projector.linear_2",
}


class QwenProcessor(PilProcessor):
    """Tokenizer and PIL image processor of a Qwen checkpoint; its options bound the size of a picture."""

    pictures = Qwen2VLImageProcessorPil


class QwenLike(HookedVLM):
    """A tower over packed patches, a merger, and a decoder with positions in time, row and column.

    Attributes:
        text_type, vision_type: `model_type` of the configs of the parts.
        tower_weights: Hugging Face's names of the modules of a tower block, and ours.
        merger_weights: Hugging Face's names of the modules of the merger, and ours.
        sections_take_turns: Whether the frequencies of the axes are interleaved (`Rotary`).
    """

    text_type: ClassVar[str]
    vision_type: ClassVar[str]
    tower_weights: ClassVar[dict[str, tuple[str, ...]]]
    merger_weights: ClassVar[dict[str, str]] = _MERGER
    sections_take_turns: ClassVar[bool] = False
    processor_class = QwenProcessor
    processor_options = ("min_pixels", "max_pixels")
    video_token_id: int
    image_markup = "<|vision_start|>{image}<|vision_end|>"
    default_chat_template = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    @classmethod
    def from_config(cls, hf_config: Any, name: str, device: torch.device, dtype: torch.dtype) -> QwenLike:
        """Build the modules without weights (on the meta device)."""
        cfg = cls.read_config(hf_config, name, device, dtype)
        text, vision = hf_config.text_config, hf_config.vision_config
        frequencies, scaling = rotary_frequencies(text, cfg.d_head)
        sections = _sections(text, cfg.d_head)
        rotary = Rotary(frequencies.to(device), scaling, sections, interleaved=cls.sections_take_turns)
        with torch.device("meta"):
            encoder, projector = cls.tower(vision, cfg), cls.merger(cfg)
            decoder = cls.decoder(text, cfg, rotary)
        model = cls(cfg, decoder, encoder, projector)
        model.video_token_id = hf_config.video_token_id
        return model

    @classmethod
    def read_config(cls, hf_config: Any, name: str, device: torch.device, dtype: torch.dtype) -> VLMConfig:
        """Hugging Face's config as ours; raises ValueError for a value that the code does not handle."""
        text = hf_config.text_config
        d_head = cls.head_width(text)
        cls._check(hf_config, d_head)
        vision = cls.tower_sizes(hf_config.vision_config, text.hidden_size)
        eos, pad = special_ids(text)
        return VLMConfig(
            family=cls.family,
            model_name=name,
            n_layers=text.num_hidden_layers,
            n_heads=text.num_attention_heads,
            n_key_value_heads=text.num_key_value_heads,
            d_model=text.hidden_size,
            d_head=d_head,
            d_mlp=text.intermediate_size,
            d_vocab=text.vocab_size,
            n_ctx=text.max_position_embeddings,
            act_fn=text.hidden_act,
            eps=text.rms_norm_eps,
            image_token_id=hf_config.image_token_id,
            eos_token_ids=eos,
            pad_token_id=pad,
            vision=vision,
            device=device,
            dtype=dtype,
            n_deepstack=len(vision.feature_layers) - 1,
        )

    @classmethod
    def head_width(cls, text: Any) -> int:
        """Width of a head of the decoder."""
        return text.hidden_size // text.num_attention_heads

    @classmethod
    def _check(cls, hf_config: Any, d_head: int) -> None:
        text, vision = hf_config.text_config, hf_config.vision_config
        require("config", hf_config, {"quantization_config": (None,)})
        require("text_config", text, {"model_type": (cls.text_type,), "hidden_act": activation_names()})
        require("text_config", text, {"use_sliding_window": (False, None), "attention_dropout": (0, 0.0)})
        require("text_config", text, {"head_dim": (None, d_head)})
        require("vision_config", vision, {"model_type": (cls.vision_type,), "hidden_act": activation_names()})
        require("vision_config", vision, {"in_channels": (3,)})
        require_integers("vision_config", vision, ("patch_size", "temporal_patch_size"))
        rope: dict[str, Any] = vision.rope_parameters or {}
        if rope.get("rope_type") != "axial" or rope.get("rope_theta") != VISION_THETA:
            raise ValueError(
                f"vision_config.rope_parameters={rope!r} is not handled; handled: axial, {VISION_THETA}"
            )

    @classmethod
    @abstractmethod
    def tower_sizes(cls, vision: Any, d_model: int) -> VisionConfig:
        """The tower's sizes, from Hugging Face's config; raises ValueError for what is not handled."""

    @classmethod
    @abstractmethod
    def tower_blocks(cls, cfg: VisionConfig, act: str) -> list[Block]:
        """The tower's blocks."""

    @classmethod
    def tower(cls, vision: Any, cfg: VLMConfig) -> PatchTower:
        """The vision tower."""
        blocks = cls.tower_blocks(cfg.vision, vision.hidden_act)
        return PatchTower(cfg.vision, cls.patch_shape(vision), blocks, VISION_THETA)

    @classmethod
    def patch_shape(cls, vision: Any) -> PatchShape:
        """The shape of a patch."""
        return PatchShape(
            vision.spatial_merge_size, vision.in_channels, vision.temporal_patch_size, vision.patch_size
        )

    @classmethod
    @abstractmethod
    def merger(cls, cfg: VLMConfig) -> PatchMerger:
        """What maps the patches to image embeddings."""

    @classmethod
    def decoder(cls, text: Any, cfg: VLMConfig, rotary: Rotary) -> Decoder:
        """The decoder's modules."""
        return llama_decoder(cfg, rotary, qkv_bias=True)

    @classmethod
    def weight_map(cls, cfg: VLMConfig, hf_names: Sequence[str]) -> WeightMap:
        """Hugging Face name → ours; the tower's fused QKV is three row blocks."""
        names = decoder_weights(cfg.n_layers) | parameters(_PATCHES | cls.merger_weights)
        for layer in range(cfg.vision.n_layers):
            for hf_name, our_names in cls.tower_weights.items():
                for suffix in ("weight", "bias"):
                    targets = tuple(
                        f"vision_encoder.blocks.{layer}.{our_name}.{suffix}" for our_name in our_names
                    )
                    names[f"model.visual.blocks.{layer}.{hf_name}.{suffix}"] = targets
        return {name: names[name] for name in hf_names if name in names}

    def encode_images(self, inputs: VLMInputs) -> Float[Tensor, "image_token d_model"]:
        """Embeddings of all images' tokens, image after image."""
        layout = self._layout(inputs)
        return self.vision_projector(self.vision_encoder(inputs.pixel_values, layout), layout)

    def vision_windows(self, inputs: ModelInput) -> Int[Tensor, "image window place"]:
        """The patches of each window, by number in raster order of their image; -1 where there is none.

        In all blocks but those of `cfg.vision.full_attention_layers`, `vision_encoder.blocks.{l}.attn`'s
        scores and pattern are [image window head query key], queries and keys at these places.

        Raises:
            ValueError: Inputs without pictures, or a tower without windows.
        """
        located = self.as_inputs(inputs)
        if located.pixel_values is None:
            raise ValueError("the inputs have no pictures, so no windows")
        assert isinstance(self.vision_encoder, PatchTower)
        if (side := self.vision_encoder.window_side) is None:
            raise ValueError("the vision tower of this checkpoint attends to whole pictures in every block")
        layout = self._layout(located)
        windows = layout.windows(side)
        return torch.where(windows.real, windows.members % layout.is_patch.shape[1], -1)

    def _layout(self, inputs: VLMInputs) -> PatchLayout:
        assert inputs.pixel_values is not None and inputs.image_grid_thw is not None
        thw: list[list[int]] = to_list(inputs.image_grid_thw)
        grids = [(rows, columns) for _, rows, columns in thw]
        return PatchLayout(grids, self.cfg.vision.merge_size, inputs.pixel_values.device)

    def positions(self, inputs: VLMInputs) -> Int[Tensor, "3 batch pos"]:
        """Positions in time, row and column (`locate_images` fills them in)."""
        assert inputs.position_ids is not None
        return inputs.position_ids

    def locate_images(self, inputs: VLMInputs) -> VLMInputs:
        """Fill in `image_mask`, `grids` and `position_ids`, and check that images and tokens agree.

        Raises:
            ValueError: Counts that differ, an image cut by a row or hidden in part by the mask, pixels that
                don't fit their grids, positions of another shape than [3 batch pos] or [batch pos], video.
        """
        mask = inputs.input_ids == self.cfg.image_token_id
        if bool((inputs.input_ids == self.video_token_id).any()):
            raise ValueError("the prompt has video tokens; video is not handled: give still images")
        check_token_types(inputs, mask)
        hidden: list[int] = to_list((mask & (inputs.attention_mask == 0)).sum(-1))
        if any(hidden):
            row, n = next((row, n) for row, n in enumerate(hidden) if n)
            raise ValueError(
                f"row {row}: attention_mask hides {n} image tokens, which leaves no positions for the others"
            )
        token_grids = self._token_grids(inputs)
        n_image_tokens, n_expected = int(mask.sum()), sum(rows * columns for rows, columns in token_grids)
        if n_image_tokens != n_expected:
            raise ValueError(
                f"{n_image_tokens} image tokens in input_ids, but pixel_values hold {len(token_grids)} "
                f"images of {n_expected} tokens in all"
            )
        counts: list[int] = to_list(mask.sum(-1))
        grids: list[tuple[tuple[int, int], ...]] = []
        n_assigned = 0
        for row, count in enumerate(counts):
            row_grids: list[tuple[int, int]] = []
            while (remaining := count - sum(r * c for r, c in row_grids)) > 0:
                row_grids.append(token_grids[n_assigned + len(row_grids)])
                if row_grids[-1][0] * row_grids[-1][1] > remaining:
                    raise ValueError(f"row {row} ends within image {n_assigned + len(row_grids) - 1}")
            n_assigned += len(row_grids)
            grids.append(tuple(row_grids))
        located = replace(
            inputs, image_mask_or_none=mask, grids=tuple(grids), mm_token_type_ids=mask.to(torch.int)
        )
        if inputs.position_ids is not None and inputs.positions_are_given:
            return replace(located, position_ids=expand_positions(inputs.position_ids, inputs, axes=3))
        counted = mrope_positions(located)
        return replace(located, position_ids=counted, counted_position_ids=counted)

    def _token_grids(self, inputs: VLMInputs) -> list[tuple[int, int]]:
        if inputs.pixel_values is None:
            if inputs.image_grid_thw is not None:
                raise ValueError("image_grid_thw without pixel_values: there are no images")
            return []
        merge, shape = self.cfg.vision.merge_size, self._patch_shape
        if inputs.image_grid_thw is None:
            raise ValueError("pixel_values without image_grid_thw: the size of the images is not known")
        grids: list[list[int]] = to_list(inputs.image_grid_thw)
        patches = sum(time * rows * columns for time, rows, columns in grids)
        width = shape.channels * shape.frames * shape.side**2
        if inputs.pixel_values.shape != (patches, width):
            raise ValueError(
                f"pixel_values are {list(inputs.pixel_values.shape)}; image_grid_thw asks for "
                f"[{patches}, {width}]"
            )
        for i, (time, rows, columns) in enumerate(grids):
            if time != 1:
                raise ValueError(f"image {i} has {time} frames; video is not handled: give still images")
            if rows % merge or columns % merge:
                raise ValueError(f"image {i} has {rows} × {columns} patches, which {merge} does not divide")
        return [(rows // merge, columns // merge) for _, rows, columns in grids]

    def process_images(self, images: Sequence[Image.Image]) -> tuple[dict[str, Any], list[int]]:
        """Resize within the processor's bounds on pixels, normalise, cut into patches."""
        if not images:
            return {}, []
        processed = self.image_processor(images=list(images), return_tensors="pt")
        counts = (processed.image_grid_thw.prod(-1) // self.cfg.vision.merge_size**2).tolist()
        return {"pixel_values": processed.pixel_values, "image_grid_thw": processed.image_grid_thw}, counts

    def pictures(self, inputs: VLMInputs) -> list[Float[Tensor, "channel _ _"]]:
        """Pictures reassembled from patches, from the first of each patch's identical frames."""
        if inputs.pixel_values is None or inputs.image_grid_thw is None:
            return []
        return unpack_patches(inputs.pixel_values, inputs.image_grid_thw, self._patch_shape)

    def with_pictures(self, inputs: VLMInputs, pictures: Sequence[Float[Tensor, "channel _ _"]]) -> VLMInputs:
        """The same inputs with other pictures, cut into patches in Hugging Face's order."""
        packed = pack_pictures(pictures, self._patch_shape)
        return replace(inputs, pixel_values=packed, image_embeds=None)

    @property
    def _patch_shape(self) -> PatchShape:
        assert isinstance(self.vision_encoder, PatchTower)
        return self.vision_encoder.shape


def _sections(text: Any, d_head: int) -> tuple[int, ...]:
    sections = tuple(text.rope_parameters.get("mrope_section", (16, 24, 24)))
    if sum(sections) != d_head // 2:
        raise ValueError(
            f"text_config.mrope_section={sections} does not add up to d_head / 2 = {d_head // 2}"
        )
    return sections
