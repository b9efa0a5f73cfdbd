"""Qwen2.5-VL: a vision tower with windows and 2-D rotary positions, a patch merger, a Qwen2 decoder.

Images keep their own size, so the tower sees a padded batch: [image patch …], patches in raster
order, padding behind them. Hugging Face's order (squares of patches that become one token, and
windows) is undone on the way in, so every hook has raster order, whatever attends to what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil
from transformers.activations import ACT2FN

from hones_lens.model.config import VisionConfig, VLMConfig, require, special_ids
from hones_lens.model.hooked_vlm import HookedVLM
from hones_lens.model.inputs import VLMInputs
from hones_lens.model.nn.attention import Attention, AttentionContext, Windows
from hones_lens.model.nn.block import Block
from hones_lens.model.nn.mlp import GatedMLP
from hones_lens.model.nn.norm import RMSNorm
from hones_lens.model.nn.rotary import Rotary, rotary_frequencies
from hones_lens.model.weights import WeightMap, decoder_weights, parameters

_VISION_EPS = 1e-6  # not in the config: Hugging Face's code has this number
_VISION_THETA = 10000.0
_TOP = {
    "model.visual.patch_embed.proj": "vision_encoder.patch_embedding",
    "model.visual.merger.ln_q": "vision_projector.ln",
    "model.visual.merger.mlp.0": "vision_projector.linear_1",
    "model.visual.merger.mlp.2": "vision_projector.linear_2",
}
_VISION = {
    "norm1": ("ln1",),
    "attn.qkv": ("attn.q", "attn.k", "attn.v"),
    "attn.proj": ("attn.o",),
    "norm2": ("ln2",),
    "mlp.gate_proj": ("mlp.gate",),
    "mlp.up_proj": ("mlp.up",),
    "mlp.down_proj": ("mlp.down",),
}


class PatchLayout:
    """Where the patches of a batch of images lie, from each image's grid (rows, columns) of patches.

    Attributes:
        place: Patch in Hugging Face's packed order → index of the flattened [image patch], [n_patches].
        rows, columns: Place of every patch in its image, [image patch].
        real: False at padding, [image patch].
        squares: The patches of every image token, as such indices, [n_tokens merge²].
    """

    def __init__(self, grids: Sequence[tuple[int, int]], merge: int, device: torch.device):
        longest = max(rows * columns for rows, columns in grids)
        shape = (len(grids), longest)
        self.rows, self.columns = (torch.zeros(shape, dtype=torch.long) for _ in range(2))
        self.real = torch.zeros(shape, dtype=torch.bool)
        place, squares = [], []
        for i, (rows, columns) in enumerate(grids):
            raster = torch.arange(rows * columns).view(rows, columns)
            by_square = raster.view(rows // merge, merge, columns // merge, merge).transpose(1, 2)
            place.append(by_square.flatten() + i * longest)
            squares.append(place[-1].view(-1, merge * merge))
            self.rows[i, : rows * columns] = raster.flatten() // columns
            self.columns[i, : rows * columns] = raster.flatten() % columns
            self.real[i, : rows * columns] = True
        self.place, self.squares = torch.cat(place).to(device), torch.cat(squares).to(device)
        self.rows, self.columns, self.real = (x.to(device) for x in (self.rows, self.columns, self.real))

    def windows(self, side: int) -> Windows:
        """Windows of `side` × `side` patches from each image's upper left corner, ragged at the edges."""
        across = int(self.columns.max()) // side + 1
        down = int(self.rows.max()) // side + 1
        image = torch.arange(len(self.rows), device=self.rows.device)[:, None]
        number = (image * down + self.rows // side) * across + self.columns // side
        flat, real = number.flatten(), self.real.flatten()
        patches = real.nonzero()[:, 0]
        patches = patches[flat[patches].sort(stable=True).indices]
        sizes = flat[patches].unique_consecutive(return_counts=True)[1].tolist()
        parts = list(patches.split(sizes))
        members = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        filled = nn.utils.rnn.pad_sequence([torch.ones_like(p) for p in parts], batch_first=True)
        alone = -1 - torch.arange(flat.numel(), device=flat.device)
        return Windows(torch.where(real, flat, alone).view_as(number), members, filled.bool())


class QwenVisionEncoder(nn.Module):
    """The vision transformer: gated neurons with biases, windows in all but a few blocks."""

    def __init__(self, cfg: VisionConfig, d_patch: tuple[int, int, int, int], act: str):
        super().__init__()
        self.cfg = cfg
        self.patch_embedding = nn.Conv3d(d_patch[0], cfg.d_model, d_patch[1:], stride=d_patch[1:], bias=False)
        self.hook_embed = HookPoint()  # [image patch d_model]
        heads = (cfg.n_heads, cfg.n_heads, cfg.d_head)
        self.blocks = nn.ModuleList(
            Block(
                Attention(layer, cfg.d_model, *heads, qkv_bias=True, out_bias=True),
                GatedMLP(cfg.d_model, cfg.d_mlp, act, bias=True),
                RMSNorm(cfg.d_model, _VISION_EPS),
                RMSNorm(cfg.d_model, _VISION_EPS),
            )
            for layer in range(cfg.n_layers)
        )

    def forward(
        self, pixels: Float[Tensor, "n_patches values"], layout: PatchLayout
    ) -> Float[Tensor, "image patch d_model"]:
        """The residual stream above the last block."""
        weight = self.patch_embedding.weight.flatten(1)
        packed = F.linear(pixels, weight)
        resid = packed.new_zeros(layout.real.numel(), self.cfg.d_model)
        resid = resid.index_copy(0, layout.place, packed).view(*layout.real.shape, -1)
        resid = self.hook_embed(resid)
        cos, sin = self._rotation(layout)
        mask = None if bool(layout.real.all()) else layout.real[:, None, None]
        whole = AttentionContext(cos, sin, mask)
        assert self.cfg.window_size is not None
        side = self.cfg.window_size // self.cfg.patch_size // self.cfg.merge_size * self.cfg.merge_size
        windowed = AttentionContext(cos, sin, windows=layout.windows(side))
        for layer, block in enumerate(self.blocks):
            resid = block(resid, whole if layer in self.cfg.full_attention_layers else windowed)
        return resid

    def _rotation(self, layout: PatchLayout) -> tuple[Tensor, Tensor]:
        """Cosine and sine, float32 [image patch d_head]: half the frequencies by row, half by column."""
        half = self.cfg.d_head // 2
        steps = torch.arange(0, half, 2, dtype=torch.float, device=layout.rows.device) / half
        frequencies = 1.0 / _VISION_THETA**steps
        by_axis = [p[..., None].float() * frequencies for p in (layout.rows, layout.columns)]
        angles = torch.cat(by_axis * 2, dim=-1)
        return angles.cos(), angles.sin()


class PatchMerger(nn.Module):
    """Normalises patches, lays each square of them side by side, and maps it to the decoder's width."""

    def __init__(self, d_vision: int, merge: int, d_out: int):
        super().__init__()
        self.ln = RMSNorm(d_vision, _VISION_EPS)
        self.hook_in = HookPoint()  # [image_token merge² · d_vision], raster order, image after image
        self.linear_1 = nn.Linear(d_vision * merge**2, d_vision * merge**2)
        self.linear_2 = nn.Linear(d_vision * merge**2, d_out)
        self.hook_out = HookPoint()  # [image_token d_model]

    def forward(
        self, patches: Float[Tensor, "image patch d_vision"], layout: PatchLayout
    ) -> Float[Tensor, "image_token d_model"]:
        """Image embeddings, in raster order, image after image."""
        squares = self.ln(patches).flatten(0, 1)[layout.squares].flatten(1)
        return self.hook_out(self.linear_2(F.gelu(self.linear_1(self.hook_in(squares)))))


class QwenProcessor:
    """Tokenizer and PIL image processor of a Qwen2.5-VL checkpoint.

    Hugging Face's own processor can't be built without torchvision, which its video part needs.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: Any = None):
        self.image_processor, self.tokenizer, self.chat_template = image_processor, tokenizer, chat_template

    @classmethod
    def from_pretrained(cls, folder: str, revision: str | None = None, **sizes: Any) -> QwenProcessor:
        """Read both parts; `min_pixels` and `max_pixels` overrule the checkpoint's bounds on image size."""
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision)
        images = Qwen2VLImageProcessorPil.from_pretrained(folder, revision=revision or "main", **sizes)
        return cls(images, tokenizer, tokenizer.chat_template)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write both parts in Hugging Face's format."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)


