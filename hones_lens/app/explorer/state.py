"""State of an explorer: the selected components and positions, and the edits of the model as hooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from hones_lens.interventions import (
    Hook,
    check_component,
    neuron_hook,
    replace_with_other_heads_mean,
    scale,
    zero,
)
from hones_lens.model import VLMConfig, did_you_mean

LayerIndex = tuple[int, int]  # layer and index
OVERLAYS = ("head", "neuron", "picture")


@dataclass(frozen=True)
class Edit:
    """An edit of one head or one neuron, at every position of the prompt and of the generated tokens.

    Attributes:
        kind: `head` or `neuron`.
        layer, index: Its layer, and its index in the layer.
        factor: The factor on its output. None ablates it: a head becomes the mean of its layer's
            other heads (HONES eq. H1), a neuron becomes zero (HONES eq. H4).
    """

    kind: str
    layer: int
    index: int
    factor: float | None = None

    @property
    def hook(self) -> Hook:
        """The edit as `(name, fn)`, for `run_with_hooks`."""
        if self.kind == "neuron":
            name = neuron_hook(self.layer)
            return zero(name, [self.index]) if self.factor is None else scale(name, [self.index], self.factor)
        if self.factor is None:
            return replace_with_other_heads_mean(self.layer, self.index)
        return scale(f"blocks.{self.layer}.attn.hook_z", [self.index], self.factor, axis=2)

    def __str__(self) -> str:
        name = f"L{self.layer}{'H' if self.kind == 'head' else 'N'}{self.index}"
        return f"{name} ablated" if self.factor is None else f"{name} × {self.factor:g}"


@dataclass(frozen=True)
class State:
    """What an explorer shows, and the edits that are applied to the model.

    Attributes:
        token: The selected position: the query of the attention shown, and where heads and neurons are read.
        lens: The position of the logit lens.
        head, neuron: (layer, index) of the head and the neuron whose details are shown.
        show: The overlay of the picture: the `head`'s attention, the `neuron`'s activation, or nothing
            (`picture`).
        edits: In the order in which they act within a layer; at most one of each head or neuron.
    """

    token: int
    lens: int
    head: LayerIndex
    neuron: LayerIndex
    show: str = "head"
    edits: tuple[Edit, ...] = ()

    @property
    def interventions(self) -> list[Hook]:
        """The edits as hooks, for `run_with_hooks(inputs, fwd_hooks=...)` or `model.hooks(...)`."""
        return [edit.hook for edit in self.edits]

    def edited(self, kind: str, component: LayerIndex, factor: float | None) -> State:
        """This state with one component ablated (None) or scaled; replaces an earlier edit of it."""
        edit = Edit(kind, int(component[0]), int(component[1]), factor)
        return replace(self, edits=(*self.restored(kind, component).edits, edit))

    def restored(self, kind: str, component: LayerIndex) -> State:
        """This state without the edit of one component."""
        remaining = tuple(e for e in self.edits if (e.kind, e.layer, e.index) != (kind, *component))
        return replace(self, edits=remaining)

    def check(self, cfg: VLMConfig, n_tokens: int) -> None:
        """Check the state against the model's shape and the length of the sequence.

        Raises:
            ValueError: A position, layer, head, neuron, factor or view that does not exist; names it.
        """
        for name, position in (("token", self.token), ("lens", self.lens)):
            if not 0 <= position < n_tokens:
                raise ValueError(f"{name}: position {position} is not in 0 … {n_tokens - 1}")
        if self.show not in OVERLAYS:
            raise ValueError(
                f"show: {self.show!r}; valid: {', '.join(OVERLAYS)}{did_you_mean(self.show, OVERLAYS)}"
            )
        components = [("head", self.head), ("neuron", self.neuron)]
        components += [(edit.kind, (edit.layer, edit.index)) for edit in self.edits]
        widths = {"head": cfg.n_heads, "neuron": cfg.d_mlp}
        for kind, (layer, index) in components:
            if kind not in widths:
                raise ValueError(f"an edit of a {kind!r}; valid: head, neuron")
            check_component(kind, layer, index, cfg.n_layers, widths[kind])
        if len({(e.kind, e.layer, e.index) for e in self.edits}) < len(self.edits):
            raise ValueError("one head or neuron is edited twice")
        for edit in self.edits:
            if edit.factor is not None and not abs(edit.factor) <= 1e4:
                raise ValueError(f"{edit}: a factor of at most 10000, please")

    def to_json(self) -> dict[str, Any]:
        """The state as JSON values."""
        return {
            **asdict(self),
            "head": list(self.head),
            "neuron": list(self.neuron),
            "edits": [asdict(edit) for edit in self.edits],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> State:
        """Read what `to_json` or the page wrote.

        Raises:
            ValueError: A field that is missing, unknown or of another kind.
        """
        try:
            edits = tuple(
                Edit(e["kind"], int(e["layer"]), int(e["index"]), _factor(e["factor"])) for e in data["edits"]
            )
            head, neuron = ((int(layer), int(index)) for layer, index in (data["head"], data["neuron"]))
            token, lens = int(data["token"]), int(data["lens"])
            return cls(token=token, lens=lens, head=head, neuron=neuron, show=data["show"], edits=edits)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a state of the explorer: {error!r}") from error


def _factor(value: Any) -> float | None:
    return None if value is None else float(value)
