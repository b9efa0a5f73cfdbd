"""How many rows fit into one pass."""

from __future__ import annotations

import os

import torch

from hones_lens.model import HookedVLM

_SHARE = 0.4  # of what is free, for a pass
_DECODING = 0.25  # as much as that share of a pass's memory for keys and values of rows that decode
_TOKENS_AT_ONCE_ON_CPU = 1536  # more no longer fit its caches, and are slower


class Budget:
    """Memory for the activations of one pass.

    Args:
        model: The model that runs.
        gigabytes: How much; default two fifths of what is free now.

    Raises:
        ValueError: A budget that is not above zero.
    """

    def __init__(self, model: HookedVLM, gigabytes: float | None = None):
        if gigabytes is not None and not gigabytes > 0:
            raise ValueError(f"the memory budget must be above 0 GB, not {gigabytes}")
        self.model = model
        self.bytes = _SHARE * free_bytes(model.cfg.device) if gigabytes is None else gigabytes * 1e9
        self._halved = 0

    @property
    def bytes_per_token(self) -> int:
        """What a token of a forked row takes: streams, heads, neurons, and keys and values of all layers."""
        cfg = self.model.cfg
        width = 6 * cfg.d_model + 3 * cfg.n_heads * cfg.d_head + 6 * cfg.d_mlp
        return width * torch.finfo(cfg.dtype).bits // 8 + self.kept_per_token

    @property
    def kept_per_token(self) -> int:
        """What the keys and values of a token take, in all layers."""
        cfg = self.model.cfg
        return 2 * cfg.n_layers * cfg.n_key_value_heads * cfg.d_head * torch.finfo(cfg.dtype).bits // 8

    def rows(self, tokens: int, kept: int = 1) -> int:
        """How many rows of so many tokens fit, of which `kept` have logits; at least one."""
        logits = 12 * kept * self.model.cfg.d_vocab
        most = int(self.bytes // (tokens * self.bytes_per_token + logits))
        if self.model.cfg.device.type == "cpu":
            most = min(most, _TOKENS_AT_ONCE_ON_CPU // tokens)
        return max(1, most >> self._halved)

    def decoding_rows(self, tokens: int) -> int:
        """How many rows of so many tokens may wait and decode together; at least one."""
        available = _DECODING * self.bytes
        if self.model.cfg.device.type == "cpu":
            available = min(available, _TOKENS_AT_ONCE_ON_CPU * self.bytes_per_token)
        return max(1, int(available // (tokens * self.kept_per_token)) >> self._halved)

    def halve(self, error: RuntimeError, rows: int) -> None:
        """After a pass that ran out of memory: from now on half as many rows.

        Raises:
            RuntimeError: The same error, where it is another one, or where there was a single row.
        """
        if rows == 1 or not _is_out_of_memory(error):
            raise error
        self._halved += 1
        if self.model.cfg.device.type == "cuda":
            torch.cuda.empty_cache()


def _is_out_of_memory(error: RuntimeError) -> bool:
    messages = ("not enough memory", "can't allocate memory")  # PyTorch's words on a CPU
    return isinstance(error, torch.OutOfMemoryError) or any(message in str(error) for message in messages)


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
