"""Data that a run saves for its report: examples with lenses and attention, and promoted tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hones_lens import engine
from hones_lens.analysis import head_attention, image_token_lens, logit_lens, promoted_tokens
from hones_lens.app.report.run_view import ExampleView
from hones_lens.app.runs.data_choice import DataChoice
from hones_lens.app.runs.folder import Run, save_picture
from hones_lens.engine import as_task
from hones_lens.hones import HeadNeuronFlow, HeadScores, NeuronScores, head_neuron_flow
from hones_lens.interventions import zero_neurons
from hones_lens.model import HookedVLM, leading_blanks, token_names
from hones_lens.results import Component, write_json
from hones_lens.tasks import Task

_EXAMPLE_TEXTS = ("prompt", "target", "answer", "answer_masked", "head", "masked_label", "region")
_MOST_HEADS = 64  # models with at most this many heads show all of them
_LENS_TOKENS = 5
_LENS_LAYERS = 12  # of the lens on image tokens: each costs the whole vocabulary at all of them
_FLOW_EXAMPLES = 96


def save_report_views(
    model: HookedVLM, run: Run, task: str | Task, data: DataChoice, heads: HeadScores, neurons: NeuronScores
) -> None:
    """Save examples, the flow from heads to tokens and promoted tokens for the report, unless they exist."""
    if not heads.top():
        return
    flow = find_flow(model, run, task, data, heads, neurons)
    run.files("promoted", lambda: save_promoted(model, run, flow))
    run.files("examples", lambda: save_examples(run, example_views(model, task, data, heads.top(), neurons)))


def example_views(
    model: HookedVLM,
    task: str | Task,
    data: DataChoice,
    heads: Sequence[Component],
    neurons: NeuronScores,
    count: int = 2,
) -> list[ExampleView]:
    """Examples with answers with and without the neurons, attention from the last prompt token, and lenses.

    All heads of a small model are included, otherwise only those given; the first given one is shown first.
    """
    chosen = as_task(task)
    masked = zero_neurons((c.layer, c.index) for c in neurons.top())
    all_heads = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    shown_heads = all_heads if len(all_heads) <= _MOST_HEADS else heads
    first_head, views = f"L{heads[0].layer}H{heads[0].index}", []
    for example in data.test(task)[:count]:
        inputs = next(engine.answer_batches(model, chosen, [example], 1, answers=False)).inputs
        answer = model.generate(inputs, engine.MAX_NEW_TOKENS)[0]
        with model.hooks(fwd_hooks=masked):
            answer_masked = model.generate(inputs, engine.MAX_NEW_TOKENS)[0]
        attention = head_attention(model, inputs, shown_heads)
        attention_maps = dict(zip(attention.names, attention.on_image(), strict=True))
        prompt, target = chosen.target_prompt(example), chosen.answer(example)
        target_ids = model.continuation(prompt, target)
        said = target_ids[leading_blanks(model, target_ids)]
        views.append(
            ExampleView(
                image=example.image,
                prompt=prompt,
                target=target,
                answer=str(answer),
                answer_masked=str(answer_masked),
                head=first_head,
                masked_label=f"{neurons.count()} neurons masked",
                region=inputs.regions[0][0],
                looks=attention_maps,
                lens=logit_lens(model, inputs, k=_LENS_TOKENS),
                image_lens=image_token_lens(model, inputs, said, most_layers=_LENS_LAYERS),
            )
        )
    return views


def save_examples(run: Run, views: Sequence[ExampleView]) -> list[Path]:
    """Save examples in the run folder: pictures as PNG, lenses as JSON, the rest in examples.json.

    Returns:
        The files' paths.
    """
    entries, files = [], [run.path("examples.json")]
    for i, view in enumerate(views):
        files.append(save_picture(view.image, run.path(f"example-{i}.png")))
        texts = {name: getattr(view, name) for name in _EXAMPLE_TEXTS}
        attention_maps = {head: values.tolist() for head, values in view.looks.items()}
        entries.append({**texts, "image": f"example-{i}.png", "looks": attention_maps})
        for name, lens in (("logit-lens", view.lens), ("image-lens", view.image_lens)):
            if lens is not None:
                files.append(run.path(f"example-{i}-{name}.json"))
                lens.save(files[-1])
    write_json(files[0], {"kind": "examples", "examples": entries})
    return files


def find_flow(
    model: HookedVLM, run: Run, task: str | Task, data: DataChoice, heads: HeadScores, neurons: NeuronScores
) -> HeadNeuronFlow:
    """Load or compute how much each critical head contributes to each task neuron."""
    return run.stage(
        "flow",
        HeadNeuronFlow,
        lambda: head_neuron_flow(
            model,
            task,
            data.discovery(task)[:_FLOW_EXAMPLES],
            heads,
            neurons,
            journal=run.journal("flow"),
        ),
    )


def save_promoted(model: HookedVLM, run: Run, flow: HeadNeuronFlow, count: int = 5) -> list[Path]:
    """Save the tokens that each task neuron promotes, and its mean activation, in the run folder.

    Returns:
        The file's path.
    """
    neurons = [(c.layer, c.index) for c in flow.neurons]
    ids = promoted_tokens(model, neurons, flow.activations, count).ids.tolist()
    rows = [
        [*neuron, token_names(model, tokens), activation]
        for neuron, tokens, activation in zip(neurons, ids, flow.activations.tolist(), strict=True)
    ]
    file = run.path("promoted.json")
    write_json(file, {"kind": "promoted", "neurons": rows})
    return [file]
