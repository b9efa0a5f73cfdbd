"""Gemma 3: a SigLIP tower whose patches are pooled, and a decoder whose image tokens see each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from transformers import Gemma3ImageProcessorPil

from hones_lens.model.config import VisionConfig, VLMConfig, require, require_integers, special_ids
from hones_lens.model.hooked_vlm import HookedVLM
from hones_lens.model.inputs import ImageText, Region, VLMInputs
from hones_lens.model.layout import ImageLayout
from hones_lens.model.nn.attention import Attention
from hones_lens.model.nn.block import Block
from hones_lens.model.nn.decoder import Decoder
from hones_lens.model.nn.mlp import GatedMLP
from hones_lens.model.nn.norm import OffsetRMSNorm
from hones_lens.model.nn.projector import PoolingProjector
from hones_lens.model.nn.rotary import Rotary, rotary_frequencies
from hones_lens.model.nn.siglip import NormedSiglip
from hones_lens.model.nn.unembed import Unembed
from hones_lens.model.pil_processor import PilProcessor
from hones_lens.model.positions import check_token_types, expand_positions, text_positions
from hones_lens.model.tokens import image_token_of
from hones_lens.model.typed import activation_names, to_list
from hones_lens.model.vision_towers import tower_weights, vit_sizes
from hones_lens.model.weights import WeightMap, decoder_weights, parameters

_KINDS = ("sliding_attention", "full_attention")
_TEXT = {
    "model_type": ("gemma3_text",),
    "attention_bias": (False, None),
    "attention_dropout": (0, 0.0, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (False, None),
}
# Names of Hugging Face's norms in a block, and ours; they are `1 + weight`.
_NORMS = {
    "input_layernorm": "ln1",
    "post_attention_layernorm": "ln1_post",
    "pre_feedforward_layernorm": "ln2",
    "post_feedforward_layernorm": "ln2_post",
    "self_attn.q_norm": "attn.q_norm",
    "self_attn.k_norm": "attn.k_norm",
}
_TOWER, _PROJECTOR = "model.vision_tower", "model.multi_modal_projector"


class Gemma3PilProcessor(PilProcessor):
    """Tokenizer and PIL image processor of a Gemma 3 checkpoint."""

    pictures = Gemma3ImageProcessorPil
    processor_class = "Gemma3Processor"


class HookedGemma3(HookedVLM):
    """`Gemma3ForConditionalGeneration`, hooked.

    Image tokens that follow each other see each other, also those behind them; so they do in Hugging Face's
    model where `token_type_ids` are 1, which its processor returns.

    Attributes:
        marker_ids: The tokens in front of an image's tokens, and behind them.
    """

    family = "gemma3"
    processor_class = Gemma3PilProcessor
    reads_token_types = True
    image_markup = "{image}"
    marker_ids: tuple[int, int]
    default_chat_template = (
        "{{ bos_token }}{% for message in messages %}"
        "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
        "{{ '<start_of_turn>' + role + '\\n' }}"
        "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '<start_of_image>' }}"
        "{% else %}{{ part['text'] | trim }}{% endif %}"
        "{% endfor %}{% endif %}{{ '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    )

    @classmethod
    def from_config(cls, hf_config: Any, name: str, device: torch.device, dtype: torch.dtype) -> HookedGemma3:
        """Build the modules without weights (on the meta device)."""
        require("config", hf_config, {"quantization_config": (None,)})
        text, vision = hf_config.text_config, hf_config.vision_config
        cfg = VLMConfig(
            family="gemma3",
            model_name=name,
            image_token_id=hf_config.image_token_index,
            vision=_tower_sizes(hf_config),
            device=device,
            dtype=dtype,
            **_decoder_sizes(text),
        )
        if hf_config.image_token_index >= cfg.d_vocab:
            raise ValueError(
                f"config.image_token_index={hf_config.image_token_index} is outside the vocabulary of "
                f"{cfg.d_vocab}: not handled"
            )
        with torch.device("meta"):
            encoder = NormedSiglip(cfg.vision, vision.hidden_act, vision.layer_norm_eps)
            norm = OffsetRMSNorm(cfg.vision.d_model, vision.layer_norm_eps)
            projector = PoolingProjector(cfg.vision.d_model, cfg.vision.merge_size, cfg.d_model, norm)
        model = cls(cfg, _decoder(text, cfg), encoder, projector)
        model.marker_ids = (hf_config.boi_token_index, hf_config.eoi_token_index)
        return model

    @classmethod
    def weight_map(cls, cfg: VLMConfig, hf_names: Sequence[str]) -> WeightMap:
        """Hugging Face name → ours; None drops what pools the tower's patches by attention."""
        names = decoder_weights(cfg.n_layers) | tower_weights(_TOWER, cfg.vision, hf_names)
        names |= parameters({f"{_TOWER}.post_layernorm": "vision_encoder.ln_post"})
        names[f"{_PROJECTOR}.mm_input_projection_weight"] = "vision_projector.matrix"
        names[f"{_PROJECTOR}.mm_soft_emb_norm.weight"] = "vision_projector.ln.offset"
        names["model.language_model.norm.weight"] = "ln_final.offset"
        names |= {
            f"model.language_model.layers.{layer}.{theirs}.weight": f"blocks.{layer}.{ours}.offset"
            for layer in range(cfg.n_layers)
            for theirs, ours in _NORMS.items()
        }
        return {name: names[name] for name in hf_names if name in names}

    def encode_images(self, inputs: VLMInputs) -> Float[Tensor, "image token d_model"]:
        """Embeddings of the tokens of every image; other than those of words they are not scaled."""
        assert inputs.pixel_values is not None
        return self.vision_projector(self.vision_encoder(inputs.pixel_values))

    def positions(self, inputs: VLMInputs) -> Tensor:
        """Positions [batch pos]: those given, else counted from each row's first token."""
        return text_positions(inputs) if inputs.position_ids is None else inputs.position_ids

    def mutual_groups(self, inputs: VLMInputs) -> Int[Tensor, "batch pos"] | None:
        """The number of each run of image tokens in its row; −1 at text."""
        image = inputs.image_mask
        if not bool(image.any()):
            return None
        before = torch.zeros_like(image)
        before[:, 1:] = image[:, :-1]
        return ((image & ~before).cumsum(-1) - 1).masked_fill(~image, -1)

    # -- pictures --------------------------------------------------------------------------------

    @property
    def _grid(self) -> tuple[int, int]:
        side = self.cfg.vision.patches_per_side // self.cfg.vision.merge_size
        return (side, side)

    def locate_images(self, inputs: VLMInputs) -> VLMInputs:
        """Fill in `image_mask`, `grids` and `layouts`, and check that images and image tokens agree.

        Raises:
            ValueError: Counts that differ, an image cut by a row, pixels of another size, positions that are
                not [batch pos], token types that mark other tokens, or `image_grid_thw`.
        """
        if inputs.image_grid_thw is not None:
            raise ValueError("inputs key 'image_grid_thw' is not read by gemma3, whose images have one size")
        if inputs.position_ids is not None:
            inputs = replace(inputs, position_ids=expand_positions(inputs.position_ids, inputs, axes=1))
        mask, per_image = inputs.input_ids == self.cfg.image_token_id, math.prod(self._grid)
        for name in ("token_type_ids", "mm_token_type_ids"):
            check_token_types(inputs, mask, name)
        counts: list[int] = to_list(mask.sum(-1))
        pixels = inputs.pixel_values
        if pixels is not None:
            self._check_pixels(pixels)
        n_images = 0 if pixels is None else len(pixels)
        if sum(counts) != n_images * per_image:
            raise ValueError(
                f"{sum(counts)} image tokens in input_ids, but pixel_values hold {n_images} images of "
                f"{per_image} tokens, {n_images * per_image} in all"
            )
        for row, count in enumerate(counts):
            if count % per_image:
                raise ValueError(f"row {row} has {count} image tokens, not a multiple of {per_image}")
        images, side = [count // per_image for count in counts], self.cfg.vision.patches_per_side
        layout = ImageLayout(patches=(side, side))
        return replace(
            inputs,
            token_type_ids=mask.long(),
            mm_token_type_ids=None,
            image_mask_or_none=mask,
            grids=tuple((self._grid,) * n for n in images),
            layouts=tuple((layout,) * n for n in images),
        )

    def _check_pixels(self, pixels: Tensor) -> None:
        size = self.cfg.vision.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(
                f"pixel_values are {list(pixels.shape)}; this model reads [n_images, 3, {size}, {size}]"
            )

    def image_placeholder(self) -> str:
        """The token in front of an image's tokens, which alone stands for it in chat templates."""
        return self._markers()[0]

    def _markers(self) -> list[str]:
        """The tokens in front of an image's tokens, and behind them.

        Raises:
            ValueError: The tokenizer does not have one of them; names its id.
        """
        tokens: list[str] = self.tokenizer.convert_ids_to_tokens(list(self.marker_ids))
        added = self.tokenizer.get_added_vocab()
        for token, token_id, key in zip(tokens, self.marker_ids, ("boi", "eoi"), strict=True):
            if token not in added:
                raise ValueError(
                    f"the tokenizer does not have the model's {key} token: at {key}_token_index={token_id} "
                    f"it has {token!r}; load the processor that belongs to the checkpoint"
                )
        return tokens

    def process_images(self, images: Sequence[Image.Image]) -> tuple[dict[str, Any], list[ImageText]]:
        """Pixels by the checkpoint's image processor, and the text that stands for each picture.

        Raises:
            ValueError: A processor that cuts pictures (`do_pan_and_scan`), or makes pixels of another size.
        """
        require("image_processor", self.image_processor, {"do_pan_and_scan": (False, None)})
        if not images:
            return {}, []
        pixels = self.image_processor(images=list(images), return_tensors="pt").pixel_values
        self._check_pixels(pixels)
        first, last = self._markers()
        text = f"\n\n{first}{image_token_of(self) * math.prod(self._grid)}{last}\n\n"
        return {"pixel_values": pixels}, [text] * len(images)

    def pictures(self, inputs: VLMInputs) -> list[Float[Tensor, "channel _ _"]]:
        """The pixels as they are: one size for all."""
        return [] if inputs.pixel_values is None else list(inputs.pixel_values)

    def with_pictures(self, inputs: VLMInputs, pictures: Sequence[Float[Tensor, "channel _ _"]]) -> VLMInputs:
        """The same inputs with other pixels."""
        return replace(inputs, pixel_values=torch.stack(list(pictures)), image_embeds=None)

    def shown_region(self, width: int, height: int) -> Region:
        """The whole picture, but for the pixels at the right and at the bottom that fill no patch."""
        vision = self.cfg.vision
        assert vision.image_size is not None
        read = vision.patches_per_side * vision.patch_size / vision.image_size
        return (0.0, 0.0, read * width, read * height)


def _decoder_sizes(text: Any) -> dict[str, Any]:
    """The fields of `VLMConfig` that the text config gives.

    Raises:
        ValueError: A value that the code does not handle; names the key.
    """
    require("text_config", text, _TEXT)
    require("text_config", text, {"hidden_activation": activation_names()})
    kinds = text.layer_types
    for kind in kinds:
        if kind not in _KINDS:
            raise ValueError(f"text_config.layer_types has {kind!r}; handled: {', '.join(_KINDS)}")
    if len(kinds) != text.num_hidden_layers:
        raise ValueError(
            f"text_config.layer_types has {len(kinds)} entries for {text.num_hidden_layers} layers"
        )
    if text.num_attention_heads % text.num_key_value_heads:
        raise ValueError(
            f"text_config.num_key_value_heads={text.num_key_value_heads} does not divide the "
            f"{text.num_attention_heads} heads"
        )
    if "sliding_attention" in kinds:
        require_integers("text_config", text, ("sliding_window",))
    eos, pad = special_ids(text)
    return {
        "n_layers": text.num_hidden_layers,
        "n_heads": text.num_attention_heads,
        "n_key_value_heads": text.num_key_value_heads,
        "d_model": text.hidden_size,
        "d_head": text.head_dim,
        "d_mlp": text.intermediate_size,
        "d_vocab": text.vocab_size,
        "n_ctx": text.max_position_embeddings,
        "act_fn": text.hidden_activation,
        "eps": text.rms_norm_eps,
        "eos_token_ids": eos,
        "pad_token_id": pad,
        "sliding_window": text.sliding_window if "sliding_attention" in kinds else None,
        "query_scalar": text.query_pre_attn_scalar,
    }


def _decoder(text: Any, cfg: VLMConfig) -> Decoder:
    """The decoder's modules; made on the meta device, but for the rotary frequencies."""
    turns: dict[str, Rotary] = {}
    for kind in set(text.layer_types):
        frequencies, scaling = rotary_frequencies(text, cfg.d_head, layer_type=kind)
        turns[kind] = Rotary(frequencies.to(cfg.device), scaling)
    sliding = turns.get("sliding_attention")
    with torch.device("meta"):
        embed, unembed = torch.nn.Embedding(cfg.d_vocab, cfg.d_model), Unembed(cfg.d_model, cfg.d_vocab)
        blocks = [_block(cfg, layer, kind) for layer, kind in enumerate(text.layer_types)]
        return Decoder(
            embed=embed,
            rotary=turns.get("full_attention", turns[text.layer_types[0]]),
            sliding_rotary=sliding,
            embed_scale=cfg.d_model**0.5,
            blocks=blocks,
            ln_final=OffsetRMSNorm(cfg.d_model, cfg.eps),
            unembed=unembed,
        )


def _block(cfg: VLMConfig, layer: int, kind: str) -> Block:
    attention = Attention(
        layer,
        cfg.d_model,
        cfg.n_heads,
        cfg.n_key_value_heads,
        cfg.d_head,
        sliding=kind == "sliding_attention",
        qk_norm=(OffsetRMSNorm(cfg.d_head, cfg.eps), OffsetRMSNorm(cfg.d_head, cfg.eps)),
        divisor=cfg.attn_scale,
    )
    ln1, ln2, post_attention, post_mlp = (OffsetRMSNorm(cfg.d_model, cfg.eps) for _ in range(4))
    mlp = GatedMLP(cfg.d_model, cfg.d_mlp, cfg.act_fn)
    return Block(attention, mlp, ln1, ln2, ln1_post=post_attention, ln2_post=post_mlp)


def _tower_sizes(hf_config: Any) -> VisionConfig:
    """The sizes of the tower; ValueError names a value that the code does not handle."""
    sizes = vit_sizes(hf_config.vision_config, ("siglip_vision_model",))
    side, tokens = sizes.patches_per_side, hf_config.mm_tokens_per_image
    of_tokens = math.isqrt(tokens)
    if of_tokens**2 != tokens or not of_tokens or side % of_tokens:
        raise ValueError(
            f"config.mm_tokens_per_image={tokens} is not handled; handled: squares of a divisor of the "
            f"{side} patches of a picture's side"
        )
    return replace(sizes, merge_size=side // of_tokens)
