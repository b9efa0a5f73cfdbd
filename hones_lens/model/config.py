"""Sizes of a model (`VLMConfig`), and the settings that ship for known models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml

from hones_lens.model.names import did_you_mean

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower.

    Attributes:
        n_layers: Blocks that are built: those up to the highest feature layer.
        n_heads, d_model, d_head, d_mlp: As in the decoder.
        patch_size: Side of a patch in pixels.
        image_size: Side of every image in pixels; None where images keep their own size.
        feature_layers: Hidden states that are read; 0 is the input of the first block.
        has_class_token: Whether the tower's first token is a class token.
        keep_class_token: Whether it is among the image tokens.
        drop_first_patch: Whether the first patch is not among them: what leaves out CLIP's class token,
            `vision_feature_select_strategy="default"`, does so with SigLIP.
        merge_size: Side, in patches, of the square of patches that one image token stands for.
        window_size: Side in pixels of the attention windows; None without windows.
        tile_sizes: Heights and widths in pixels to one of which a picture is brought before it is cut into
            tiles of `image_size`; empty where pictures are not cut so.
        most_tiles: Of how many tiles at most a picture has the tokens; more are pooled. None: of all.
        full_attention_layers: Blocks that attend over the whole image even if there are windows.
    """

    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    patch_size: int
    image_size: int | None
    feature_layers: tuple[int, ...]
    has_class_token: bool = False
    keep_class_token: bool = False
    drop_first_patch: bool = False
    merge_size: int = 1
    window_size: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    tile_sizes: tuple[tuple[int, int], ...] = ()
    most_tiles: int | None = None

    @property
    def patches_per_side(self) -> int:
        """Patches along a side of an image, where all images have one size."""
        assert self.image_size is not None, "images keep their own size"
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class VLMConfig:
    """Sizes and special tokens of a hooked model, under TransformerLens's names.

    Attributes:
        normalization_type: "RMS" or "LN": `ln*.hook_scale` divides, the weight follows.
        n_ctx: Longest sequence that the checkpoint was made for.
        eos_token_ids: Any of them ends a generation.
        sliding_window: How many keys a query sees in the layers whose attention slides; None where none does.
        n_deepstack: Behind how many of the first layers pictures write into the stream again (DeepStack).
        use_split_qkv_input: Set through `HookedVLM.set_use_split_qkv_input`.
        unembed_in_float32: Set through `HookedVLM.set_unembed_in_float32`.
        query_scalar: Attention scores are divided by its root; None: by that of d_head.
        default_prepend_bos: Whether the tokenizer puts a beginning-of-sequence token before a text by itself.
    """

    family: str
    model_name: str
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    act_fn: str
    eps: float
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    vision: VisionConfig
    device: torch.device
    dtype: torch.dtype
    normalization_type: str = "RMS"
    attn_only: bool = False
    sliding_window: int | None = None
    n_deepstack: int = 0
    use_split_qkv_input: bool = False
    unembed_in_float32: bool = True
    default_prepend_bos: bool = False
    query_scalar: float | None = None

    # What code written for TransformerLens reads besides; the same for every family.
    attention_dir: ClassVar[str] = "causal"
    positional_embedding_type: ClassVar[str] = "rotary"
    use_attn_result: ClassVar[bool] = True  # `attn.hook_result` runs when it is hooked
    use_hook_mlp_in: ClassVar[bool] = False  # there is no `hook_mlp_in`: `ln2.hook_normalized` is what enters
    ungroup_grouped_query_attention: ClassVar[bool] = False

    @property
    def d_vocab_out(self) -> int:
        """Tokens that there are logits of: all."""
        return self.d_vocab

    @property
    def attn_scale(self) -> float:
        """What attention scores are divided by."""
        return (self.query_scalar or self.d_head) ** 0.5

    @property
    def tokenizer_prepends_bos(self) -> bool:
        """As `default_prepend_bos`."""
        return self.default_prepend_bos

    @property
    def n_neurons(self) -> int:
        """Neurons of all decoder layers."""
        return self.n_layers * self.d_mlp


def require(config_name: str, config: Any, handled: Mapping[str, Sequence[object]]) -> None:
    """Raise for config values that the code would otherwise silently ignore.

    Args:
        config_name: Name of the config in the message, e.g. `text_config`.
        config: The Hugging Face config.
        handled: For each key the values that are handled; a missing key counts as None.

    Raises:
        ValueError: A value that is not handled; names the key and the handled values.
    """
    for key, values in handled.items():
        value = getattr(config, key, None)
        if value not in values:
            raise ValueError(
                f"{config_name}.{key}={value!r} is not handled; handled: {', '.join(map(repr, values))}"
            )


