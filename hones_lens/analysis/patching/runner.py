"""Running activation patching: the metric of every pair under every patch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from hones_lens import engine
from hones_lens.analysis.patching.batches import (
    PairBatch,
    batches_of_rows,
    check_batches,
    pair_batch,
    pair_batches,
)
from hones_lens.analysis.patching.metrics import Metric
from hones_lens.analysis.patching.outcome import gap_notes
from hones_lens.analysis.patching.pair_answers import PairAnswers, answers_of_batch, joined_answers
from hones_lens.analysis.patching.pairs import PatchPairs
from hones_lens.analysis.patching.patch_batch import PatchBatch
from hones_lens.analysis.patching.sites import PatchSite, Targets
from hones_lens.engine import Done, SharedJournal, SweepOptions, Unit, check_shareable
from hones_lens.model import HookedVLM, bounded_by


@dataclass
class PatchMeasurements:
    """The metric of every pair, unpatched and under each patch.

    Attributes:
        clean, corrupted: Metric of the two unpatched runs, [pair].
        values: Metric under each patch, [patch pair].
        answers: What the model answers in the two unpatched runs.
        run, full: Number of patches that were run, and of those run as full passes, both times pairs. Where
            both runs have the same activations, nothing is run.
    """

    clean: Tensor
    corrupted: Tensor
    values: Float[Tensor, "patch pair"]
    answers: PairAnswers
    run: int = 0
    full: int = 0

    def change(self, direction: str) -> Float[Tensor, "patch pair"]:
        """Metric with the patch minus metric without it."""
        return self.values - (self.clean if direction == "noise" else self.corrupted)

    def gap(self, direction: str) -> Float[Tensor, " pair"]:
        """Metric of the source run minus metric of the run that is patched."""
        return (self.corrupted - self.clean) * (1 if direction == "noise" else -1)

    def notes(self, name: str) -> tuple[str, ...]:
        """The baselines and the number of patches run, as lines of text."""
        lines = [f"{name}: clean {self.clean.mean():.4g}, corrupted {self.corrupted.mean():.4g}"]
        lines += gap_notes(self.clean - self.corrupted, "denoise")
        cells, share = self.values.numel(), self.full / max(1, self.run)
        lines.append(
            f"{self.run:,} of {cells:,} patches run, {100 * share:.0f} % of them as full passes; in the "
            "others both runs have the same activations"
        )
        return tuple(lines)


@dataclass(frozen=True, eq=False)
class PatchWork:
    """Patches of some pairs; what a process needs that has its own model.

    Attributes:
        pairs, site, targets, positions, direction, metric, options: As for `measure_patches`.
    """

    pairs: PatchPairs
    site: PatchSite
    targets: Targets
    positions: Mapping[str, Bool[Tensor, "pair pos"]]
    direction: str
    metric: str | Metric
    options: SweepOptions

    def run_batch(
        self, model: HookedVLM, start: int, batch: PairBatch, tick: Callable[[int], object]
    ) -> dict[str, Any]:
        """What the journal keeps of one batch."""
        masks = {name: batch.mask_rows(mask, start) for name, mask in self.positions.items()}
        patches = PatchBatch(model, batch, self.site, self.targets, masks, self.metric, self.options)
        return {**patches.run(self.direction, tick), "answers": answers_of_batch(batch).to_json()}

    @torch.no_grad()
    def __call__(self, model: HookedVLM) -> Done:
        """All pairs: values of both runs, then of each patch, [2 + patch, pair, 3].

        Beside the value of a run its margin and whether the answers are right, as in `PairAnswers`; beside
        that of a patch whether it was run, and whether as a full pass.
        """
        parts: list[np.ndarray] = []
        batches = pair_batches(model, self.pairs, self.direction, self.options.batch_size, self.metric)
        for start, batch in batches:
            record = self.run_batch(model, start, batch, lambda cells: None)
            answers, values = record["answers"], np.array(record["values"])
            runs = [[record[run], answers[run], answers["right"]] for run in ("clean", "corrupted")]
            ran = np.broadcast_to(np.array(record["ran"])[:, None], values.shape)
            patches = np.stack([values, ran, ran * record["full"]], axis=-1)
            parts.append(np.concatenate([np.array(runs, dtype=np.float64).transpose(0, 2, 1), patches]))
        return Done(np.concatenate(parts, axis=1))

    def units(self, portion: range, n_layers: int) -> list[tuple[Sequence[int], Unit]]:
        """The patches of some pairs by the layers where they begin; with the numbers of their targets."""
        pairs, masks = self.pairs, self.positions
        if len(portion) < len(pairs):
            pairs = pairs[portion.start : portion.stop]
            masks = {name: mask[portion.start : portion.stop] for name, mask in masks.items()}
        cells, units = self.targets.cells, []
        options = replace(self.options, journal=None, tally=None, progress=False)
        for i, block in enumerate(engine.layer_blocks([cell[0][0] for cell in cells], n_layers)):
            targets = replace(self.targets, cells=tuple(cells[n] for n in block))
            work = replace(self, pairs=pairs, positions=masks, targets=targets, options=options)
            n = len(block) * len(masks)
            name = f"patch/{portion.start}-{portion.stop}/{i}"
            units.append(
                (block, Unit(name, ("patch", "pair"), (2 + n, len(portion)), work, n * len(portion)))
            )
        return units


def _key(start: int) -> str:
    return f"patch/{start}"


def _fill(journal: SharedJournal, work: PatchWork, n_layers: int, tick: Callable[[int], object]) -> None:
    """Have what the journal lacks computed."""
    size, groups = work.options.batch_size, len(work.positions)
    portions = engine.chunks(len(work.pairs), size)
    missing = [p for p in portions if any(journal.get(_key(start)) is None for start in p[::size])]
    units = {portion: work.units(portion, n_layers) for portion in missing}
    n_patches = len(work.targets.cells) * groups
    tick(n_patches * sum(len(portion) for portion in portions if portion not in missing))
    done = journal.compute([unit for listed in units.values() for _, unit in listed], tick)
    for portion, listed in units.items():
        values = np.zeros((n_patches, len(portion), 3))
        ends = np.zeros((2, len(portion), 3))
        for block, _ in listed:
            result = next(done).values
            rows = [cell * groups + group for cell in block for group in range(groups)]
            ends, values[rows] = result[:2], result[2:]
        for start in portion[::size]:
            first = start - portion.start
            batch, (clean, corrupted) = values[:, first : first + size], ends[:, first : first + size]
            answers = {"clean": clean[:, 1], "corrupted": corrupted[:, 1], "right": clean[:, 2] > 0}
            journal[_key(start)] = {
                "clean": clean[:, 0].tolist(),
                "corrupted": corrupted[:, 0].tolist(),
                "values": batch[..., 0].tolist(),
                "ran": batch[:, 0, 1].astype(int).tolist(),
                "full": bool(batch[..., 2].any()),
                "answers": {name: values.tolist() for name, values in answers.items()},
            }


@torch.no_grad()
def measure_patches(
    model: HookedVLM,
    pairs: PatchPairs,
    site: PatchSite,
    targets: Targets,
    positions: Mapping[str, Bool[Tensor, "pair pos"]],
    options: SweepOptions,
    *,
    direction: str,
    metric: str | Metric,
) -> PatchMeasurements:
    """Patch every target at every group of positions; the values by pair behind `patch_activations`.

    Raises:
        ValueError, FloatingPointError: As `patch_activations`.
    """
    check_batches(direction, options.batch_size)
    n_patches, records, journal = len(targets.cells) * len(positions), [], options.journal
    total, desc = n_patches * len(pairs), f"patching · {site.what}"
    work = PatchWork(pairs, site, targets, dict(positions), direction, metric, options)
    bar = tqdm(total=total, desc=desc, disable=not options.progress)
    with bounded_by(options.memory_budget), bar:
        engine.expect(journal, "patch", len(pairs), options.batch_size)
        if isinstance(journal, SharedJournal):
            check_shareable(model)
            _fill(journal, work, model.cfg.n_layers, bar.update)
        for rows in batches_of_rows(len(pairs), options.batch_size):
            key = _key(rows.start)
            record = None if journal is None else journal.get(key)
            if record is None:
                batch = pair_batch(model, pairs, rows, direction, metric)
                record = work.run_batch(model, rows.start, batch, bar.update)
                if journal is not None:
                    journal[key] = record
            elif not isinstance(journal, SharedJournal):
                bar.update(n_patches * len(rows))
            records.append(record)
    clean, corrupted = (
        torch.tensor([x for r in records for x in r[name]], dtype=torch.float64)
        for name in ("clean", "corrupted")
    )
    values = torch.cat([torch.tensor(r["values"], dtype=torch.float64) for r in records], dim=1)
    ran = [sum(r["ran"]) * len(r["clean"]) for r in records]
    run, full = sum(ran), sum(n for n, r in zip(ran, records, strict=True) if r["full"])
    answers = joined_answers([PairAnswers.from_json(r["answers"], pairs.foil is not None) for r in records])
    return PatchMeasurements(clean, corrupted, values, answers, run, full)
