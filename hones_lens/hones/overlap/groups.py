"""Which task neurons tasks share, and how many more than by chance (HONES eq. H6)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import combinations
from typing import ClassVar

import numpy as np
import pandas as pd

from hones_lens.hones.attribution.neuron_scores import NeuronScores
from hones_lens.hones.masking import Neurons
from hones_lens.interventions import check_component
from hones_lens.model import takes_iterables
from hones_lens.results import Result

_DEGREES = {2: "pair", 3: "triple"}
Neuron = tuple[int, int]


@dataclass(frozen=True)
class SharedNeurons:
    """How many neurons several tasks share, against chance.

    Attributes:
        tasks: Whose selections; neurons that further tasks selected too count as well.
        count: Neurons that all of them selected.
        expected: Mean count for random sets with as many neurons in each layer for each task.
        p: Share of such random sets with at least this count, (1 + hits) / (1 + draws).
        jaccard: Count over the union's size.
        coefficient: Count over the size of the smallest selection (1: it lies within the others).
    """

    tasks: tuple[str, ...]
    count: int
    expected: float
    p: float
    jaccard: float
    coefficient: float


@dataclass(frozen=True, repr=False)
class Overlap(Result):
    """The neurons selected for several tasks, by how many of the tasks share them.

    `plot(what)` draws the `sizes` of the groups beside chance, what tasks have `shared` beside chance, or
    counts by `layers`.

    Attributes:
        selected: Each task's neurons (layer, index), in order.
        n_layers, d_mlp: The decoder's size.
        shared: Every pair of tasks, and all tasks together, against chance.
        draws: Random sets behind each p-value.
    """

    kind: ClassVar[str] = "overlap"

    selected: dict[str, tuple[Neuron, ...]]
    n_layers: int
    d_mlp: int
    shared: tuple[SharedNeurons, ...]
    draws: int

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, in the order given."""
        return tuple(self.selected)

    @property
    def owners(self) -> dict[Neuron, tuple[str, ...]]:
        """Which tasks selected each neuron, ordered by layer, then index."""
        tasks_by_neuron: dict[Neuron, tuple[str, ...]] = {}
        for task, neurons in self.selected.items():
            for neuron in neurons:
                tasks_by_neuron[neuron] = (*tasks_by_neuron.get(neuron, ()), task)
        return dict(sorted(tasks_by_neuron.items()))

    @property
    def groups(self) -> dict[str, tuple[Neuron, ...]]:
        """Every selected neuron in one group; groups may be empty.

        `vqa only` and so on for each task, `pair`, `triple` (of exactly so many tasks; `4 tasks` and
        so on beyond), and `general` for neurons of all tasks.
        """
        n = len(self.tasks)
        members: dict[str, list[Neuron]] = {f"{task} only": [] for task in self.tasks}
        members |= {_degree(count): [] for count in range(2, n)} | {"general": []}
        for neuron, tasks in self.owners.items():
            members[_group(tasks, n)].append(neuron)
        return {name: tuple(neurons) for name, neurons in members.items()}

    def per_layer(self) -> pd.DataFrame:
        """Layer curves: how many neurons of each group lie in each layer, one row a layer."""
        counts = {name: Counter(layer for layer, _ in neurons) for name, neurons in self.groups.items()}
        return pd.DataFrame(
            {name: [count[layer] for layer in range(self.n_layers)] for name, count in counts.items()}
        ).rename_axis("layer")

    def to_dataframe(self) -> pd.DataFrame:
        """One row a neuron: layer, neuron, group, number of tasks, and whether each task selected it."""
        rows = [
            {
                "layer": layer,
                "neuron": index,
                "group": _group(tasks, len(self.tasks)),
                "n_tasks": len(tasks),
                **{task: task in tasks for task in self.tasks},
            }
            for (layer, index), tasks in self.owners.items()
        ]
        return pd.DataFrame(rows)

    def comparisons(self) -> pd.DataFrame:
        """One row for each pair of tasks and one for all: count, chance, p, Jaccard, coefficient."""
        return pd.DataFrame([{**vars(shared), "tasks": " & ".join(shared.tasks)} for shared in self.shared])

    def __str__(self) -> str:
        sizes = ", ".join(f"{task} {len(neurons)}" for task, neurons in self.selected.items())
        lines = [f"neurons of {len(self.tasks)} tasks: {sizes}"]
        for name, neurons in self.groups.items():
            lines.append(f"  {name:<15}{len(neurons):>6}  by layer {self.per_layer()[name].tolist()}")
        lines.append(f"shared, against random sets matched per layer ({self.draws} draws):")
        for shared in self.shared:
            lines.append(
                f"  {' & '.join(shared.tasks)}: {shared.count} (chance {shared.expected:.1f}, "
                f"p = {shared.p:.3g}), Jaccard {shared.jaccard:.3f}, coefficient {shared.coefficient:.3f}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def _degree(count: int) -> str:
    return _DEGREES.get(count, f"{count} tasks")


def _group(tasks: Sequence[str], n_tasks: int) -> str:
    if len(tasks) == n_tasks:
        return "general"
    return f"{tasks[0]} only" if len(tasks) == 1 else _degree(len(tasks))


@takes_iterables
def find_overlap(
    selections: Mapping[str, NeuronScores | Neurons],
    *,
    shape: tuple[int, int] | None = None,
    draws: int = 10_000,
    seed: int = 0,
) -> Overlap:
    """Compare the neurons selected for several tasks (HONES eq. H6).

    Args:
        selections: By task, a ranking (its share `ratio` is taken) or the neurons (layer, index).
        shape: Layers, and neurons a layer; needed where no ranking is given.
        draws: Random sets for the p-values.
        seed: Of the random sets.

    Raises:
        ValueError: Fewer than two tasks, an empty selection, a neuron twice or outside the shape,
            rankings of different models or shapes, or no shape.
    """
    if len(selections) < 2:
        raise ValueError(f"an overlap needs at least two tasks, got {len(selections)}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    n_layers, d_mlp = _shape(selections, shape)
    selected: dict[str, tuple[Neuron, ...]] = {}
    for task, selection in selections.items():
        neurons = selection.top() if isinstance(selection, NeuronScores) else selection
        selected[task] = check_neurons(neurons, n_layers, d_mlp, f"the selection of {task!r}")
    tasks = list(selected)
    combined = [*combinations(tasks, 2), *([tuple(tasks)] if len(tasks) > 2 else [])]
    rng = np.random.default_rng(seed)
    shared = tuple(
        _against_chance({task: selected[task] for task in names}, n_layers, d_mlp, draws, rng)
        for names in combined
    )
    return Overlap(selected, n_layers, d_mlp, shared, draws)


def _shape(
    selections: Mapping[str, NeuronScores | Neurons], shape: tuple[int, int] | None
) -> tuple[int, int]:
    rankings = {
        task: selection for task, selection in selections.items() if isinstance(selection, NeuronScores)
    }
    models = {ranking.model_name for ranking in rankings.values()}
    if len(models) > 1:
        raise ValueError(f"rankings of different models: {', '.join(sorted(models))}")
    shapes = {task: tuple(ranking.scores.shape) for task, ranking in rankings.items()}
    if shape is not None:
        shapes["shape="] = tuple(shape)
    if not shapes:
        raise ValueError("no ranking among the selections: give shape=(n_layers, d_mlp)")
    if len(set(shapes.values())) > 1:
        raise ValueError(f"layers and neurons a layer differ: {shapes}")
    n_layers, d_mlp = next(iter(shapes.values()))
    return n_layers, d_mlp


def check_neurons(neurons: Sequence, n_layers: int, d_mlp: int, description: str) -> tuple[Neuron, ...]:
    """Neurons in order, as (layer, index).

    Raises:
        ValueError: None at all, one that does not exist, or one twice; `what` is named.
    """
    ordered = sorted((int(neuron[0]), int(neuron[1])) for neuron in neurons)
    if not ordered:
        raise ValueError(f"{description} has no neurons")
    for (layer, index), count in Counter(ordered).items():
        check_component("neuron", layer, index, n_layers, d_mlp, description)
        if count > 1:
            raise ValueError(f"{description} has neuron L{layer}N{index} {count} times")
    return tuple(ordered)


def _against_chance(
    selected: Mapping[str, tuple[Neuron, ...]],
    n_layers: int,
    d_mlp: int,
    draws: int,
    rng: np.random.Generator,
) -> SharedNeurons:
    """One comparison. Random sets are not drawn themselves, but the sizes of what they share.

    Of a layer's d neurons, a random set of c meets a fixed set of s in a hypergeometric number; that is
    what remains shared as one task after the other comes in.
    """
    sets = [set(neurons) for neurons in selected.values()]
    count, union = len(set.intersection(*sets)), len(set.union(*sets))
    counts = np.array([np.bincount([l for l, _ in s], minlength=n_layers) for s in selected.values()])
    remaining = np.broadcast_to(counts[0], (draws, n_layers))
    for layer_counts in counts[1:]:
        remaining = rng.hypergeometric(remaining, d_mlp - remaining, layer_counts)
    hits = int((remaining.sum(axis=1) >= count).sum())
    return SharedNeurons(
        tasks=tuple(selected),
        count=count,
        expected=float((d_mlp * np.prod(counts / d_mlp, axis=0)).sum()),
        p=(1 + hits) / (1 + draws),
        jaccard=count / union,
        coefficient=count / min(map(len, sets)),
    )


def chance_sizes(overlap: Overlap) -> dict[str, float]:
    """Mean size of each group, if every task's neurons were drawn at random, as many in each layer.

    A neuron of layer l is drawn for task t with probability c(t, l) / d_mlp, for each task by itself.
    """
    counts = {task: Counter(layer for layer, _ in neurons) for task, neurons in overlap.selected.items()}
    layers = range(overlap.n_layers)
    shares = np.array([[count[layer] / overlap.d_mlp for layer in layers] for count in counts.values()])
    names, tasks = list(overlap.groups), range(len(overlap.tasks))
    sizes = dict.fromkeys(names, 0.0)
    for size in range(1, len(overlap.tasks) + 1):
        for members in combinations(tasks, size):
            probability = np.prod([shares[t] if t in members else 1 - shares[t] for t in tasks], axis=0)
            # Groups come in this order: one for each task, then by the number of tasks.
            name = names[members[0]] if size == 1 else names[len(overlap.tasks) + size - 2]
            sizes[name] += float(overlap.d_mlp * probability.sum())
    return sizes