def require_integers(config_name: str, config: Any, keys: Sequence[str]) -> None:
    """Raise for config values that are no single integer, e.g. sides of a picture that differ.

    Raises:
        ValueError: Names the key and its value.
    """
    for key in keys:
        if not isinstance(value := getattr(config, key), int):
            raise ValueError(f"{config_name}.{key}={value!r} is not handled; handled: one integer")


def token_ids(ids: int | Sequence[int] | None) -> tuple[int, ...]:
    """A config value of Hugging Face that holds no id, one or several, as a tuple."""
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def special_ids(text_config: Any) -> tuple[tuple[int, ...], int]:
    """End-of-sequence ids, and the padding id (else the first of them), of a Hugging Face text config."""
    eos = token_ids(text_config.eos_token_id)
    pad = text_config.pad_token_id
    return eos, (eos[0] if eos else 0) if pad is None else pad


@dataclass(frozen=True)
class ModelSettings:
    """One file of `model_configs/`: where a known model is loaded from, and its defaults.

    Attributes:
        name: The name by which it is loaded.
        family: A key of `families.FAMILIES`.
        aliases: Other names for it.
        hub_id, revision: Its repository and revision on the Hugging Face Hub.
        checkpoint: Instead of these, the name of a checkpoint that ships in the package.
        top_k: Critical heads to keep (METHOD H1).
        ratio: Share of all decoder neurons that are task neurons (METHOD H3).
        paper: Source of these numbers.
        config: The values of its public `config.json` that decide its sizes (see `known_config`).
        images: Bounds of its image processor: `side`, `side` of tiles and `longest_edge` of a picture, or
            `min_pixels` and `max_pixels`.
    """

    name: str
    family: str
    top_k: int
    ratio: float
    aliases: tuple[str, ...] = ()
    hub_id: str | None = None
    revision: str | None = None
    checkpoint: str | None = None
    paper: str = ""
    config: Mapping[str, Any] | None = None
    images: Mapping[str, int] | None = None


def settings_folder() -> Path:
    """The folder `model_configs/`: inside an installed package, or beside it in a checkout.

    Raises:
        FileNotFoundError: In neither place.
    """
    for folder in (PACKAGE / "model_configs", PACKAGE.parent / "model_configs"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"model_configs/ is neither in {PACKAGE} nor beside it; the installation is broken"
    )


def read_settings(file: Path) -> ModelSettings:
    """Read one YAML of `model_configs/`.

    Raises:
        ValueError: An unknown or missing key; names the file, the key and the nearest valid one.
    """
    data: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    known = [f.name for f in fields(ModelSettings)]
    for key in data:
        if key not in known:
            hint = did_you_mean(key, known) or f"; valid: {', '.join(known)}"
            raise ValueError(f"{file}: unknown key {key!r}{hint}")
    for key in ("name", "family", "top_k", "ratio"):
        if key not in data:
            raise ValueError(f"{file}: key {key!r} is missing")
    if (data.get("hub_id") is None) == (data.get("checkpoint") is None):
        raise ValueError(f"{file}: exactly one of 'hub_id' and 'checkpoint' must be given")
    if (data.get("config") is None) != (data.get("images") is None):
        raise ValueError(f"{file}: 'config' and 'images' are given together or not at all")
    data["aliases"] = tuple(data.get("aliases", ()))
    return ModelSettings(**data)


@cache
def all_settings() -> dict[str, ModelSettings]:
    """Every shipped model setting by name."""
    settings_list = [read_settings(file) for file in sorted(settings_folder().glob("*.yaml"))]
    return {settings.name: settings for settings in settings_list}


def find_settings(name: str) -> ModelSettings | None:
    """Settings by name, alias or Hub id; None where there are none."""
    for settings in all_settings().values():
        if name in (settings.name, settings.hub_id, *settings.aliases):
            return settings
    return None


def checkpoint_path(name: str) -> Path:
    """Folder of a shipped checkpoint, loadable by Hugging Face's own `from_pretrained`.

    Raises:
        ValueError: No such checkpoint ships; lists those that do.
    """
    folder = PACKAGE / "checkpoints" / name
    if not (folder / "config.json").is_file():
        shipped = sorted(p.parent.name for p in (PACKAGE / "checkpoints").glob("*/config.json"))
        raise ValueError(f"no checkpoint {name!r} ships with hones_lens; shipped: {', '.join(shipped)}")
    return folder
