"""LLaVA-OneVision: as LLaVA-NeXT, large pictures pooled, several pictures of a row not cut into tiles."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import LlavaOnevisionImageProcessorPil

from hones_lens.model.anyres_like import AnyResLike, AnyResPilProcessor
from hones_lens.model.config import VLMConfig
from hones_lens.model.inputs import Region, VLMInputs


class LlavaOnevisionPilProcessor(AnyResPilProcessor):
    """Tokenizer and PIL image processor of a LLaVA-OneVision checkpoint."""

    pictures = LlavaOnevisionImageProcessorPil
    processor_class = "LlavaOnevisionProcessor"
    kept_settings: ClassVar[tuple[str, ...]] = (
        "num_image_tokens",
        "vision_feature_select_strategy",
        "image_token",
        "video_token",
        "vision_aspect_ratio",
    )


class HookedLlavaOnevision(AnyResLike):
    """`LlavaOnevisionForConditionalGeneration`, hooked.

    A picture alone in its row is cut into tiles; those of a row with several are padded to squares and read
    as wholes, with one newline behind each, as Hugging Face's processor has it.
    """

    family = "llava_onevision"
    processor_class = LlavaOnevisionPilProcessor
    more_inputs = ("image_sizes", "batch_num_images")
    whole_among_others = True
    answer_separator = ""
    default_chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    video_token_id: int

    @classmethod
    def from_config(
        cls, hf_config: Any, name: str, device: torch.device, dtype: torch.dtype
    ) -> HookedLlavaOnevision:
        """Build the modules without weights (on the meta device)."""
        model = super().from_config(hf_config, name, device, dtype)
        assert isinstance(model, HookedLlavaOnevision)
        model.video_token_id = hf_config.video_token_id
        return model

    @classmethod
    def read_config(cls, hf_config: Any, name: str, device: torch.device, dtype: torch.dtype) -> VLMConfig:
        """Hugging Face's config as ours; raises ValueError for a value that the code does not handle."""
        cfg = super().read_config(hf_config, name, device, dtype)
        ratio = re.fullmatch(r"anyres_max_(\d+)", str(hf_config.vision_aspect_ratio))
        if ratio is None or int(ratio[1]) == 0:
            raise ValueError(
                f"config.vision_aspect_ratio={hf_config.vision_aspect_ratio!r} is not handled; handled: "
                "anyres_max_ and a number"
            )
        return replace(cfg, vision=replace(cfg.vision, most_tiles=int(ratio[1])))

    def locate_images(self, inputs: VLMInputs) -> VLMInputs:
        """As LLaVA-NeXT's; raises ValueError for video tokens, too."""
        if bool((inputs.input_ids == self.video_token_id).any()):
            raise ValueError("the prompt has video tokens; video is not handled: give still images")
        return super().locate_images(inputs)

    def pooled(
        self, patches: Float[Tensor, "row column d_model"], grid: tuple[int, int]
    ) -> Float[Tensor, "_ _ d_model"]:
        """The embeddings of a grid's cells: those of the patches, or between them where cells are fewer."""
        if patches.shape[:2] == grid:
            return patches
        return F.interpolate(patches.movedim(-1, 0)[None], size=grid, mode="bilinear")[0].movedim(0, -1)

    def process_pictures(
        self, images: Sequence[Image.Image], wholes: Sequence[bool]
    ) -> tuple[dict[str, Any], list[int]]:
        """As `process_images`, of pictures of which some are read as a whole."""
        pixels, counts = list[dict[str, Any]](), list[int]()
        for image, whole in zip(images, wholes, strict=True):
            made, n_tokens = self.process_images([image])
            if whole:  # the processor leaves a picture whole that is not alone
                of_two = self.image_processor(images=[[image, image]], return_tensors="pt")
                made, n_tokens = (
                    {"pixel_values": of_two.pixel_values[0, :1], "image_sizes": of_two.image_sizes[:1]},
                    [self.n_tokens(None)],
                )
            pixels.append(made)
            counts += n_tokens
        if not pixels:
            return {}, []
        return {key: torch.cat([made[key] for made in pixels]) for key in pixels[0]}, counts

    def whole_region(self, width: int, height: int) -> Region:
        """What is read of a picture that is padded to a square: all and the padding, in whole patches."""
        side = max(width, height)
        assert self.cfg.vision.image_size is not None
        left, top = -((side - width) // 2), -((side - height) // 2)
        read = side * self.read_side / self.cfg.vision.image_size
        return (float(left), float(top), left + read, top + read)
