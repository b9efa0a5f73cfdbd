"""Learning how far to scale each of some neurons, with the model frozen (HONES eq. H5)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

import torch
from tqdm.auto import tqdm

from hones_lens import engine
from hones_lens.data import Example
from hones_lens.engine import BatchKeywords, SweepOptions, split_keywords
from hones_lens.hones.attribution.neuron_scores import NeuronScores
from hones_lens.hones.masking import Neurons
from hones_lens.hones.steering.batches import TrainingBatches, frozen_parameters, gradient_of_step
from hones_lens.hones.steering.checkpoints import SAVE_EVERY, Checkpoint, FileCheckpoint, LearningState
from hones_lens.hones.steering.config import SteeringConfig
from hones_lens.hones.steering.questions import answer_log_probs, check_disjoint_images
from hones_lens.hones.steering.scales import NeuronScales, neurons_to_steer, scaling_hooks
from hones_lens.model import HookedVLM, takes_iterables
from hones_lens.tasks import Task

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Learner:
    """Runs the optimizer, from the start or from a checkpoint.

    Args:
        model, batches, neurons, config: The model, its training data, the neurons to scale and the settings.
        on_dev: Metric and log-probability of some offsets on dev.
        patience: Stop after so many epochs that did not better the best on dev.
        checkpoint: Where progress is kept.
    """

    def __init__(
        self,
        model: HookedVLM,
        batches: TrainingBatches,
        neurons: Neurons,
        config: SteeringConfig,
        *,
        on_dev: Callable[[Sequence[float]], tuple[float, float]] | None = None,
        patience: int | None = None,
        checkpoint: Checkpoint | None = None,
    ):
        self.model, self.batches, self.neurons, self.config = model, batches, neurons, config
        self.on_dev, self.patience, self.checkpoint = on_dev, patience, checkpoint
        self.a = torch.zeros(len(neurons), device=model.cfg.device, requires_grad=True)
        self.optimizer = torch.optim.AdamW([self.a], lr=config.lr, weight_decay=0.0)
        self.progress = LearningState()
        kept = None if checkpoint is None else checkpoint.load()
        if kept is not None:
            self._resume(kept)

    @property
    def steps(self) -> int:
        """The total number of optimizer steps."""
        return self.config.epochs * len(self.batches)

    @property
    def finished(self) -> bool:
        """Whether all steps are taken, or dev has not been bettered for too long."""
        patient = self.patience is None or self.progress.stale < self.patience
        return self.progress.done >= self.steps or not patient

    @property
    def offsets(self) -> tuple[float, ...]:
        """What was learned: the best on dev where dev is watched, else the last."""
        best = self.progress.best
        return tuple(self.a.tolist() if best is None else best["a"])

    def run(self, label: str = "steering", show: bool = True) -> tuple[float, ...]:
        """Take all steps that are left, and give the offsets."""
        if self.on_dev is not None and self.progress.best is None:
            self._compare_on_dev()
        with (
            frozen_parameters(self.model),
            tqdm(total=self.steps, desc=label, disable=not show, unit="step") as bar,
        ):
            bar.update(self.progress.done)
            while not self.finished:
                loss = self._step()
                bar.set_postfix_str(f"loss {loss:.4f}, max |a| {float(self.a.detach().abs().max()):.3g}")
                bar.update(1)
        return self.offsets

    def scales(self, task: Task, method: str, n_examples: int) -> NeuronScales:
        """The learned scales, with their settings and history."""
        return NeuronScales(
            neurons=tuple((neuron[0], neuron[1]) for neuron in self.neurons),
            offsets=self.offsets,
            task=task.name,
            method=method,
            model_name=self.model.cfg.model_name,
            settings=asdict(self.config),
            n_examples=n_examples,
            history=tuple(self.progress.history),
        )

    def _step(self) -> float:
        state = self.progress
        epoch, step_in_epoch = divmod(state.done, len(self.batches))
        step = self.batches.order(epoch)[step_in_epoch]
        gradient, losses = gradient_of_step(self.model, self.batches, step, self.neurons, self.a, self.config)
        self.a.grad = gradient
        torch.nn.utils.clip_grad_norm_([self.a], self.config.grad_norm)
        self.optimizer.param_groups[0]["lr"] = self.config.learning_rate(state.done, self.steps)
        self.optimizer.step()
        with torch.no_grad():
            self.a.clamp_(-self.config.clamp, self.config.clamp)
        state.done += 1
        state.sums = {name: state.sums.get(name, 0.0) + value for name, value in losses.items()}
        last = step_in_epoch + 1 == len(self.batches)
        if last:
            self._end_epoch(epoch + 1)
        if self.checkpoint is not None and (last or state.done % self.checkpoint.every == 0):
            self._save(self.checkpoint)
        return losses["loss"]

    def _end_epoch(self, epoch: int) -> None:
        state = self.progress
        means = {name: value / len(self.batches) for name, value in state.sums.items()}
        state.history.append({"epoch": epoch, **means, "max_abs": float(self.a.detach().abs().max())})
        state.sums = {}
        if self.on_dev is not None:
            state.history[-1] |= self._compare_on_dev()

    def _compare_on_dev(self) -> dict[str, float]:
        """Measure the offsets on dev, and keep them if they are the best so far."""
        assert self.on_dev is not None
        state, offsets = self.progress, self.a.tolist()
        metric, log_prob = self.on_dev(offsets)
        values = {"dev_metric": metric, "dev_log_prob": log_prob}
        best = state.best
        if best is None or (metric, log_prob) > (best["dev_metric"], best["dev_log_prob"]):
            state.best, state.stale = {"a": offsets, **values}, 0
        else:
            state.stale += 1
        return values

    def _save(self, checkpoint: Checkpoint) -> None:
        state, optimizer_state = self.progress, self.optimizer.state[self.a]
        state.a = self.a.tolist()
        state.exp_avg, state.exp_avg_sq = (optimizer_state[name].tolist() for name in _MOMENTS)
        checkpoint.save(state)

    def _resume(self, state: LearningState) -> None:
        self.progress = state
        with torch.no_grad():
            self.a.copy_(torch.tensor(state.a))
        moments = {name: torch.tensor(getattr(state, name)).to(self.a.device) for name in _MOMENTS}
        self.optimizer.state[self.a] = {"step": torch.tensor(float(state.done)), **moments}


class LearningKeywords(BatchKeywords, total=False):
    """Keywords of `learn_scales`: of `SweepOptions`, and how often a checkpoint is written."""

    memory_budget: float | None
    save_every: int


@takes_iterables
def learn_scales(
    model: HookedVLM,
    task: str | Task,
    examples: Sequence[Example],
    neurons: NeuronScores | Neurons,
    config: SteeringConfig | None = None,
    *,
    k: int | None = None,
    dev: Sequence[Example] | None = None,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    options: SweepOptions | None = None,
    **keywords: Unpack[LearningKeywords],
) -> NeuronScales:
    """Learn one factor for each of some neurons, all else frozen (HONES eq. H5).

    `m_i ← (1 + a_i) m_i`, from a = 0 on, where the model is the original to the bit. The loss is the
    cross-entropy of the right answer's tokens plus `β · KL(original ‖ steered)` where they are predicted,
    each a mean over the answer's tokens and then over examples, plus λ · mean(a²). `labelled_prompts`
    has the prompts of a ranking task. Only layers from the first steered one on are run with gradients.

    Args:
        model: The model, which is left as it was.
        task: A task or its name.
        examples: What to learn from; none of them should be among those that are reported on.
        neurons: A ranking, whose top k are steered, or a list of (layer, index).
        config: Learning rate, epochs, weights; default: the paper's.
        k: How many of a ranking; default: its own ratio.
        dev: Measure the task on these after every epoch and return the best offsets seen, a = 0 included
            (by metric, then by log-probability of the right answers).
        patience: With dev: stop after so many epochs that did not better the best.
        checkpoint: A JSON file to keep progress in and to take it up from: a resumed learning gives the
            same scales as an unbroken one, to the bit where the device itself is deterministic.
        options: How it runs, as `SweepOptions`.
        keywords: `batch_size` (rows in one pass, default 4), `progress` and `memory_budget` (here GB of main
            memory for what the clean model gave, default half of what is free) of `SweepOptions`;
            `save_every`: steps between checkpoints, which are also written after every epoch (default 50).

    Raises:
        ValueError: No examples, no neurons, a neuron that the model does not have, examples and dev that
            share a picture, patience without dev, or a checkpoint of other settings.
        FloatingPointError: A loss that is not finite; names the examples.
    """
    saving, batch_keywords = split_keywords(keywords, ("save_every",))
    options = SweepOptions.of(options, batch_keywords, unused=("journal", "tally"), batch_size=4)
    task, config = engine.as_task(task), config or SteeringConfig()
    engine.check_examples(task, examples)
    chosen = neurons_to_steer(model, neurons, k)
    dev_options = _dev_options(model, task, examples, dev, patience, chosen, config)
    limits: dict[str, Any] = {"batch_size": options.batch_size, "memory_budget": options.memory_budget}
    batches = TrainingBatches(model, task, examples, min(layer for layer, _ in chosen), config, **limits)
    metadata = {"model": model.cfg.model_name, "task": task.name, "neurons": [list(n) for n in chosen]}
    metadata |= {"examples": batches.fingerprint, "dev": None if dev is None else [e.id for e in dev]}
    settings = {**asdict(config), **metadata, "patience": patience, "batch_size": options.batch_size}
    if checkpoint is not None:
        dev_options["checkpoint"] = FileCheckpoint(checkpoint, settings, saving.get("save_every", SAVE_EVERY))
    learner = Learner(model, batches, chosen, config, **dev_options)
    learner.run(f"steering · {task.name}", options.progress)
    method = neurons.method if isinstance(neurons, NeuronScores) else "given"
    return learner.scales(task, method, len(examples))


def _dev_options(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    dev: Sequence[Example] | None,
    patience: int | None,
    neurons: Neurons,
    config: SteeringConfig,
) -> dict[str, Any]:
    """`on_dev` and `patience` of a `Learner`, checked."""
    if patience is not None and (dev is None or patience < 1):
        raise ValueError("patience needs dev examples and must be at least 1")
    if dev is None:
        return {}
    engine.check_examples(task, dev)
    check_disjoint_images({"learning": examples, "dev": dev})
    return {"on_dev": dev_measurement(model, task, dev, neurons, config), "patience": patience}


def dev_measurement(
    model: HookedVLM,
    task: Task,
    dev: Sequence[Example],
    neurons: Neurons,
    config: SteeringConfig,
    journal: MutableMapping[str, Any] | None = None,
    key: str = "",
) -> Callable[[Sequence[float]], tuple[float, float]]:
    """A function from offsets to the metric and the log-probability on dev; batches go into the journal."""
    options = SweepOptions(progress=False, journal=journal)

    def measure(offsets: Sequence[float]) -> tuple[float, float]:
        arms = [scaling_hooks(neurons, 1 + torch.tensor(offsets))]
        label = f"{key}/{zlib.crc32(repr(list(offsets)).encode()):08x}"
        (outcome,) = engine.measure(model, task, dev, arms, options, label=label)
        seeds: dict[str, Any] = {"negatives": config.negatives, "seed": config.seed}
        label += " log-probabilities"
        log_probs = answer_log_probs(model, task, dev, arms, options, label=label, **seeds)
        return outcome.metric(task), float(log_probs.mean())

    return measure
