"""Operations (FLOP) of what a run computes, by formula, from a model's sizes.

Counted are all matrix products, two operations for a multiplication and its addition, and attention's two
products over the whole square of queries and keys. Norms, activations, rotations and softmax are not: they
are below 1 % at any size that matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from hones_lens.model import HookedVLM, post_norm


class Segment(NamedTuple):
    """Tokens that run together, as the engine's segments.

    Attributes:
        rows: How many rows.
        tokens: Of a row, that run.
        past: Keys and values in front of them.
        keep: At how many of the last positions logits are wanted.
    """

    rows: int
    tokens: int
    past: int
    keep: int

    def late(self) -> Segment:
        """The positions whose logits are wanted alone."""
        return Segment(self.rows, self.keep, self.past + self.tokens - self.keep, self.keep)


class Operations:
    """Counts for one model; its weights are not read, so that they may be absent.

    Args:
        model: The model, or one of its sizes (`model_without_weights`).
    """

    def __init__(self, model: HookedVLM):
        self._model, self.cfg = model, model.cfg
        self._block = _matrices(model.blocks[0])
        self._norms_behind = post_norm(model.blocks[0], "attn") is not None
        self._vision_block = _matrices(model.vision_encoder.get_submodule("blocks.0"))

    def block(self, tokens: float, past: float = 0) -> float:
        """One decoder layer over a row's tokens, behind keys and values of `past` others."""
        cfg = self.cfg
        return 2 * self._block * tokens + 4 * tokens * (past + tokens) * cfg.n_heads * cfg.d_head

    def logits(self, positions: float) -> float:
        """The unembedding at so many positions."""
        return 2 * positions * self.cfg.d_model * self.cfg.d_vocab

    def forward(self, tokens: float, keep: float = 1, layers: int | None = None) -> float:
        """A forward pass over a row whose images are encoded; of some layers without logits."""
        if layers is not None and layers < self.cfg.n_layers:
            return layers * self.block(tokens)
        return self.cfg.n_layers * self.block(tokens) + self.logits(keep)

    def decode(self, tokens: float, new: int) -> float:
        """`new` further passes of one token each, behind so many tokens."""
        steps = (self.block(1, tokens + i) for i in range(new))
        return self.cfg.n_layers * sum(steps) + new * self.logits(1)

    def picture(self, rows: int, columns: int) -> float:
        """The vision tower and projector on a picture of so many patches."""
        vision, model = self.cfg.vision, self._model
        patches = rows * columns
        tower = 2 * patches * _matrices(model.vision_encoder.patch_embedding)
        tokens = patches + int(vision.has_class_token)
        for layer in range(vision.n_layers):
            seen = tokens
            if vision.window_size is not None and layer not in vision.full_attention_layers:
                seen = min(tokens, (vision.window_size // vision.patch_size) ** 2)
            tower += 2 * tokens * self._vision_block
            tower += 4 * tokens * seen * vision.n_heads * vision.d_head
        image_tokens = patches / vision.merge_size**2
        return tower + 2 * image_tokens * _matrices(model.vision_projector)

    def clean(self, segments: Sequence[Segment]) -> float:
        """The clean walk that forks start from, with its logits, and what the forks of a layer share."""
        layers = sum(s.rows * self.cfg.n_layers * self.block(s.tokens, s.past) for s in segments)
        return layers + sum(s.rows * self.logits(s.keep) for s in segments)

    def head_tables(self) -> float:
        """What the forks of one layer's heads share: each head's way into the layer's neurons.

        Nothing where a norm lies on that way.
        """
        cfg = self.cfg
        if self._norms_behind:
            return 0
        return 2 * cfg.n_heads * cfg.d_head * cfg.d_model * 2 * cfg.d_mlp

    def fork(self, layer: int, segments: Sequence[Segment], heads: bool = True) -> float:
        """An intervention on a head of a layer (or on neurons there) and all that lies above."""
        cfg, top = self.cfg, self.cfg.n_layers - 1
        total = 0.0
        for rows, tokens, past, keep in segments:
            operations = 0.0
            changed = keep if layer == top else tokens
            if self._norms_behind:  # nothing that is behind the change can be left out
                operations += 2 * changed * cfg.d_mlp * cfg.d_model
                if heads:
                    operations += 2 * changed * cfg.d_model * (cfg.n_heads * cfg.d_head + 2 * cfg.d_mlp)
            elif heads:
                operations += 2 * changed * cfg.d_head * (cfg.d_model + 2 * cfg.d_mlp)
                operations += 2 * changed * cfg.d_mlp * cfg.d_model
            if layer < top:
                operations += (top - layer - 1) * self.block(tokens, past)
                early = tokens - keep
                operations += 2 * early * cfg.d_model * 2 * cfg.n_key_value_heads * cfg.d_head
                operations += self.block(keep, past + early)
            total += rows * (operations + self.logits(keep))
        return total


def _matrices(module: nn.Module | Any) -> int:
    """Weights of all matrices of a module: biases and norms are no products."""
    return sum(p.numel() for p in module.parameters() if p.ndim > 1)
