"""`PromptMask`: positions of prompts, found again at every step of `generate`."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from hones_lens.interventions.token_groups import Group, group_name, token_mask
from hones_lens.model import VLMInputs


class PromptMask:
    """A mask over a batch of prompts, read at every step of `generate` too.

    A step shows a hook the prompts, or the prompts and all new tokens (without a KV cache), or the newest
    token alone (with one). Anything else raises: the mask never lies on other positions than its own.

    Args:
        name: The hook, for errors.
        mask: True at the positions meant.
        generated: Whether new tokens are meant; default: where the row's last prompt token is.

    Raises:
        ValueError: A mask that selects nothing, or prompts of one token and another `generated` than their
            mask: the newest token can't be told from such a prompt.
    """

    def __init__(self, name: str, mask: Bool[Tensor, "batch pos"], generated: bool | None = None):
        self.name, self.mask = name, mask
        self.behind = mask[:, -1:] if generated is None else torch.full_like(mask[:, -1:], generated)
        if not bool(mask.any()):
            raise ValueError(f"{name}: the mask selects no position")
        if mask.shape[1] == 1 and not torch.equal(mask, self.behind):
            raise ValueError(f"{name}: prompts of one token can't be told from new tokens")
        self._longest = 0  # sequence so far

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

    def over(self, rows: int, length: int) -> Bool[Tensor, "batch length"]:
        """The mask over whole sequences: prompts, and what was generated behind them.

        Raises:
            ValueError: Sequences that are not these prompts, grown by one token at a time.
        """
        prompt = self.mask.shape[1]
        grown = prompt < length <= self._longest + 1
        if rows != len(self.mask) or not (length == prompt or grown):
            raise self._misfit(rows, length)
        self._longest = length
        return torch.cat((self.mask, self.behind.expand(-1, length - prompt)), dim=1)

    def shown(self, rows: int, n: int) -> Bool[Tensor, "batch n"]:
        """The mask over what a hook sees: whole sequences, or their newest token alone.

        Raises:
            ValueError: As `over`.
        """
        if n == 1 < self.mask.shape[1] and self._longest and rows == len(self.mask):
            return self.behind
        return self.over(rows, n)

    def _misfit(self, rows: int, n: int) -> ValueError:
        fits = tuple(self.mask.shape)
        return ValueError(f"{self.name}: mask of shape {fits} for {rows} rows of {n} positions")
