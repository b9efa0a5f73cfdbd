"""How many rows fit into one pass."""

from __future__ import annotations

import torch

from hones_lens.model import Allowance, HookedVLM, VLMInputs

_DECODING = 0.25  # as much as that share of a pass's memory for keys and values of rows that decode
_TOKENS_AT_ONCE_ON_CPU = 1536  # more no longer fit its caches, and are slower


class Budget(Allowance):
    """Memory for the activations of one pass.

    Args:
        model: The model that runs.
        gigabytes: How much; default that of `bounded_by`, else two fifths of what is free now.

    Raises:
        ValueError: A budget that is not above zero.
    """

    def __init__(self, model: HookedVLM, gigabytes: float | None = None):
        super().__init__(model.cfg.device, gigabytes)
        self.model = model

    @property
    def bytes_per_token(self) -> int:
        """What a token of a forked row takes: streams, heads, neurons, and keys and values of all layers."""
        return self._one_layer + self.kept_per_token

    @property
    def kept_per_token(self) -> int:
        """What the keys and values of a token take, in all layers."""
        cfg = self.model.cfg
        return 2 * cfg.n_layers * cfg.n_key_value_heads * cfg.d_head * self._number

    @property
    def _one_layer(self) -> int:
        cfg = self.model.cfg
        streams = 6 + cfg.n_deepstack
        return (streams * cfg.d_model + 3 * cfg.n_heads * cfg.d_head + 6 * cfg.d_mlp) * self._number

    @property
    def _graph_per_token(self) -> int:
        """What a token takes where the graph of all layers is kept for a backward pass."""
        cfg = self.model.cfg
        a_layer = 10 * cfg.d_model + 7 * cfg.n_heads * cfg.d_head + 6 * cfg.d_mlp
        return cfg.n_layers * a_layer * self._number

    @property
    def _number(self) -> int:
        return torch.finfo(self.model.cfg.dtype).bits // 8

    def rows(self, tokens: int, kept: int = 1) -> int:
        """How many rows of so many tokens fit, of which `kept` have logits; at least one."""
        most = self._rows(tokens * self.bytes_per_token, kept)
        if self.device.type == "cpu":
            most = min(most, _TOKENS_AT_ONCE_ON_CPU // tokens)
        return max(1, most)

    def pass_rows(self, inputs: VLMInputs, kept: int = 1) -> int:
        """How many rows of these inputs fit into a plain pass, with logits at `kept` positions."""
        return max(1, self._rows(inputs.input_ids.shape[1] * self._one_layer, kept))

    def gradient_rows(self, tokens: int, kept: int = 1) -> int:
        """How many rows of so many tokens fit into a forward and a backward pass."""
        return max(1, self._rows(tokens * self._graph_per_token, kept))

    def _rows(self, row_bytes: int, kept: int) -> int:
        return int(self.bytes // (row_bytes + 12 * kept * self.model.cfg.d_vocab))

    def decoding_rows(self, tokens: int) -> int:
        """How many rows of so many tokens may wait and decode together; at least one."""
        available = _DECODING * self.bytes
        if self.device.type == "cpu":
            available = min(available, _TOKENS_AT_ONCE_ON_CPU * self.bytes_per_token)
        return max(1, int(available // (tokens * self.kept_per_token)))
