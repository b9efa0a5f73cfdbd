"""Senders and receivers of path patching: heads send; heads' q, k or v, neurons and the logits receive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from hones_lens.interventions import check_component
from hones_lens.model import HookedVLM, takes_iterables

Head = tuple[int, int]
Receiver = Literal["logits"] | tuple[int, int] | tuple[int, int, str]
Receivers = str | Sequence[Receiver] | Mapping[str, Sequence[Receiver]]


@takes_iterables
def every_receiver(model: HookedVLM, senders: Sequence[Head], neurons: bool = True) -> list[Receiver]:
    """All possible receivers of heads: q, k and v of the layers above, neurons, and the logits.

    Args:
        model: The model.
        senders: Heads (layer, head).
        neurons: With neurons, of the lowest sender's layer and above; without them, paths have to go
            `through_mlps` to be all paths.
    """
    cfg, first = model.cfg, min(layer for layer, _ in senders)
    counts = {"q": cfg.n_heads, "k": cfg.n_key_value_heads, "v": cfg.n_key_value_heads}
    receivers: list[Receiver] = ["logits"]
    for layer in range(first, cfg.n_layers):
        if layer > first:
            receivers += [(layer, head, part) for part, n in counts.items() for head in range(n)]
        if neurons:
            receivers += [(layer, i) for i in range(cfg.d_mlp)]
    return receivers


def receiver_hook(receiver: Receiver) -> str:
    """Name of the hook point at which a head or neuron receives."""
    if len(receiver) == 3:
        return f"blocks.{receiver[0]}.attn.hook_{receiver[2]}"
    return f"blocks.{receiver[0]}.mlp.hook_post"


def check_senders(model: HookedVLM, heads: Sequence[Head]) -> None:
    """Raise ValueError for no heads, one twice, or one that the model does not have."""
    if not heads or len(set(heads)) < len(heads):
        raise ValueError(f"senders {list(heads)}: give at least one head, and each once")
    for layer, head in heads:
        check_component("head", layer, head, model.cfg.n_layers, model.cfg.n_heads)


def receiver_groups(model: HookedVLM, receivers: Receivers) -> dict[str, list[Receiver]]:
    """Receivers grouped by the name under which they are patched together.

    Raises:
        ValueError: None at all, one twice, or one that the model does not have.
    """
    if isinstance(receivers, Mapping):
        groups = {name: list(members) for name, members in receivers.items()}
    else:
        listed: list = [receivers] if isinstance(receivers, str) else list(receivers)
        groups = {_receiver_name(model, receiver): [receiver] for receiver in listed}
        if len(groups) < len(listed):
            raise ValueError("a receiver is given twice")
    for name, members in groups.items():
        if not members or len(set(members)) < len(members):
            raise ValueError(f"receivers {name!r}: give at least one, and each once")
        for receiver in members:
            _receiver_name(model, receiver)
    if not groups:
        raise ValueError("no receivers")
    return groups


def _receiver_name(model: HookedVLM, receiver: object) -> str:
    """Label of a receiver: `logits`, `3.5.q`, or `3.n17` for a neuron."""
    cfg = model.cfg
    if receiver == "logits":
        return "logits"
    if not isinstance(receiver, tuple) or len(receiver) not in (2, 3):
        raise ValueError(
            f"receiver {receiver!r} is neither 'logits', a head (layer, head, 'q', 'k' or 'v'), "
            "nor a neuron (layer, index)"
        )
    key_values = ("key-value head", cfg.n_key_value_heads)
    kinds = {"q": ("head", cfg.n_heads), "k": key_values, "v": key_values, "neuron": ("neuron", cfg.d_mlp)}
    layer, index, part = receiver if len(receiver) == 3 else (*receiver, "neuron")
    if part not in kinds:
        raise ValueError(f"receiver {receiver!r}: heads receive at 'q', 'k' or 'v'")
    kind, per_layer = kinds[part]
    check_component(kind, layer, index, cfg.n_layers, per_layer)
    return f"{layer}.n{index}" if part == "neuron" else f"{layer}.{index}.{part}"
