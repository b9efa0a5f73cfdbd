"""Estimate of the cost of a patching before it starts, without its model's weights (`hones patch --plan`)."""

from __future__ import annotations

from typing import Any

from hones_lens.analysis import as_patch_site
from hones_lens.app.runs.lengths import Lengths
from hones_lens.app.runs.machines import Machines, duration, memory_of, total_of
from hones_lens.app.runs.operations import Operations, Segment
from hones_lens.app.runs.patch import PairsChoice, patched_targets
from hones_lens.engine import MAX_NEW_TOKENS
from hones_lens.model import HookedVLM

_GROUPS = 3  # of positions, where none are given: image, question, last
_CELL_BYTES = 25  # of a pair under a patch, in the journal and in the result
_PASSES = (
    9  # of a pair unpatched: for its answers, logits and activations, two each; and what forks start from
)
_PICTURES = 6  # that are encoded for them


def plan_patching(
    model: HookedVLM,
    choice: PairsChoice,
    options: dict[str, Any],
    machines: Machines,
    memory_budget: float | None = None,
    **bounds: int | None,
) -> list[str]:
    """Lines that give patches, operations, memory, disk and time, at most.

    A pair's length is that of the first. Every patch is taken to be run, though none is where both runs have
    the same activations. That groups and boxes are there is not checked, nor that positions are the same
    tokens in all pairs.

    Args:
        model: The model, or its sizes (`model_without_weights`).
        choice: The pairs.
        options: Those of `patch_activations`.
        machines: On what.
        memory_budget: GB for what runs at once.
        bounds: `min_pixels` and `max_pixels` of a picture.

    Raises:
        ValueError: A layer, head or unit that is not there.
    """
    site, (pairs, size, prompt, answer) = as_patch_site(options["what"]), choice.first_of()
    targets, lengths = patched_targets(model, options), Lengths(model, **bounds)
    asked, keep = lengths.asked(size, prompt), max(1, lengths.of_text(answer))
    tokens, metric = asked + keep - 1, options["metric"]
    count = Operations(model)
    picture = lengths.n_grids(size) * count.picture(*lengths.grid(size))
    segment = Segment(1, tokens, 0, keep)

    def patch(layer: int) -> float:
        if metric == "task":
            decoded = count.forward(asked) + count.decode(asked, MAX_NEW_TOKENS - 1)
            return decoded + picture
        if site.vision:
            return count.forward(tokens, keep) + picture
        return count.fork(layer, [segment], heads=site.what == "z") + count.block(tokens)

    n_groups = _n_groups(options, tokens, site.vision)
    patches = len(targets.cells) * n_groups
    unpatched = _PASSES * count.forward(tokens, keep) + _PICTURES * picture
    operations = pairs * (n_groups * sum(patch(cell[0][0]) for cell in targets.cells) + unpatched)
    rows, seconds = patches * pairs, operations / machines.throughput
    return [
        f"{model.cfg.model_name}: {options['what']} by {options['by']}, {pairs} pairs of ~{tokens} tokens, "
        f"on {machines.name}",
        f"  patch: {patches:,} patches × {pairs} pairs = {rows:,} rows, {operations:.2g} FLOP, about "
        f"{duration(seconds)}",
        f"  memory: {memory_of(model, tokens, machines, memory_budget)}",
        f"  disk: about {rows * _CELL_BYTES / 1e6:,.1f} MB for the run folder",
        f"  {total_of(operations, machines)}",
    ]


def _n_groups(options: dict[str, Any], tokens: int, vision: bool) -> int:
    """How many groups of positions are patched."""
    if options["by"] == "group":
        return len(options["groups"] or ()) or (1 if vision else _GROUPS)
    return tokens if options["by"] == "position" else 1