class HookedQwen2_5_VL(HookedVLM):
    """`Qwen2_5_VLForConditionalGeneration`, hooked."""

    family = "qwen2_5_vl"
    processor_class = QwenProcessor
    processor_options = ("min_pixels", "max_pixels")
    video_token_id: int
    default_chat_template = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )

    @classmethod
    def from_config(
        cls, hf_config: Any, name: str, device: torch.device, dtype: torch.dtype
    ) -> HookedQwen2_5_VL:
        """Build the modules without weights (on the meta device)."""
        cfg = read_config(hf_config, name, device, dtype)
        frequencies, scaling = rotary_frequencies(hf_config.text_config, cfg.d_head)
        vision = hf_config.vision_config
        rotary = Rotary(frequencies.to(device), scaling, _sections(hf_config.text_config, cfg.d_head))
        with torch.device("meta"):
            shape = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
            encoder = QwenVisionEncoder(cfg.vision, shape, vision.hidden_act)
            projector = PatchMerger(cfg.vision.d_model, cfg.vision.merge_size, cfg.d_model)
            model = cls(cfg, encoder, projector, rotary, qkv_bias=True)
        model.video_token_id = hf_config.video_token_id
        return model

    @classmethod
    def weight_map(cls, cfg: VLMConfig, hf_names: Sequence[str]) -> WeightMap:
        """Hugging Face name → ours; the tower's fused QKV is three row blocks."""
        names = decoder_weights(cfg.n_layers) | parameters(_TOP)
        for layer in range(cfg.vision.n_layers):
            for theirs, several in _VISION.items():
                for s in ("weight", "bias"):
                    mine = tuple(f"vision_encoder.blocks.{layer}.{ours}.{s}" for ours in several)
                    names[f"model.visual.blocks.{layer}.{theirs}.{s}"] = mine
        return {name: names[name] for name in hf_names if name in names}

    def encode_images(self, inputs: VLMInputs) -> Float[Tensor, "image_token d_model"]:
        """Embeddings of all images' tokens, image after image."""
        assert inputs.pixel_values is not None and inputs.image_grid_thw is not None
        grids = [(rows, columns) for _, rows, columns in inputs.image_grid_thw.tolist()]
        layout = PatchLayout(grids, self.cfg.vision.merge_size, inputs.pixel_values.device)
        return self.vision_projector(self.vision_encoder(inputs.pixel_values, layout), layout)

    def positions(self, inputs: VLMInputs) -> Int[Tensor, "3 batch pos"]:
        """Positions in time, row and column (`locate_images` fills them in)."""
        assert inputs.position_ids is not None
        return inputs.position_ids

    def locate_images(self, inputs: VLMInputs) -> VLMInputs:
        """Fill in `image_mask`, `grids` and `position_ids`, and check that images and tokens agree.

        Raises:
            ValueError: Counts that differ, an image cut by a row, pixels that don't fit their grids, video.
        """
        mask = inputs.input_ids == self.cfg.image_token_id
        if bool((inputs.input_ids == self.video_token_id).any()):
            raise ValueError("the prompt has video tokens; video is not handled: give still images")
        sizes = self._token_grids(inputs)
        shown, held = int(mask.sum()), sum(rows * columns for rows, columns in sizes)
        if shown != held:
            raise ValueError(
                f"{shown} image tokens in input_ids, but pixel_values hold {len(sizes)} images of "
                f"{held} tokens in all"
            )
        grids, taken = [], 0
        for row, count in enumerate(mask.sum(-1).tolist()):
            here: list[tuple[int, int]] = []
            while (left := count - sum(r * c for r, c in here)) > 0:
                here.append(sizes[taken + len(here)])
                if here[-1][0] * here[-1][1] > left:
                    raise ValueError(f"row {row} ends within image {taken + len(here) - 1}")
            taken += len(here)
            grids.append(tuple(here))
        known = replace(
            inputs, image_mask_or_none=mask, grids=tuple(grids), mm_token_type_ids=mask.to(torch.int)
        )
        if known.position_ids is None:
            known = replace(known, position_ids=mrope_positions(known))
        return known

    def _token_grids(self, inputs: VLMInputs) -> list[tuple[int, int]]:
        if inputs.pixel_values is None:
            return []
        thw, merge, encoder = inputs.image_grid_thw, self.cfg.vision.merge_size, self.vision_encoder
        assert isinstance(encoder, QwenVisionEncoder)
        if thw is None:
            raise ValueError("pixel_values without image_grid_thw: the size of the images is not known")
        patches, width = int(thw.prod(-1).sum()), encoder.patch_embedding.weight[0].numel()
        if inputs.pixel_values.shape != (patches, width):
            raise ValueError(
                f"pixel_values are {list(inputs.pixel_values.shape)}; image_grid_thw asks for "
                f"[{patches}, {width}]"
            )
        for i, (time, rows, columns) in enumerate(thw.tolist()):
            if time != 1:
                raise ValueError(f"image {i} has {time} frames; video is not handled: give still images")
            if rows % merge or columns % merge:
                raise ValueError(f"image {i} has {rows} × {columns} patches, which {merge} does not divide")
        return [(rows // merge, columns // merge) for _, rows, columns in thw.tolist()]

    def process_images(self, images: Sequence) -> tuple[dict[str, Any], list[int]]:
        """Resize within the processor's bounds on pixels, normalise, cut into patches."""
        if not images:
            return {}, []
        made = self.image_processor(images=list(images), return_tensors="pt")
        counts = (made.image_grid_thw.prod(-1) // self.cfg.vision.merge_size**2).tolist()
        return {"pixel_values": made.pixel_values, "image_grid_thw": made.image_grid_thw}, counts

    def pictures(self, inputs: VLMInputs) -> list[Float[Tensor, "channel _ _"]]:
        """Patches laid side by side again; of a patch's frames, which are alike, the first."""
        if inputs.pixel_values is None or inputs.image_grid_thw is None:
            return []
        sizes = inputs.image_grid_thw.prod(-1).tolist()
        parts = zip(inputs.pixel_values.split(sizes), inputs.image_grid_thw.tolist(), strict=True)
        out = []
        for patches, (_, rows, columns) in parts:
            merge, _, frames, side = self._patch_shape
            squares = (rows // merge, columns // merge, merge, merge)
            laid = patches.view(*squares, -1, frames, side, side)[..., 0, :, :]
            laid = laid.permute(4, 0, 2, 5, 1, 3, 6)
            out.append(laid.reshape(-1, rows * side, columns * side))
        return out

    def with_pictures(self, inputs: VLMInputs, pictures: Sequence[Float[Tensor, "channel _ _"]]) -> VLMInputs:
        """The same inputs with other pictures, cut into patches in Hugging Face's order."""
        merge, channels, frames, side = self._patch_shape
        packed = []
        for picture in pictures:
            rows, columns = (n // side // merge for n in picture.shape[1:])
            laid = picture.reshape(channels, rows, merge, side, columns, merge, side)
            laid = laid.permute(1, 4, 2, 5, 0, 3, 6)[..., None, :, :]
            packed.append(
                laid.expand(*laid.shape[:5], frames, side, side).reshape(-1, channels * frames * side**2)
            )
        return replace(inputs, pixel_values=torch.cat(packed), image_embeds=None)

    @property
    def _patch_shape(self) -> tuple[int, int, int, int]:
        """Patches a side of a square, channels, frames, pixels a side of a patch."""
        encoder = self.vision_encoder
        assert isinstance(encoder, QwenVisionEncoder)
        _, channels, frames, side, _ = encoder.patch_embedding.weight.shape
        return self.cfg.vision.merge_size, channels, frames, side


def mrope_positions(inputs: VLMInputs) -> Int[Tensor, "3 batch pos"]:
    """Positions in time, row and column, as Qwen2-VL counts them.

    Text counts on in all three. An image's tokens stay at one time; their rows and columns count from
    where the text before it ended, and text goes on behind the larger side. Padding is at 0.
    """
    out = torch.zeros(3, *inputs.input_ids.shape, dtype=torch.long)
    tokens, at_image = inputs.attention_mask.bool().tolist(), inputs.image_mask.tolist()
    for row, grids in enumerate(inputs.grids):
        places = [i for i, token in enumerate(tokens[row]) if token]
        images = iter(grids)
        parts, at = [], 0
        for image, run in groupby(places, key=lambda i: at_image[row][i]):
            length = len(list(run))
            if not image:
                parts.append(torch.arange(at, at + length).expand(3, -1))
                at += length
                continue
            while length:
                rows, columns = next(images)
                grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2).T
                parts.append(torch.cat((torch.zeros_like(grid[:1]), grid)) + at)
                at += max(rows, columns)
                length -= rows * columns
        out[:, row, places] = torch.cat(parts, dim=1)
    return out.to(inputs.input_ids.device)


def _sections(text: Any, d_head: int) -> tuple[int, ...]:
    sections = tuple(text.rope_parameters.get("mrope_section", (16, 24, 24)))
    if sum(sections) != d_head // 2:
        raise ValueError(
            f"text_config.mrope_section={sections} does not add up to d_head / 2 = {d_head // 2}"
        )
    return sections


def read_config(hf_config: Any, name: str, device: torch.device, dtype: torch.dtype) -> VLMConfig:
    """A `Qwen2_5_VLConfig` as ours.

    Raises:
        ValueError: A value that the code does not handle; names the key.
    """
    text, vision = hf_config.text_config, hf_config.vision_config
    require("config", hf_config, {"quantization_config": (None,)})
    require("vision_config", vision, {"model_type": ("qwen2_5_vl_vision",), "hidden_act": tuple(ACT2FN)})
    require("vision_config", vision, {"in_channels": (3,), "out_hidden_size": (text.hidden_size,)})
    d_head = text.hidden_size // text.num_attention_heads
    require("text_config", text, {"model_type": ("qwen2_5_vl_text",), "hidden_act": tuple(ACT2FN)})
    require("text_config", text, {"use_sliding_window": (False, None), "attention_dropout": (0, 0.0)})
    require("text_config", text, {"head_dim": (None, d_head)})
    for key in ("patch_size", "temporal_patch_size"):
        if not isinstance(getattr(vision, key), int):
            raise ValueError(
                f"vision_config.{key}={getattr(vision, key)!r} is not handled; handled: one integer"
            )
    axial = vision.rope_parameters or {}
    if axial.get("rope_type") != "axial" or axial.get("rope_theta") != _VISION_THETA:
        raise ValueError(
            f"vision_config.rope_parameters={axial!r} is not handled; handled: axial, {_VISION_THETA}"
        )
    if vision.window_size < vision.patch_size * vision.spatial_merge_size:
        raise ValueError(f"vision_config.window_size={vision.window_size} is smaller than an image token")
    full = tuple(vision.fullatt_block_indexes)
    if any(not 0 <= layer < vision.depth for layer in full):
        raise ValueError(f"vision_config.fullatt_block_indexes={full} is outside the {vision.depth} blocks")
    eos, pad = special_ids(text)
    return VLMConfig(
        family="qwen2_5_vl",
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
        vision=VisionConfig(
            n_layers=vision.depth,
            n_heads=vision.num_heads,
            d_model=vision.hidden_size,
            d_head=vision.hidden_size // vision.num_heads,
            d_mlp=vision.intermediate_size,
            patch_size=vision.patch_size,
            image_size=None,
            feature_layers=(vision.depth,),
            merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            full_attention_layers=full,
        ),
        device=device,
        dtype=dtype,
    )
