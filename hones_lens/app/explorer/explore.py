"""The explorer: one linked view of a prompt's picture, tokens, heads and neurons, and of edits to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hones_lens.hones import HeadScores
from hones_lens.model import HookedVLM, Pictures, takes_iterables

if TYPE_CHECKING:
    from hones_lens.app.explorer.widget import Explorer


@takes_iterables
def explore(
    model: HookedVLM,
    image: Pictures,
    prompt: str,
    heads: HeadScores | None = None,
    max_new_tokens: int = 12,
) -> Explorer:
    """Explore one prompt by clicking, in Jupyter or marimo.

    Args:
        model: The model.
        image: The prompt's picture (PIL image, path or uint8 array), several, or None.
        prompt: The user's text; see a task's `prompt(example)`.
        heads: Scores for the map of heads, such as those of `localize_heads`; default: what each head adds
            directly to the logit of the answer.
        max_new_tokens: Longest answer.

    Returns:
        A widget. `explorer.state` is what is shown and changed; `explorer.interventions` goes into
        `run_with_hooks`.

    Raises:
        ImportError: Without the extra `notebook`; names it.
        FileNotFoundError, ValueError: A picture or prompt that can't be used, or scores of another model.
    """
    try:
        from hones_lens.app.explorer.widget import Explorer
    except ModuleNotFoundError as error:
        if error.name not in ("anywidget", "ipywidgets", "traitlets"):
            raise
        raise ImportError(
            "the explorer needs the extra `notebook`: pip install hones-lens[notebook]"
        ) from error
    from hones_lens.app.explorer.views import ExplorerViews

    return Explorer(ExplorerViews(model, image, prompt, heads, max_new_tokens))
