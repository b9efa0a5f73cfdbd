"""LLaVA: a CLIP vision tower, a two-layer projector, and a LLaMA decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hones_lens.model.config import VisionConfig, VLMConfig, require, special_ids
from hones_lens.model.hooked_vlm import HookedVLM
from hones_lens.model.inputs import Region, VLMInputs
from hones_lens.model.nn.clip import ClipEncoder
from hones_lens.model.nn.decoder import llama_decoder
from hones_lens.model.nn.projector import Projector
from hones_lens.model.nn.rotary import Rotary, rotary_frequencies
from hones_lens.model.positions import check_token_types, expand_positions, text_positions
from hones_lens.model.typed import activation_names, to_list
from hones_lens.model.weights import WeightMap, decoder_weights, parameters, vit_weights

_TOP = {
    "model.multi_modal_projector.linear_1": "vision_projector.linear_1",
    "model.multi_modal_projector.linear_2": "vision_projector.linear_2",
    "model.vision_tower.embeddings.patch_embedding": "vision_encoder.patch_embedding",
    "model.vision_tower.pre_layrnorm": "vision_encoder.ln_pre",
}
_VISION_BLOCKS = "model.vision_tower.encoder.layers"


class HookedLlava(HookedVLM):
    """`LlavaForConditionalGeneration`, hooked."""

    family = "llava"
    answer_separator = " "
    default_chat_template = (
        "{% for message in messages %}USER: "
        "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
        "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
    )

    @classmethod
    def from_config(cls, hf_config: Any, name: str, device: torch.device, dtype: torch.dtype) -> HookedLlava:
        """Build the modules without weights (on the meta device)."""
        cfg = read_config(hf_config, name, device, dtype)
        frequencies, scaling = rotary_frequencies(hf_config.text_config, cfg.d_head)
        vision = hf_config.vision_config
        with torch.device("meta"):
            encoder = ClipEncoder(cfg.vision, vision.hidden_act, vision.layer_norm_eps)
            projector = Projector(
                cfg.vision.d_model * len(cfg.vision.feature_layers),
                cfg.d_model,
                hf_config.projector_hidden_act,
                hf_config.multimodal_projector_bias,
            )
            decoder = llama_decoder(cfg, Rotary(frequencies.to(device), scaling))
        return cls(cfg, decoder, encoder, projector)

    @classmethod
    def weight_map(cls, cfg: VLMConfig, hf_names: Sequence[str]) -> WeightMap:
        """Hugging Face name → ours; None drops it: vision layers that no feature layer reads."""
        names = decoder_weights(cfg.n_layers) | parameters(_TOP)
        names |= vit_weights(_VISION_BLOCKS, cfg.vision.n_layers)
        names["model.vision_tower.embeddings.class_embedding"] = "vision_encoder.class_embedding"
        names["model.vision_tower.embeddings.position_embedding.weight"] = "vision_encoder.position_embedding"
        unused = [n for n in hf_names if n.startswith("model.vision_tower.post_layernorm.")]
        for name in hf_names:
            prefix = f"{_VISION_BLOCKS}."
            if name.startswith(prefix) and int(name[len(prefix) :].split(".")[0]) >= cfg.vision.n_layers:
                unused.append(name)
        return {name: names[name] for name in hf_names if name in names} | dict.fromkeys(unused)

    def encode_images(self, inputs: VLMInputs) -> Float[Tensor, "image token d_model"]:
        """Project the vision features of every image; the class token is dropped unless it is kept."""
        assert inputs.pixel_values is not None
        features = self.vision_encoder(inputs.pixel_values)
        return self.vision_projector(features if self.cfg.vision.keep_class_token else features[:, 1:])

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
        side = self.cfg.vision.patches_per_side
        leading = int(self.cfg.vision.keep_class_token)
        per_image = side * side + leading
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
        grids = tuple(((side, side),) * (count // per_image) for count in counts)
        return replace(inputs, image_mask_or_none=mask, grids=grids, leading_tokens=leading)

    def _check_pixels(self, pixels: Tensor) -> None:
        size = self.cfg.vision.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(
                f"pixel_values are {list(pixels.shape)}; this model reads [n_images, 3, {size}, {size}]"
            )

    def process_images(self, images: Sequence[Image.Image]) -> tuple[dict[str, Any], list[int]]:
        """Resize, crop and normalise by the checkpoint's image processor."""
        side = self.cfg.vision.patches_per_side
        counts = [side * side + int(self.cfg.vision.keep_class_token)] * len(images)
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
        """What is left of a picture after the processor's crop in the middle."""
        processor = self.image_processor
        resized = [width, height]
        if processor.do_resize and (shortest := dict(processor.size).get("shortest_edge")):
            resized = [int(shortest * side / min(width, height)) for side in (width, height)]
        elif processor.do_resize:
            resized = [processor.size["width"], processor.size["height"]]
        if not processor.do_center_crop:
            return (0.0, 0.0, float(width), float(height))
        crop = (processor.crop_size["width"], processor.crop_size["height"])
        (scale_x, left, right), (scale_y, top, bottom) = (
            (side / scaled, (scaled - cropped) // 2, (scaled - cropped) // 2 + cropped)
            for side, scaled, cropped in zip((width, height), resized, crop, strict=True)
        )
        return (left * scale_x, top * scale_y, right * scale_x, bottom * scale_y)


def read_config(hf_config: Any, name: str, device: torch.device, dtype: torch.dtype) -> VLMConfig:
    """A `LlavaConfig` as ours.

    Raises:
        ValueError: A value that the code does not handle; names the key.
    """
    text, vision = hf_config.text_config, hf_config.vision_config
    require("config", hf_config, {"vision_feature_select_strategy": ("default", "full")})
    require("config", hf_config, {"quantization_config": (None,), "projector_hidden_act": activation_names()})
    require("vision_config", vision, {"model_type": ("clip_vision_model",), "num_channels": (3,)})
    require("vision_config", vision, {"hidden_act": activation_names()})
    handled = {"model_type": ("llama",), "attention_bias": (False,), "mlp_bias": (False,)}
    require("text_config", text, {**handled, "pretraining_tp": (1, None), "hidden_act": activation_names()})
    require("text_config", text, {"sliding_window": (None,), "attention_dropout": (0, 0.0)})
    if not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
        raise ValueError(
            f"vision_config.image_size={vision.image_size!r} is not handled; handled: one integer"
        )
    layers = hf_config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else list(layers)
    if not layers:
        raise ValueError("config.vision_feature_layer=[] is not handled; handled: one layer or more")
    n_states = vision.num_hidden_layers + 1
    for layer in layers:
        if not -n_states <= layer < n_states:
            raise ValueError(f"config.vision_feature_layer={layer} is outside the {n_states} hidden states")
    feature_layers = tuple(layer % n_states for layer in layers)
    eos, pad = special_ids(text)
    return VLMConfig(
        family="llava",
        model_name=name,
        n_layers=text.num_hidden_layers,
        n_heads=text.num_attention_heads,
        n_key_value_heads=text.num_key_value_heads,
        d_model=text.hidden_size,
        d_head=text.head_dim,
        d_mlp=text.intermediate_size,
        d_vocab=text.vocab_size,
        n_ctx=text.max_position_embeddings,
        act_fn=text.hidden_act,
        eps=text.rms_norm_eps,
        image_token_id=hf_config.image_token_index,
        eos_token_ids=eos,
        pad_token_id=pad,
        vision=VisionConfig(
            n_layers=max(feature_layers),
            n_heads=vision.num_attention_heads,
            d_model=vision.hidden_size,
            d_head=vision.hidden_size // vision.num_attention_heads,
            d_mlp=vision.intermediate_size,
            patch_size=vision.patch_size,
            image_size=vision.image_size,
            feature_layers=feature_layers,
            keep_class_token=hf_config.vision_feature_select_strategy == "full",
        ),
        device=device,
        dtype=dtype,
    )
