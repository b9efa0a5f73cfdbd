"""The model card of a shipped model: metrics, and the ablation effects of each head and neuron."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from hones_lens.app.runs.identity import weights_hash
from hones_lens.app.tiny.train_tiny import Recipe
from hones_lens.data import load_examples, tasks_of
from hones_lens.engine import Evaluation, evaluate
from hones_lens.hones import exact_ablation, exact_head_ablation
from hones_lens.model import HookedVLM, load_model
from hones_lens.results import Interval, ranked, round_floats, write_json

N_ABLATION = 64
_SIZES = {"vqa": 1001, "ocr": 500, "caption": 500, "retrieval": 100}


def write_card(folder: Path, name: str, recipe: Recipe, datasets: Sequence[str] = ("shapes",)) -> None:
    """Measure the model in `folder` and write `README.md` and `ablation.json` beside its weights.

    The metrics are of the test split of each data set (words that training never saw); the
    brute-force effects of replacing each head and zeroing each neuron are mean drops of the right
    answer's log-probability, in nats, on 64 examples of the dev split.
    """
    model = load_model(str(folder))
    evaluations = [
        (data, evaluate(model, task, load_examples(data, task, "test", _SIZES[task])))
        for data in datasets
        for task in tasks_of("shapes")
    ]
    heads, neurons = {}, {}
    for task in tasks_of("shapes"):
        examples = load_examples("shapes", task, "dev", N_ABLATION)
        heads[task] = exact_head_ablation(model, task, examples)
        neurons[task] = exact_ablation(model, task, examples)
    effects = {
        "kind": "ablation",
        "unit": "fall of the right answer's log-probability in nats, mean over examples",
        "examples": N_ABLATION,
        "weights": weights_hash(model),
        "heads": {task: round_floats(effect.tolist(), 5) for task, effect in heads.items()},
        "neurons": {task: round_floats(effect.tolist(), 5) for task, effect in neurons.items()},
    }
    write_json(folder / "ablation.json", effects)
    text = [
        _header(name, model),
        _training(name, recipe),
        _metric_tables(evaluations),
        _head_effects(heads),
        _neuron_effects(neurons),
    ]
    (folder / "README.md").write_text("\n".join(text), encoding="utf-8")


def _header(name: str, model: HookedVLM) -> str:
    cfg, v = model.cfg, model.cfg.vision
    size = f"{v.image_size} × {v.image_size}" if v.image_size else "pictures of any size"
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return f"""---
license: mit
library_name: transformers
pipeline_tag: image-text-to-text
---
# {name}

A small vision–language model that ships with hones_lens, trained from nothing on its shapes world so
that circuits can be studied on a laptop. It is in Hugging Face's format: `from_pretrained` of
transformers loads this folder.

{millions:.2f} M parameters are used: a decoder of {cfg.n_layers} layers × {cfg.n_heads} heads, d_model
{cfg.d_model}, {cfg.d_mlp} neurons a layer, vocabulary {cfg.d_vocab}; a vision tower of {v.n_layers} read
layers × {v.n_heads} heads, width {v.d_model}, patches of {v.patch_size} pixels on {size}.
It knows drawings of one or two shapes and a boxed word, the prompts of the four tasks, and nothing else.
"""


def _training(name: str, recipe: Recipe) -> str:
    family = name.removeprefix("tiny-")
    settings = "\n".join(f"| {key} | {value} |" for key, value in asdict(recipe).items())
    is_partly_frozen = recipe.frozen_steps < recipe.naming_steps
    frozen = f" for the first {recipe.frozen_steps} steps" if is_partly_frozen else ""
    length = f"--steps {recipe.steps} --naming-steps {recipe.naming_steps}"
    shapes = ""
    if recipe.shape_steps:
        length += f" --shape-steps {recipe.shape_steps}"
        shapes = "\nIn the third, with the same price, most false captions took one shape for another."
    return f"""## How it was made

    hones train-tiny {family} {length} --seed {recipe.seed} --out runs/{name}

Muon on the matrices, AdamW on the rest, float32; about nine questions packed behind each picture.
Training saw only scenes of the `train` split. In the first part the model learned to see and to answer
all but the names; in the second, with vision tower and projector frozen{frozen}, the names too.
There the loss also had a price on what neurons write.{shapes}

| setting | value |
| --- | --- |
{settings}
"""


def _interval_text(interval: Interval | None) -> str:
    return f"{interval.low:.3f}–{interval.high:.3f}" if interval else "–"


def _metric_tables(evaluations: Sequence[tuple[str, Evaluation]]) -> str:
    rows = [
        f"| {data} | {e.task} | {e.metric_name} | {e.metric:.3f} | {_interval_text(e.interval)} | "
        f"{e.interval.n} |"
        for data, e in evaluations
    ]
    kinds = [
        f"| {data} | {e.task}: {kind} | {k.value:.3f} | {_interval_text(k.interval)} | {k.n} |"
        for data, e in evaluations
        for kind, k in e.kinds.items()
    ]
    return "\n".join(
        [
            "## Held-out metrics",
            "",
            "Test split: words, and so pictures, that training never saw. Retrieval ranks 1 + 49 hard",
            "negatives. Intervals: 95 %, bootstrap over examples.",
            "",
            "| data | task | metric | value | interval | n |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            "| data | kind | metric | interval | n |",
            "| --- | --- | --- | --- | --- |",
            *kinds,
            "",
        ]
    )


def _head_effects(effects: dict[str, Tensor]) -> str:
    lines = [
        "## What each head does",
        "",
        f"Fall of the right answer's log-probability (nats, mean of {N_ABLATION} dev examples) when the head",
        "is replaced by the mean of its layer's other heads.",
        "",
    ]
    for task, effect in effects.items():
        n_heads = effect.shape[1]
        lines += [f"**{task}**", "", "| layer | " + " | ".join(f"H{h}" for h in range(n_heads)) + " |"]
        lines.append("| --- |" + " --- |" * n_heads)
        lines += [
            f"| {layer} | " + " | ".join(f"{x:.2f}" for x in row) + " |"
            for layer, row in enumerate(effect.tolist())
        ]
        lines.append("")
    return "\n".join(lines)


def _neuron_effects(effects: dict[str, Tensor]) -> str:
    lines = [
        "## What each neuron does",
        "",
        "The same with one neuron zeroed at all positions; the ten largest, and how much of the sum of all",
        "positive effects the best 1 % and 5 % of the neurons hold. All neurons: `ablation.json`.",
        "",
        "| task | ten largest (nats) | best 1 % | best 5 % |",
        "| --- | --- | --- | --- |",
    ]
    for task, effect in effects.items():
        best = ", ".join(f"L{c.layer}N{c.index} {c.score:.3f}" for c in ranked(effect, 10))
        positive = effect.flatten().clamp(min=0).sort(descending=True).values
        shares = [
            float(positive[: max(1, round(f * len(positive)))].sum() / positive.sum()) for f in (0.01, 0.05)
        ]
        lines.append(f"| {task} | {best} | {shares[0]:.0%} | {shares[1]:.0%} |")
    return "\n".join([*lines, ""])
