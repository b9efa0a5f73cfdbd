"""What a run keeps for its report: examples with lenses and attention, and the way from heads to tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hones_lens import engine
from hones_lens.analysis import head_attention, image_token_lens, logit_lens, promoted_tokens
from hones_lens.app.report.run_view import ExampleView
from hones_lens.app.runs.data_choice import DataChoice
from hones_lens.app.runs.folder import Run
from hones_lens.engine import as_task
from hones_lens.hones import HeadNeuronFlow, HeadScores, NeuronScores, head_neuron_flow
from hones_lens.interventions import zero_neurons
from hones_lens.model import HookedVLM
from hones_lens.results import Component, write_json
from hones_lens.tasks import Task

_EXAMPLE_TEXTS = ("prompt", "target", "answer", "answer_masked", "head", "masked_label", "region")
_MOST_HEADS = 64  # heads up to which all of a model's are looked at
_LENS_TOKENS = 5
_FLOW_EXAMPLES = 96


def keep_views(
    model: HookedVLM, run: Run, task: str | Task, data: DataChoice, heads: HeadScores, neurons: NeuronScores
) -> None:
    """Keep what the report draws of examples, and of the way from heads to tokens, if it is not there."""
    if not heads.top():
        return
    flow = find_flow(model, run, task, data, heads, neurons)
    if not run.path("promoted.json").exists():
        save_promoted(model, run, flow)
    if not run.path("examples.json").exists():
        save_examples(run, look_at_examples(model, task, data, heads.top(), neurons))


def look_at_examples(
    model: HookedVLM,
    task: str | Task,
    data: DataChoice,
    heads: Sequence[Component],
    neurons: NeuronScores,
    count: int = 2,
) -> list[ExampleView]:
    """Answers with and without the neurons, where heads look from the last prompt token, and logit lenses.

    Every head of a small model can be chosen, else those given; the first of them is shown.
    """
    chosen = as_task(task)
    masked = zero_neurons((c.layer, c.index) for c in neurons.top())
    every = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    looking = every if len(every) <= _MOST_HEADS else heads
    first, views = f"L{heads[0].layer}H{heads[0].index}", []
    for example in data.test(task)[:count]:
        inputs = next(engine.answer_batches(model, chosen, [example], 1, answers=False)).inputs
        answer = model.generate(inputs, engine.MAX_NEW_TOKENS)[0]
        with model.hooks(fwd_hooks=masked):
            answer_masked = model.generate(inputs, engine.MAX_NEW_TOKENS)[0]
        found = head_attention(model, inputs, looking)
        looks = dict(zip(found.names, found.on_image(), strict=True))
        prompt, right = chosen.target_prompt(example), chosen.answer(example)
        views.append(
            ExampleView(
                image=example.image,
                prompt=prompt,
                target=right,
                answer=str(answer),
                answer_masked=str(answer_masked),
                head=first,
                masked_label=f"{neurons.count()} neurons masked",
                region=inputs.regions[0][0],
                looks=looks,
                lens=logit_lens(model, inputs, k=_LENS_TOKENS),
                image_lens=image_token_lens(model, inputs, model.continuation(prompt, right)[0]),
            )
        )
    return views


def save_examples(run: Run, views: Sequence[ExampleView]) -> None:
    """Keep example views in the run folder: pictures as PNG, lenses, the rest in examples.json."""
    rows = []
    for i, view in enumerate(views):
        view.image.save(run.path(f"example-{i}.png"))
        texts = {name: getattr(view, name) for name in _EXAMPLE_TEXTS}
        looks = {head: values.tolist() for head, values in view.looks.items()}
        rows.append({**texts, "image": f"example-{i}.png", "looks": looks})
        if view.lens is not None:
            view.lens.save(run.path(f"example-{i}-logit-lens.json"))
        if view.image_lens is not None:
            view.image_lens.save(run.path(f"example-{i}-image-lens.json"))
    write_json(run.path("examples.json"), {"kind": "examples", "examples": rows})


def find_flow(
    model: HookedVLM, run: Run, task: str | Task, data: DataChoice, heads: HeadScores, neurons: NeuronScores
) -> HeadNeuronFlow:
    """Which heads feed the neurons, and what these promote, from the folder if it is there."""
    return run.stage(
        "flow",
        HeadNeuronFlow,
        lambda: head_neuron_flow(model, task, data.discovery(task)[:_FLOW_EXAMPLES], heads, neurons),
    )


def save_promoted(model: HookedVLM, run: Run, flow: HeadNeuronFlow, count: int = 5) -> None:
    """Keep the tokens that each task neuron promotes, and its mean activation, in the run folder."""
    places = [(c.layer, c.index) for c in flow.neurons]
    ids = promoted_tokens(model, places, flow.activations, count).ids.tolist()
    rows = [
        [*place, [_readable(model.tokenizer, i) for i in tokens], activation]
        for place, tokens, activation in zip(places, ids, flow.activations.tolist(), strict=True)
    ]
    write_json(run.path("promoted.json"), {"kind": "promoted", "neurons": rows})


def _readable(tokenizer: Any, token_id: int) -> str:
    """A token as text without the space before it; one that is all space, or half a letter, as it is."""
    text = tokenizer.decode([token_id]).strip()
    return text if text and "\ufffd" not in text else tokenizer.convert_ids_to_tokens(token_id)
