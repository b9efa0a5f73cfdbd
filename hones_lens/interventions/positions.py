"""`PromptMask`: a mask over positions of prompts that stays valid at every step of `generate`."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from hones_lens.interventions.token_groups import Group, group_name, token_mask
from hones_lens.model import VLMInputs


class PromptMask:
    """A mask over a batch of prompts that also works at every step of `generate`.

    At a step, a hook sees the prompts, or the prompts and all new tokens (without a KV cache), or the newest
    token alone (with one). Any other length raises, so the mask is never applied to wrong positions.

    Args:
        name: The hook, for errors.
        mask: True at the selected positions, [batch pos].
        generated: Whether new tokens are selected; default: in rows whose last prompt token is.

    Raises:
        ValueError: A mask that selects nothing, or prompts of one token and another `generated` than their
            mask: the newest token can't be told from such a prompt.
    """

    def __init__(self, name: str, mask: Bool[Tensor, "batch pos"], generated: bool | None = None):
        self.name, self.mask = name, mask
        self.on_generated = mask[:, -1:] if generated is None else torch.full_like(mask[:, -1:], generated)
        if not bool(mask.any()):
            raise ValueError(f"{name}: the mask selects no position")
        if mask.shape[1] == 1 and not torch.equal(mask, self.on_generated):
            raise ValueError(f"{name}: prompts of one token can't be told from new tokens")
        self._longest = 0  # length of the longest sequence so far

    @classmethod
    def of(
        cls, name: str, group: Group, inputs: VLMInputs | None = None, generated: bool | None = None
    ) -> PromptMask:
        """The mask of a token group.

        Args:
            name: The hook, for errors.
            group: A mask [batch pos]; with inputs also a name or a `Box`.
            inputs: The prompts.
            generated: As above.

        Raises:
            ValueError: A name or a box without inputs, or no mask [batch pos]; and as `token_mask`.
        """
        if inputs is not None:
            return cls(name, token_mask(inputs, group), generated)
        if not isinstance(group, Tensor):
            raise ValueError(f"{name}: to find the group {group_name(group)!r}, give inputs=")
        if group.dtype != torch.bool or group.ndim != 2:
            shape = tuple(group.shape)
            raise ValueError(f"{name}: a mask of {group.dtype} {shape}; give booleans [batch pos]")
        return cls(name, group, generated)

    def over_sequence(self, rows: int, length: int) -> Bool[Tensor, "batch length"]:
        """The mask over whole sequences: prompts and the generated tokens after them.

        Raises:
            ValueError: Sequences that are not these prompts, grown by one token at a time.
        """
        prompt_length = self.mask.shape[1]
        grown = prompt_length < length <= self._longest + 1
        if rows != len(self.mask) or not (length == prompt_length or grown):
            raise self._shape_error(rows, length)
        self._longest = length
        return torch.cat((self.mask, self.on_generated.expand(-1, length - prompt_length)), dim=1)

    def over_visible(self, rows: int, n: int) -> Bool[Tensor, "batch n"]:
        """The mask over the positions that a hook sees: whole sequences, or their newest token alone.

        Raises:
            ValueError: As `over`.
        """
        if n == 1 < self.mask.shape[1] and self._longest and rows == len(self.mask):
            return self.on_generated
        return self.over_sequence(rows, n)

    def _shape_error(self, rows: int, n: int) -> ValueError:
        expected = tuple(self.mask.shape)
        return ValueError(f"{self.name}: mask of shape {expected} for {rows} rows of {n} positions")
