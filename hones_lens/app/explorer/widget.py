"""The explorer as a widget: the state in Python, the drawing in the page, kept equal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from hones_lens.app.explorer import page
from hones_lens.app.explorer.state import Place, State
from hones_lens.app.explorer.views import SECTIONS, Views, reads
from hones_lens.interventions import Hook
from hones_lens.model import VLMInputs


class Explorer(anywidget.AnyWidget):
    """One prompt to click through; make it with `explore(model, image, prompt)`.

    Setting `state`, or calling a method that does, redraws every place where the explorer is shown.

    Args:
        views: Computes what is shown; several explorers may have the same.
    """

    _esm = page.script()
    _css = page.stylesheet()
    scene = traitlets.Dict().tag(sync=True)
    shown = traitlets.Dict().tag(
        sync=True
    )  # the state that the sections are of, and n of the page's last word
    asked = traitlets.Dict().tag(
        sync=True
    )  # the state that the page asks for, and which word of its own it is
    answer = traitlets.Dict().tag(sync=True)
    map = traitlets.Dict().tag(sync=True)
    attention = traitlets.Dict().tag(sync=True)
    head = traitlets.Dict().tag(sync=True)
    neuron = traitlets.Dict().tag(sync=True)
    lens = traitlets.Dict().tag(sync=True)

    def __init__(self, views: Views):
        self.views = views
        self._state = views.start()
        self._made: dict[str, tuple[Any, ...]] = {}
        sections = {name: views.section(name, self._state) for name in SECTIONS}
        self._made = {name: reads(name, self._state) for name in SECTIONS}
        super().__init__(scene=views.scene(), shown={**self._state.to_json(), "n": 0}, **sections)

    # -- the state ---------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """What is shown, and what is changed in the model."""
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        self._show(state, self.shown["n"])

    @property
    def interventions(self) -> list[Hook]:
        """The edits as (name, fn), for `model.run_with_hooks(explorer.inputs, fwd_hooks=...)`."""
        return self._state.interventions

    @property
    def inputs(self) -> VLMInputs:
        """The prompt with its pictures, one row."""
        return self.views.said.prompt

    @property
    def text(self) -> str:
        """What the model says under the edits."""
        return self.views.text(self._state.edits)

    def select(
        self,
        head: Place | None = None,
        neuron: Place | None = None,
        token: int | None = None,
        lens: int | None = None,
    ) -> None:
        """Look at a head or a neuron, (layer, index), from a token, or at the lens of a position.

        Raises:
            ValueError: One that does not exist.
        """
        given = {"head": head, "neuron": neuron, "token": token, "lens": lens}
        parts: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if head is not None or neuron is not None:
            parts["show"] = "neuron" if head is None else "head"
        self.state = replace(self._state, **parts)

    def ablate(self, *, head: Place | None = None, neuron: Place | None = None) -> None:
        """Replace a head by the mean of its layer's others, or set a neuron to zero.

        Raises:
            ValueError: One that does not exist, or not exactly one of the two.
        """
        self.state = self._state.edited(*_one(head, neuron), None)

    def scale(self, factor: float, *, head: Place | None = None, neuron: Place | None = None) -> None:
        """Multiply the output of a head or a neuron; 1 leaves it as it is.

        Raises:
            ValueError: One that does not exist, or not exactly one of the two.
        """
        kind, place = _one(head, neuron)
        restored = self._state.restored(kind, place)
        self.state = restored if factor == 1 else restored.edited(kind, place, float(factor))

    def clear(self) -> None:
        """Undo all edits."""
        self.state = replace(self._state, edits=())

    # -- showing -----------------------------------------------------------------------------------

    @traitlets.observe("asked")
    def _answer_page(self, change: Any) -> None:
        """A click: show what it asks for."""
        asked = dict(change["new"])
        n = asked.pop("n")
        self._show(State.from_json(asked), n)

    def _show(self, state: State, n: int) -> None:
        """Make the sections anew that differ, and send them in one message."""
        state.check(self.views.model.cfg, self.views.said.n_tokens)
        made = {name: reads(name, state) for name in SECTIONS}
        stale = [name for name in SECTIONS if made[name] != self._made[name]]
        found = {name: self.views.section(name, state) for name in stale}
        with self.hold_sync():
            for name, section in found.items():
                setattr(self, name, section)
            self.shown = {**state.to_json(), "n": n}
        self._state, self._made = state, made

    def save(self, file: str | Path) -> Path:
        """Write a page to click through without Python; see `page.write_page`."""
        return page.write_page(self.views, self._state, file)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        """The widget, and for where no kernel runs the picture, the prompt and the answer as HTML."""
        bundle = super()._repr_mimebundle_(**options)
        if bundle is None:
            return None
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return {**data, "text/html": page.still(self.views, self._state)}, metadata


def _one(head: Place | None, neuron: Place | None) -> tuple[str, Place]:
    if (head is None) == (neuron is None):
        raise ValueError("give a head or a neuron, as (layer, index)")
    return ("head", head) if head is not None else ("neuron", neuron)  # type: ignore[return-value]
