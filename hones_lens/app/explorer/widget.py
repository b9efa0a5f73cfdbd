"""The explorer as a notebook widget: Python holds the state, and the page draws it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from hones_lens.app.explorer import page
from hones_lens.app.explorer.state import LayerIndex, State
from hones_lens.app.explorer.views import SECTIONS, ExplorerViews, section_inputs
from hones_lens.interventions import Hook
from hones_lens.model import VLMInputs


class Explorer(anywidget.AnyWidget):
    """One prompt to click through; make it with `explore(model, image, prompt)`.

    Setting `state`, or calling a method that does, redraws every place where the explorer is shown.

    Args:
        views: Computes what is shown; several explorers may share one.
    """

    _esm = page.script()
    _css = page.stylesheet()
    scene = traitlets.Dict().tag(sync=True)
    # The state of the sections, and the number `n` of the page's last request.
    shown = traitlets.Dict().tag(sync=True)
    # The state that the page requests, and the number `n` of the request.
    asked = traitlets.Dict().tag(sync=True)
    answer = traitlets.Dict().tag(sync=True)
    map = traitlets.Dict().tag(sync=True)
    attention = traitlets.Dict().tag(sync=True)
    head = traitlets.Dict().tag(sync=True)
    neuron = traitlets.Dict().tag(sync=True)
    lens = traitlets.Dict().tag(sync=True)

    def __init__(self, views: ExplorerViews):
        self.views = views
        self._state = views.start()
        self._section_inputs: dict[str, tuple[Any, ...]] = {}
        sections = {name: views.section(name, self._state) for name in SECTIONS}
        self._section_inputs = {name: section_inputs(name, self._state) for name in SECTIONS}
        super().__init__(scene=views.scene(), shown={**self._state.to_json(), "n": 0}, **sections)

    # -- the state ---------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """What is shown, and the edits of the model."""
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
        return self.views.answered.prompt

    @property
    def text(self) -> str:
        """The model's answer under the edits."""
        return self.views.text(self._state.edits)

    def select(
        self,
        head: LayerIndex | None = None,
        neuron: LayerIndex | None = None,
        token: int | None = None,
        lens: int | None = None,
    ) -> None:
        """Select a head or a neuron as (layer, index), a token, or the position of the logit lens.

        Raises:
            ValueError: It does not exist.
        """
        given = {"head": head, "neuron": neuron, "token": token, "lens": lens}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if head is not None or neuron is not None:
            changes["show"] = "neuron" if head is None else "head"
        self.state = replace(self._state, **changes)

    def ablate(self, *, head: LayerIndex | None = None, neuron: LayerIndex | None = None) -> None:
        """Replace a head by the mean of its layer's other heads, or set a neuron to zero.

        Raises:
            ValueError: It does not exist, or not exactly one of the two is given.
        """
        self.state = self._state.edited(*_single_component(head, neuron), None)

    def scale(
        self, factor: float, *, head: LayerIndex | None = None, neuron: LayerIndex | None = None
    ) -> None:
        """Multiply the output of a head or a neuron; 1 leaves it as it is.

        Raises:
            ValueError: It does not exist, or not exactly one of the two is given.
        """
        kind, component = _single_component(head, neuron)
        restored = self._state.restored(kind, component)
        self.state = restored if factor == 1 else restored.edited(kind, component, float(factor))

    def clear(self) -> None:
        """Undo all edits."""
        self.state = replace(self._state, edits=())

    # -- showing -----------------------------------------------------------------------------------

    @traitlets.observe("asked")
    def _answer_page(self, change: Any) -> None:
        """Show the state that a click on the page requests."""
        asked = dict(change["new"])
        n = asked.pop("n")
        self._show(State.from_json(asked), n)

    def _show(self, state: State, n: int) -> None:
        """Recompute the sections whose inputs changed, and send them in one message."""
        state.check(self.views.model.cfg, self.views.answered.n_tokens)
        inputs = {name: section_inputs(name, state) for name in SECTIONS}
        stale = [name for name in SECTIONS if inputs[name] != self._section_inputs[name]]
        sections = {name: self.views.section(name, state) for name in stale}
        with self.hold_sync():
            for name, section in sections.items():
                setattr(self, name, section)
            self.shown = {**state.to_json(), "n": n}
        self._state, self._section_inputs = state, inputs

    def save(self, file: str | Path, most_bytes: int | None = None) -> Path:
        """Write a page that works without Python, of a size that can be limited; see `page.write_page`."""
        return page.write_page(self.views, self._state, file, most_bytes)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        """The widget, with a static HTML summary for viewers without a kernel."""
        bundle = super()._repr_mimebundle_(**options)
        if bundle is None:
            return None
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return {**data, "text/html": page.static_html(self.views, self._state)}, metadata


def _single_component(head: LayerIndex | None, neuron: LayerIndex | None) -> tuple[str, LayerIndex]:
    if head is not None and neuron is None:
        return "head", head
    if neuron is not None and head is None:
        return "neuron", neuron
    raise ValueError("give a head or a neuron, as (layer, index)")
