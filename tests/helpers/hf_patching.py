"""Patches made on Hugging Face's own model: what functions of TransformerLens's are held against."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from transformer_lens import ActivationCache

from helpers import random_llava, random_qwen
from helpers.hf_twin import Step, Twin
from hones_lens import VLMInputs

GOOD, BAD = 11, 12  # two tokens whose logits are compared
CONFIGS = {
    "llava": (
        random_llava,
        {
            "text": {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
            "vision": {"image_size": 14, "num_hidden_layers": 2},
        },
    ),
    "qwen, gqa": (random_qwen, {"text": {"num_hidden_layers": 2}, "vision": {"depth": 2}}),
    "qwen, mha": (random_qwen, {"text": {"num_hidden_layers": 2, "num_key_value_heads": 4}}),
}
BY_POS = ("attn_head_out", "attn_head_q", "attn_head_k", "attn_head_v")
ALL_POS = (*BY_POS, "attn_head_pattern")
HOOKS = {
    **{"resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid"},
    **{"attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out"},
    **{f"attn_head_{letter}": f"attn.hook_{letter}" for letter in "qkv"},
    "attn_head_out": "attn.hook_z",
}


def per_example(logits: Tensor) -> Tensor:
    return logits[:, -1, GOOD] - logits[:, -1, BAD]


def log_prob(logits: Tensor) -> Tensor:
    return logits[:, -1].log_softmax(-1)[:, GOOD]


def scalar(logits: Tensor) -> Tensor:
    return per_example(logits).mean()


class Case:
    """Clean and corrupted inputs: a picture, a picture behind padding, text alone; text differs too."""

    def __init__(self, name: str):
        self.twin = Twin(CONFIGS[name][0], **CONFIGS[name][1])
        self.model, cfg = self.twin.model, self.twin.model.cfg
        self.clean, self.corrupted = self._inputs(0, [21, 22, 23, 24]), self._inputs(7, [21, 31, 23, 34])
        self.bound = self.model.bind(self.corrupted)
        self.encoded = self.model.bind(self.model.with_image_embeds(self.corrupted))  # for long sweeps
        self.layers, self.heads, self.kv = cfg.n_layers, cfg.n_heads, cfg.n_key_value_heads
        self.tokens = self.corrupted.input_ids
        self.n = self.tokens.shape[1]
        with torch.no_grad():
            self.cache: ActivationCache = self.model.run_with_cache(self.clean)[1]
            self.corrupted_cache: ActivationCache = self.bound.run_with_cache(self.tokens)[1]
        self.hf_clean = self.twin.seen(self.clean)
        self.patterns = self.twin.attentions(self.clean), self.twin.attentions(self.corrupted)
        self.baseline = per_example(self.twin.logits(self.corrupted))
        self._known: dict[str, Tensor] = {}

    def _inputs(self, seed: int, words: list[int]) -> VLMInputs:
        cfg = self.model.cfg
        made = self.model.process_images(random_llava.make_images(2, seed, (14, 14)))
        image = [cfg.image_token_id] * made[1][0]
        rows = [[5, *image, *words[:3]], [5, *image, *words[1:3]], [5, 6, *words]]
        width = max(map(len, rows))
        padded = torch.tensor([[cfg.pad_token_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return self.model.as_inputs({"input_ids": padded, "attention_mask": mask, **made[0]})

    # -- the same patches on Hugging Face's model ------------------------------------------------

    def steps(self, name: str, index: tuple[int, ...]) -> list[Step]:
        layer, *place = index
        if name.startswith("attn_head_pattern"):
            return self.twin.mix_by(layer, self._patched_pattern(name, layer, place))
        where, hook = (slice(None), *place), HOOKS[name.removesuffix("_by_pos").removesuffix("_all_pos")]
        if name.endswith("_all_pos"):
            where = (slice(None), slice(None), *place)

        def patch(x: Tensor) -> Tensor:
            x = x.clone()
            x[where] = self.hf_clean[f"blocks.{layer}.{hook}"][where]
            return x

        return self.twin.edit(layer, hook, patch)

    def _patched_pattern(self, name: str, layer: int, place: list[int]) -> Tensor:
        clean, pattern = (run[layer] for run in self.patterns)
        pattern = pattern.clone()
        pattern[(slice(None), *place)] = clean[(slice(None), *place)]
        return pattern

    def shape(self, name: str) -> tuple[int, ...]:
        heads = self.kv if name.startswith(("attn_head_k", "attn_head_v")) else self.heads
        if name == "attn_head_pattern_dest_src_pos":
            return self.layers, heads, self.n, self.n
        if name == "attn_head_pattern_by_pos":
            return self.layers, heads, self.n
        if name.endswith("_all_pos"):
            return self.layers, heads
        return (self.layers, self.n, heads) if name.endswith("_by_pos") else (self.layers, self.n)

    def patched(self, name: str, index: tuple[int, ...]) -> Tensor:
        return self.twin.logits(self.corrupted, self.steps(name, index))

    def expected(self, name: str) -> Tensor:
        """The metric of every patch, [*axes batch]."""
        if name not in self._known:
            shape = self.shape(name)
            cells = [per_example(self.patched(name, at)) for at in itertools.product(*map(range, shape))]
            self._known[name] = torch.stack(cells).view(*shape, -1)
        return self._known[name]
