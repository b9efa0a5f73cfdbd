"""What LLaVA and its kin share: a vision tower for pictures of one size, a projector, a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from hones_lens.model.config import VLMConfig, require
from hones_lens.model.hooked_vlm import HookedVLM
from hones_lens.model.inputs import Region, VLMInputs
from hones_lens.model.layout import PLAIN, ImageLayout
from hones_lens.model.nn.projector import Projector
from hones_lens.model.positions import check_token_types, expand_positions, text_positions
from hones_lens.model.text_decoders import decoder_sizes, text_decoder
from hones_lens.model.typed import activation_names, to_list
from hones_lens.model.vision_towers import tower_sizes, tower_weights, vision_tower
from hones_lens.model.weights import WeightMap, decoder_weights, parameters

_PROJECTOR = {
    "model.multi_modal_projector.linear_1": "vision_projector.linear_1",
    "model.multi_modal_projector.linear_2": "vision_projector.linear_2",
}


class LlavaLike(HookedVLM):
    """A CLIP or SigLIP tower, a two-layer projector, and a LLaMA, Mistral or Qwen2 decoder.

    Attributes:
        projector_class: Made of the widths of features and decoder, an activation, and whether it has biases.
        projector_weights: Hugging Face's names of the projector's modules, and ours.
    """

    projector_class: ClassVar[type[Projector]] = Projector
    projector_weights: ClassVar[dict[str, str]] = _PROJECTOR
    answer_separator = " "
    default_chat_template = (
        "{% for message in messages %}USER: "
        "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
    )

    @classmethod
    def from_config(cls, hf_config: Any, name: str, device: torch.device, dtype: torch.dtype) -> LlavaLike:
        """Build the modules without weights (on the meta device)."""
        cfg = cls.read_config(hf_config, name, device, dtype)
        with torch.device("meta"):
            encoder = vision_tower(hf_config.vision_config, cfg.vision)
            projector = cls.projector(hf_config, cfg)
        return cls(cfg, text_decoder(hf_config.text_config, cfg), encoder, projector)

    @classmethod
    def read_config(cls, hf_config: Any, name: str, device: torch.device, dtype: torch.dtype) -> VLMConfig:
        """Hugging Face's config as ours; raises ValueError for a value that the code does not handle."""
        require("config", hf_config, {"vision_feature_select_strategy": ("default", "full")})
        return llava_config(hf_config, name, device, dtype, hf_config.vision_feature_select_strategy)

    @classmethod
    def projector(cls, hf_config: Any, cfg: VLMConfig) -> nn.Module:
        """From the features of all feature layers, side by side, to the decoder's width."""
        return cls.projector_class(
            cfg.vision.d_model * len(cfg.vision.feature_layers),
            cfg.d_model,
            hf_config.projector_hidden_act,
            hf_config.multimodal_projector_bias,
        )

    @classmethod
    def weight_map(cls, cfg: VLMConfig, hf_names: Sequence[str]) -> WeightMap:
        """Hugging Face name → ours; None drops it: what lies above the highest feature layer."""
        names = decoder_weights(cfg.n_layers) | parameters(cls.projector_weights)
        names |= tower_weights("model.vision_tower", cfg.vision, hf_names)
        return {name: names[name] for name in hf_names if name in names}

    def encode_images(self, inputs: VLMInputs) -> Float[Tensor, "image token d_model"]:
        """Project the vision features of every image; the class token is dropped unless it is kept."""
        assert inputs.pixel_values is not None
        features = self.vision_encoder(inputs.pixel_values)
        vision = self.cfg.vision
        drops_first = vision.drop_first_patch or (vision.has_class_token and not vision.keep_class_token)
        return self.vision_projector(features[:, 1:] if drops_first else features)

    def positions(self, inputs: VLMInputs) -> Tensor:
        """Positions [batch pos]: those given, else counted from each row's first token."""
        return text_positions(inputs) if inputs.position_ids is None else inputs.position_ids

    def locate_images(self, inputs: VLMInputs) -> VLMInputs:
        """Fill in `image_mask` and `grids`, and check that images and image tokens agree.

        Raises:
            ValueError: Counts that differ, an image cut by a row, pixels of another size, positions that are
                not [batch pos], or `image_grid_thw`, which this family does not read.
        """
        if inputs.image_grid_thw is not None:
            raise ValueError("inputs key 'image_grid_thw' is not read by LLaVA, whose images have one size")
        if inputs.position_ids is not None:
            inputs = replace(inputs, position_ids=expand_positions(inputs.position_ids, inputs, axes=1))
        mask = inputs.input_ids == self.cfg.image_token_id
        check_token_types(inputs, mask)
        n_images = 0 if inputs.pixel_values is None else len(inputs.pixel_values)
        if inputs.pixel_values is not None:
            self._check_pixels(inputs.pixel_values)
        side, layout = self.cfg.vision.patches_per_side, self._layout
        per_image = layout.n_tokens((side, side))
        n_image_tokens, n_expected = int(mask.sum()), n_images * per_image
        if n_image_tokens != n_expected:
            raise ValueError(
                f"{n_image_tokens} image tokens in input_ids, but pixel_values hold {n_images} images of "
                f"{per_image} tokens, {n_expected} in all"
            )
        counts: list[int] = to_list(mask.sum(-1))
        for row, count in enumerate(counts):
            if count % per_image:
                raise ValueError(f"row {row} has {count} image tokens, not a multiple of {per_image}")
        images = [count // per_image for count in counts]
        return replace(
            inputs,
            image_mask_or_none=mask,
            grids=tuple(((side, side),) * n for n in images),
            layouts=() if layout == PLAIN else tuple((layout,) * n for n in images),
        )

    @property
    def _layout(self) -> ImageLayout:
        vision = self.cfg.vision
        return ImageLayout(leading=int(vision.keep_class_token), missing=int(vision.drop_first_patch))

    def _check_pixels(self, pixels: Tensor) -> None:
        size = self.cfg.vision.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(
                f"pixel_values are {list(pixels.shape)}; this model reads [n_images, 3, {size}, {size}]"
            )

    def process_images(self, images: Sequence[Image.Image]) -> tuple[dict[str, Any], list[int]]:
        """Resize, crop and normalise by the checkpoint's image processor."""
        side = self.cfg.vision.patches_per_side
        counts = [self._layout.n_tokens((side, side))] * len(images)
        if not images:
            return {}, counts
        pixels = self.image_processor(images=list(images), return_tensors="pt").pixel_values
        return {"pixel_values": pixels}, counts

    def pictures(self, inputs: VLMInputs) -> list[Float[Tensor, "channel _ _"]]:
        """The pixels as they are: one size for all."""
        return [] if inputs.pixel_values is None else list(inputs.pixel_values)

    def with_pictures(self, inputs: VLMInputs, pictures: Sequence[Float[Tensor, "channel _ _"]]) -> VLMInputs:
        """The same inputs with other pixels."""
        return replace(inputs, pixel_values=torch.stack(list(pictures)), image_embeds=None)

    def shown_region(self, width: int, height: int) -> Region:
        """What is left of a picture after the processor's crop in the middle, in whole patches."""
        processor = self.image_processor
        resized = [width, height]
        if processor.do_resize and (shortest := dict(processor.size).get("shortest_edge")):
            resized = [int(shortest * side / min(width, height)) for side in (width, height)]
        elif processor.do_resize:
            resized = [processor.size["width"], processor.size["height"]]
        crop = tuple(resized)
        if getattr(processor, "do_center_crop", False):
            crop = (processor.crop_size["width"], processor.crop_size["height"])
        (scale_x, left, right), (scale_y, top, bottom) = (
            (side / scaled, (scaled - cropped) // 2, (scaled - cropped) // 2 + cropped)
            for side, scaled, cropped in zip((width, height), resized, crop, strict=True)
        )
        vision = self.cfg.vision
        unread = crop[0] - vision.patches_per_side * vision.patch_size  # at the right and at the bottom
        return (left * scale_x, top * scale_y, (right - unread) * scale_x, (bottom - unread) * scale_y)


def llava_config(
    hf_config: Any, name: str, device: torch.device, dtype: torch.dtype, select_strategy: str
) -> VLMConfig:
    """A config with LLaVA's keys as ours.

    Raises:
        ValueError: A value that the code does not handle; names the key.
    """
    require("config", hf_config, {"quantization_config": (None,), "projector_hidden_act": activation_names()})
    return VLMConfig(
        family=hf_config.model_type,
        model_name=name,
        image_token_id=hf_config.image_token_index,
        vision=tower_sizes(hf_config.vision_config, hf_config.vision_feature_layer, select_strategy),
        device=device,
        dtype=dtype,
        **decoder_sizes(hf_config.text_config),
    )
