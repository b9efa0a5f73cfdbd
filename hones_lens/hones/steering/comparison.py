"""Learned steering beside its controls, on examples that nothing was fitted to (HONES eq. H5)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypedDict, Unpack

import numpy as np

from hones_lens import engine
from hones_lens.data import Example
from hones_lens.engine import SweepKeywords, SweepOptions, split_keywords
from hones_lens.hones.attribution.neuron_scores import NeuronScores
from hones_lens.hones.masking import Neurons, matched_random_sets
from hones_lens.hones.steering.batches import TrainingBatches
from hones_lens.hones.steering.checkpoints import JournalCheckpoint
from hones_lens.hones.steering.config import SteeringConfig
from hones_lens.hones.steering.learning import Learner, dev_measurement
from hones_lens.hones.steering.questions import (
    Arms,
    answer_log_probs,
    check_disjoint_images,
    log_prob_examples,
    split_by_image,
)
from hones_lens.hones.steering.scales import NeuronScales, neurons_to_steer
from hones_lens.hones.steering.table import SteeringRow, SteeringTable
from hones_lens.model import HookedVLM, did_you_mean, takes_iterables
from hones_lens.results import Noise, bootstrap_interval, mean_interval, metric_interval, permutation_p
from hones_lens.tasks import Task

METHODS = ("Base", "Fixed-Amp", "Grid-Search", "RandNeuron", "HONES without KL", "HONES")
AMPLIFICATION = 2.0
FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
LEARNING_RATES = (5e-4, 5e-3, 5e-2)
EPOCHS = (2, 8)


class TuningKeywords(TypedDict, total=False):
    """What scales are tuned over, by keyword; see `Tuning`."""

    learning_rates: Sequence[float]
    epochs: Sequence[int]
    factors: Sequence[float]
    draws: int
    learn_share: float
    patience: int | None
    rows: int


class ComparisonKeywords(TuningKeywords, SweepKeywords, total=False):
    """Keywords of `compare_steering`: of `Tuning` and of `SweepOptions`."""


@dataclass(frozen=True)
class Tuning:
    """What scales are tuned over, and how.

    Attributes:
        learning_rates, epochs: Among which to choose.
        factors: Among which Grid-Search chooses.
        draws: Random sets with as many neurons in each layer.
        learn_share: The part of dev to learn on.
        patience: Measure the part of dev that chooses after every epoch, stop after so many epochs that did
            not better the best, and keep that one (a = 0 included). Default: all epochs, and the last.
        rows: Rows in one pass of learning.

    Raises:
        ValueError: Nothing to choose among, or patience below 1.
    """

    learning_rates: Sequence[float] = LEARNING_RATES
    epochs: Sequence[int] = EPOCHS
    factors: Sequence[float] = FACTORS
    draws: int = 5
    learn_share: float = 0.7
    patience: int | None = None
    rows: int = 4

    def __post_init__(self) -> None:
        if not (self.learning_rates and self.epochs and self.factors and self.draws >= 1):
            raise ValueError("learning_rates, epochs and factors must not be empty, and draws at least 1")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1, not {self.patience}")

    def settings(self, config: SteeringConfig) -> list[SteeringConfig]:
        """A configuration for every learning rate and number of epochs."""
        combinations = itertools.product(self.learning_rates, self.epochs)
        return [replace(config, lr=lr, epochs=epochs) for lr, epochs in combinations]


@dataclass(frozen=True)
class _Experiment:
    """The model, the task and its examples, and how they are run.

    Attributes:
        learn, choose, test: Examples to learn on, to choose settings on, and to report on.
        options: Of sweeps.
    """

    model: HookedVLM
    task: Task
    learn: Sequence[Example]
    choose: Sequence[Example]
    test: Sequence[Example]
    config: SteeringConfig
    options: SweepOptions
    tuning: Tuning = field(default_factory=Tuning)

    def measured(
        self, examples: Sequence[Example], arms: Arms, label: str
    ) -> tuple[list[engine.Outcome], np.ndarray]:
        """What each arm scores, and the log-probabilities of the right answers, [arm example]."""
        sweeps = replace(self.options, memory_budget=None)  # it is for learning
        self.announce(examples, label)
        outcomes = engine.measure(self.model, self.task, examples, arms, sweeps, label=label)
        prompt_options = {"negatives": self.config.negatives, "seed": self.config.seed}
        label = f"{label} log-probabilities"
        return outcomes, answer_log_probs(
            self.model, self.task, examples, arms, sweeps, label=label, **prompt_options
        )

    def announce(self, examples: Sequence[Example], label: str) -> None:
        """Tell the journal of what `measured` will measure."""
        n, size = len(examples), self.options.batch_size
        engine.expect(self.options.journal, label, n, size)
        size = log_prob_examples(self.task, size, self.config.negatives)
        engine.expect(self.options.journal, f"{label} log-probabilities", n, size)

    def noise(self, base: engine.Outcome, log_probs: np.ndarray) -> Noise | None:
        """What the model's type can't tell of the test examples, from what they give unsteered."""
        of_answers = partial(answer_log_probs, negatives=self.config.negatives, seed=self.config.seed)
        measured = self.model, self.task, self.test, base, log_probs.tolist()
        sweeps = replace(self.options, memory_budget=None)
        return engine.type_noise(*measured, sweeps, label="steered", measure_log_probs=of_answers)


@takes_iterables
def compare_steering(
    model: HookedVLM,
    task: str | Task,
    dev: Sequence[Example],
    test: Sequence[Example],
    neurons: NeuronScores | Neurons,
    *,
    k: int | None = None,
    learn: Sequence[Example] | None = None,
    methods: Sequence[str] = METHODS,
    config: SteeringConfig | None = None,
    options: SweepOptions | None = None,
    **keywords: Unpack[ComparisonKeywords],
) -> SteeringTable:
    """Steer by every method of HONES eq. H5, fitted on dev, and report what test gains over the base.

    Dev is cut in two that share no picture: scales are learned on one part, and among all learning rates
    and numbers of epochs those are taken that do best on the other (by the metric, then by the
    log-probability of the right answers, then by their order). HONES with and without KL and every
    random draw are tuned alike. Grid-Search has one number to fit, and takes it on all of dev.

    Args:
        model, task: What to steer.
        dev: Examples to fit on.
        test: Examples to report on; they share no picture with the others.
        neurons: A ranking, whose top k are steered, or a list of (layer, index).
        k: How many of a ranking; default: its own ratio.
        learn: Learn on these, and choose on the whole of dev.
        methods: Which of `METHODS`; Base is always there.
        config: All other settings of learning.
        options: How sweeps run; of its journal, what has been learned is read and written too.
        keywords: What is tuned, and how: `learning_rates`, `epochs`, `factors`, `draws`, `learn_share`,
            `patience`, `rows` of `Tuning`; and `batch_size`, `progress`, `journal`, ... of `SweepOptions`,
            where `memory_budget` is GB of main memory for learning, as in `learn_scales`.

    Raises:
        ValueError: An unknown method (lists the valid ones), no examples or neurons, nothing to choose
            among, patience below 1, or examples of different sets that share a picture.
        FloatingPointError: A loss or logits that are not finite; names the examples.
    """
    if unknown := [method for method in methods if method not in METHODS]:
        raise ValueError(
            f"unknown method {unknown[0]!r}; valid: {', '.join(METHODS)}{did_you_mean(unknown[0], METHODS)}"
        )
    tuning_keywords, sweep = split_keywords(keywords, TuningKeywords.__annotations__)
    tuning, options = Tuning(**tuning_keywords), SweepOptions.of(options, sweep)
    task, config = engine.as_task(task), config or SteeringConfig()
    for examples in (dev, test, *([] if learn is None else [learn])):
        engine.check_examples(task, examples)
    chosen = neurons_to_steer(model, neurons, k)
    parts = list(learn or ()), list(dev)
    if learn is None:
        parts = split_by_image(dev, tuning.learn_share, config.seed)
    check_disjoint_images({"learning": parts[0], "dev": parts[1], "test": test})
    data = _Experiment(model, task, *parts, test, config, options, tuning)
    _announce(data, methods)
    fitted = [*_fit_uniform(data, chosen, methods), *_fit_learned(data, chosen, methods)]
    rows, noise = _test_rows(data, sorted(fitted, key=lambda fit: METHODS.index(fit.method)))
    return replace(_table(data, neurons, len(chosen), rows), noise=noise)


def _announce(data: _Experiment, methods: Sequence[str]) -> None:
    """Tell the journal of all that will be measured, before the first of it is."""
    if "Grid-Search" in methods:
        data.announce([*data.learn, *data.choose], "grid search")
    learned = {"RandNeuron": data.tuning.draws, "HONES without KL": 1, "HONES": 1}
    for method in set(methods) & set(learned):
        for draw in range(learned[method]):
            n_settings = len(data.tuning.settings(data.config))
            engine.expect(data.options.journal, f"steering/{method}/{draw}", n_settings, 1)
    if set(methods) & set(learned):
        data.announce(data.choose, "choosing")
    data.announce(data.test, "steered")


def _table(
    data: _Experiment, neurons: NeuronScores | Neurons, n_neurons: int, rows: tuple[SteeringRow, ...]
) -> SteeringTable:
    return SteeringTable(
        task=data.task.name,
        metric_name=data.task.metric_name,
        model_name=data.model.cfg.model_name,
        neuron_method=neurons.method if isinstance(neurons, NeuronScores) else "given",
        n_neurons=n_neurons,
        n_learned=len(data.learn),
        n_chosen=len(data.choose),
        example_ids=tuple(example.id for example in data.test),
        seed=data.config.seed,
        negatives=data.config.negatives,
        rows=rows,
    )


@dataclass(frozen=True)
class _FittedMethod:
    """A fitted method with its chosen settings and scales."""

    method: str
    draw: int
    chosen: dict[str, float]
    scales: NeuronScales | None


def _fit_uniform(data: _Experiment, neurons: Neurons, methods: Sequence[str]) -> list[_FittedMethod]:
    """The methods with one factor for all neurons."""
    factors = data.tuning.factors
    metadata = {"task": data.task.name, "model_name": data.model.cfg.model_name}
    fitted = [_FittedMethod("Base", 0, {}, None)]
    if "Fixed-Amp" in methods:
        scales = NeuronScales.uniform(neurons, AMPLIFICATION, method="Fixed-Amp", **metadata)
        fitted.append(_FittedMethod("Fixed-Amp", 0, {"factor": AMPLIFICATION}, scales))
    if "Grid-Search" in methods:
        candidates = [NeuronScales.uniform(neurons, f, method="Grid-Search", **metadata) for f in factors]
        best = _best_scales(data, [*data.learn, *data.choose], candidates, "grid search")
        fitted.append(_FittedMethod("Grid-Search", 0, {"factor": factors[best]}, candidates[best]))
    return fitted


def _best_scales(
    data: _Experiment, examples: Sequence[Example], candidates: Sequence[NeuronScales], label: str
) -> int:
    """Which scales do best; of those that do equally well, the first."""
    outcomes, log_probs = data.measured(examples, [scales.hooks() for scales in candidates], label)
    values = [(o.metric(data.task), float(lp.mean())) for o, lp in zip(outcomes, log_probs, strict=True)]
    return max(range(len(candidates)), key=lambda i: values[i])


def _fit_learned(
    data: _Experiment,
    neurons: Neurons,
    methods: Sequence[str],
) -> list[_FittedMethod]:
    """The methods that learn a factor for each neuron, tuned on the part of dev that chooses."""
    shape = (data.model.cfg.n_layers, data.model.cfg.d_mlp)
    methods_to_fit: list[tuple[str, int, Neurons]] = []
    if "RandNeuron" in methods:
        sets = matched_random_sets(neurons, *shape, data.tuning.draws, data.config.seed)
        methods_to_fit += [("RandNeuron", i, [(c.layer, c.index) for c in s]) for i, s in enumerate(sets)]
    methods_to_fit += [(m, 0, neurons) for m in ("HONES without KL", "HONES") if m in methods]
    if not methods_to_fit:
        return []
    first = min(layer for layer, *_ in neurons)
    batch_options: dict[str, Any] = {
        "batch_size": data.tuning.rows,
        "memory_budget": data.options.memory_budget,
        "journal": data.options.journal,
    }
    batches = TrainingBatches(data.model, data.task, data.learn, first, data.config, **batch_options)
    settings, all_scales = data.tuning.settings(data.config), []
    for method, draw, set_neurons in methods_to_fit:
        for i, config in enumerate(settings):
            config = replace(config, kl_weight=0.0) if method == "HONES without KL" else config
            all_scales.append(_learn(data, batches, set_neurons, config, method, f"{method}/{draw}/{i}"))
    return _choose(data, methods_to_fit, all_scales, settings)


def _learn(
    data: _Experiment,
    batches: TrainingBatches,
    neurons: Neurons,
    config: SteeringConfig,
    method: str,
    key: str,
) -> NeuronScales:
    journal, key = data.options.journal, f"steering/{key}"
    if journal is not None and key in journal:
        return NeuronScales.from_dict(journal[key])
    dev_options: dict[str, Any] = {}
    if data.tuning.patience is not None:
        on_dev = dev_measurement(data.model, data.task, data.choose, neurons, config, journal, f"{key}/dev")
        dev_options = {"on_dev": on_dev, "patience": data.tuning.patience}
    checkpoint = None if journal is None else JournalCheckpoint(journal, f"{key}/state")
    learner = Learner(data.model, batches, neurons, config, checkpoint=checkpoint, **dev_options)
    label = f"{key} · {data.task.name}, lr {config.lr:g}, {config.epochs} epochs"
    learner.run(label, data.options.progress)
    scales = learner.scales(data.task, method, len(data.learn))
    if journal is not None:
        journal[key] = scales.to_dict()
    return scales


def _choose(
    data: _Experiment,
    fitted_methods: Sequence[tuple[str, int, Neurons]],
    all_scales: Sequence[NeuronScales],
    settings: Sequence[SteeringConfig],
) -> list[_FittedMethod]:
    """For each method, the scales of the best setting; all are measured in one sweep."""
    outcomes, log_probs = data.measured(data.choose, [scales.hooks() for scales in all_scales], "choosing")
    best_fits = []
    for number, (method, draw, _) in enumerate(fitted_methods):
        candidates = range(number * len(settings), (number + 1) * len(settings))
        best = max(candidates, key=lambda i: (outcomes[i].metric(data.task), float(log_probs[i].mean())))
        config = settings[best - candidates.start]
        chosen = {"lr": config.lr, "epochs": config.epochs}
        best_fits.append(_FittedMethod(method, draw, chosen, all_scales[best]))
    return best_fits


@takes_iterables
def transfer_steering(
    model: HookedVLM,
    table: SteeringTable,
    examples: Sequence[Example],
    *,
    task: Task | None = None,
    options: SweepOptions | None = None,
    **sweep: Unpack[SweepKeywords],
) -> SteeringTable:
    """Report a table's methods on other examples, say out-of-distribution ones, with no further fitting.

    Args:
        model: The model that the table is about.
        table: From `compare_steering`.
        examples: Of the same task; that they share no picture with dev is the caller's to see to.
        task: The table's task, where `load_task` does not know its name.
        options, sweep: How it runs: `batch_size`, `progress`, `journal`, ... of `SweepOptions`.

    Raises:
        ValueError: No examples, or another model or task than the table's.
        FloatingPointError: Logits that are not finite; names the examples.
    """
    options = SweepOptions.of(options, sweep)
    if model.cfg.model_name != table.model_name:
        raise ValueError(f"the table is about {table.model_name}, the model is {model.cfg.model_name}")
    task = task or engine.as_task(table.task)
    if task.name != table.task:
        raise ValueError(f"the table is about {table.task}, the task is {task.name}")
    engine.check_examples(task, examples)
    config = SteeringConfig(seed=table.seed, negatives=table.negatives)
    fitted = [_FittedMethod(row.method, row.draw, row.chosen, row.scales) for row in table.rows]
    rows, noise = _test_rows(_Experiment(model, task, (), (), examples, config, options), fitted)
    ids = tuple(example.id for example in examples)
    return replace(table, rows=rows, example_ids=ids, noise=noise)


def _test_rows(
    data: _Experiment, fitted: Sequence[_FittedMethod]
) -> tuple[tuple[SteeringRow, ...], Noise | None]:
    """Everything measured on test, in one sweep, against the base, which comes first; and its noise."""
    arms = [[] if fit.scales is None else fit.scales.hooks() for fit in fitted]
    outcomes, all_log_probs = data.measured(data.test, arms, "steered")
    base = np.array(outcomes[0].statistics)
    rows = []
    for fit, outcome, log_probs in zip(fitted, outcomes, all_log_probs, strict=True):
        statistics = np.array(outcome.statistics)
        gains, seed = log_probs - all_log_probs[0], data.config.seed
        row = SteeringRow(
            method=fit.method,
            draw=fit.draw,
            chosen=fit.chosen,
            max_abs=0.0 if fit.scales is None else fit.scales.max_abs,
            metric=outcome.metric(data.task),
            gain=bootstrap_interval(data.task, statistics, base, seed=seed),
            p=permutation_p(data.task, statistics, base, seed=seed),
            log_prob=float(log_probs.mean()),
            log_prob_gain=mean_interval(gains, seed=seed),
            scores=tuple(outcome.scores),
            log_probs=tuple(log_probs.tolist()),
            statistics=tuple(tuple(each) for each in statistics.tolist()),
            scales=fit.scales,
            metric_interval=metric_interval(data.task, statistics, seed=seed),
        )
        rows.append(row)
    return tuple(rows), data.noise(outcomes[0], all_log_probs[0])
