"""What neurons make a model want to say, layer by layer: logit-lens tables of baseline minus masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hones_lens import engine
from hones_lens.analysis import LensDifference, delta_tables, residual_streams, summed_logits
from hones_lens.data import Example
from hones_lens.engine import ResumedKeywords, SweepOptions
from hones_lens.hones.attribution.neuron_scores import NeuronScores
from hones_lens.hones.masking import Neurons
from hones_lens.hones.overlap.groups import check_neurons
from hones_lens.interventions import Hook, zero_neurons
from hones_lens.model import HookedVLM, takes_iterables
from hones_lens.tasks import Task


@takes_iterables
def lens_delta(
    model: HookedVLM,
    task: str | Task,
    examples: Sequence[Example],
    neurons: NeuronScores | Neurons,
    *,
    k: int = 10,
    options: SweepOptions | None = None,
    **batches: Unpack[ResumedKeywords],
) -> LensDifference:
    """Logit-lens tables of baseline minus masked (HONES eq. H6).

    For each layer: `unembed(ln_final(resid_post))` at the last prompt position, of the clean model
    minus that of the model with the neurons set to zero at all positions, mean over the examples.

    Args:
        model: The model.
        task: A task or its name; of a ranking task the prompt with the true candidate is taken.
        examples: Whose prompts.
        neurons: A ranking, whose share `ratio` is masked, or a list of (layer, index).
        k: Tokens a layer and direction.
        options, batches: How it runs: `batch_size`, `progress` and `journal` of `SweepOptions`.

    Raises:
        ValueError: No examples, no neurons, one twice or one that the model does not have, k below 1.
        FloatingPointError: A logit that is not finite.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    options, task = SweepOptions.of_resumed(options, batches), engine.as_task(task)
    engine.check_examples(task, examples)
    selected = neurons.top() if isinstance(neurons, NeuronScores) else neurons
    chosen = check_neurons(selected, model.cfg.n_layers, model.cfg.d_mlp, "the list of neurons to mask")
    shape = (model.cfg.n_layers, len(examples), model.cfg.d_model)
    clean, masked = (torch.zeros(shape, device=model.cfg.device, dtype=model.cfg.dtype) for _ in range(2))
    streams, key = {"clean": clean, "masked": masked}, f"lens/{task.name}"
    with tqdm(total=len(examples), desc=f"logit lens · {task.name}", disable=not options.progress) as bar:
        resumed = engine.resumed_batches(examples, options.batch_size, streams, options.journal, key)
        for start, chunk in resumed:
            (batch,) = engine.answer_batches(model, task, chunk, len(chunk), answers=False)
            clean[:, start : start + len(chunk)] = last_streams(model, batch)
            masked[:, start : start + len(chunk)] = last_streams(model, batch, zero_neurons(chosen))
            bar.update(start + len(chunk) - bar.n)
    mean = (summed_logits(model, clean) - summed_logits(model, masked)) / len(examples)
    falls, rises = delta_tables(model, mean, clean, masked, k)
    return LensDifference(
        model_name=model.cfg.model_name,
        n_examples=len(examples),
        falls=falls,
        rises=rises,
        task=task.name,
        n_neurons=len(chosen),
    )


@torch.no_grad()
def last_streams(
    model: HookedVLM, batch: engine.Batch, hooks: Sequence[Hook] = ()
) -> Float[Tensor, "layer example d_model"]:
    """The residual stream after every layer at the last prompt position."""
    return residual_streams(model, batch.inputs, batch.inputs.token_groups["last"], hooks)[1:]
