"""Attention knockout against Hugging Face's own eager attention with its mask edited, layer by layer."""

from __future__ import annotations

import pytest
import torch
from helpers import random_llava, random_qwen
from helpers.hf_twin import Step, Twin, at, hooked
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from hones_lens import HookedVLM, VLMInputs, checkpoint_path, load_examples, load_task
from hones_lens.analysis.knockout import EDGES, attention_knockout
from hones_lens.analysis.patching.pairs import PatchPairs
from hones_lens.interventions.token_groups import Box, token_mask

PROMPTS = ["what color is the circle?", "Question: how many shapes are there?\nAnswer the question."]
ANSWERS = ["red", "two one"]


def twin(made) -> Twin:
    both = Twin(made)
    both.hf.set_attn_implementation("eager")
    return both


def batch(model: HookedVLM, answers: list[str] | None = None) -> VLMInputs:
    """Two rows of different lengths, one of them with two images."""
    one, two, three = random_llava.make_images(3, size=(40, 31))
    return model.prepare([one, [two, three]], PROMPTS, answers)


def forbidding(edges: Tensor, layers: list[int]) -> list[Step]:
    """Steps that take edges [batch query key] from Hugging Face's mask in some layers."""

    def edit(keywords: dict, memory: dict) -> None:
        mask = keywords["attention_mask"]
        keywords["attention_mask"] = mask.masked_fill(edges[:, None], torch.finfo(mask.dtype).min)

    return [(at(layer, "self_attn"), "keywords", edit) for layer in layers]


def windows(n_layers: int, width: int) -> list[list[int]]:
    """Layers within a window around each layer, told layer by layer."""
    below, above = (width - 1) // 2, width // 2
    return [[l for l in range(n_layers) if c - below <= l <= c + above] for c in range(n_layers)]


@pytest.mark.parametrize("made", [random_llava, random_qwen], ids=["llava", "qwen"])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_equals_hugging_faces_attention_with_its_mask_edited(made, width: int) -> None:
    both = twin(made)
    inputs = batch(both.model, ANSWERS)
    answer = inputs.answer_mask
    assert answer is not None and int(answer.sum(-1).max()) > 1, "answers of several tokens"
    groups = {name: inputs.token_groups[name] for name in ("image", "question")}
    groups["last"] = answer | answer.roll(-1, 1)  # the prompt's last token, and those behind it

    def right(steps: list[Step]) -> Tensor:
        """Of the whole answer, by one pass over prompt and answer."""
        log_probs = both.logits(inputs, steps)[:, :-1].log_softmax(-1)
        return (log_probs.gather(-1, inputs.input_ids[:, 1:, None])[..., 0] * answer[:, 1:]).sum(-1)

    clean = right([])
    expected = {"probability": [], "log_prob": []}
    for layers in windows(3, min(width, 3)):
        for source, target in EDGES:
            edges = groups[target][:, :, None] & groups[source][:, None, :]
            cut = right(forbidding(edges, layers))
            expected["probability"].append(float(cut.exp().mean() / clean.exp().mean()) - 1)
            expected["log_prob"].append(float((cut - clean).mean()))
    for metric, values in expected.items():
        found = attention_knockout(both.model, inputs, window=width, metric=metric, progress=False)
        assert found.axes == ("layer", "edge") and found.n == 2
        assert found.names("edge") == tuple(f"{source} → {target}" for source, target in EDGES)
        assert found.values.flatten().tolist() == pytest.approx(values, abs=2e-5)
        assert found.values.abs().max() > 1e-3


def test_intervals_are_those_of_resampled_ratios() -> None:
    both = twin(random_llava)
    inputs = both.model.prepare(random_llava.make_images(6), [PROMPTS[0]] * 6, ["red"] * 6)
    edges = [("image", "last")]
    found = attention_knockout(both.model, inputs, edges, window=1, batch_size=4, draws=4000, progress=False)
    single = [
        attention_knockout(both.model, inputs[i], edges, window=1, metric="log_prob", progress=False)
        for i in range(6)
    ]
    assert all(one.low is None and one.n == 1 for one in single), "one example has no interval"
    assert inputs.answer_mask is not None
    log_probs = both.logits(inputs)[:, :-1].log_softmax(-1)
    right = log_probs.gather(-1, inputs.input_ids[:, 1:, None])[..., 0]
    p = (right * inputs.answer_mask[:, 1:]).sum(-1).exp()
    changes = torch.stack([one.values[:, 0] for one in single])  # [example layer], in nats
    after = p[:, None] * changes.exp()
    assert found.values[:, 0].tolist() == pytest.approx((after.mean(0) / p.mean() - 1).tolist(), abs=1e-5)
    drawn = torch.randint(6, (20_000, 6), generator=torch.Generator().manual_seed(1))
    ratios = after[drawn].sum(1) / p[drawn].sum(1)[:, None] - 1
    for share, ends in ((0.025, found.low), (0.975, found.high)):
        assert ends is not None
        spread = float(ratios.std(0).max())
        assert ends[:, 0].tolist() == pytest.approx(ratios.quantile(share, dim=0).tolist(), abs=0.15 * spread)


def test_tokens_keep_themselves_where_nothing_else_is_left() -> None:
    both = twin(random_llava)
    inputs = batch(both.model)
    tokens = inputs.attention_mask.bool()
    itself = torch.eye(tokens.shape[1], dtype=torch.bool)
    edges = tokens[:, :, None] & tokens[:, None, :] & ~itself
    pairs = PatchPairs(inputs, inputs, torch.tensor([7, 8]), torch.tensor([9, 10]), ("a", "b"))
    options = {"window": 1, "progress": False}
    found = attention_knockout(both.model, pairs, [("all", "all")], metric="logit_diff", **options)

    def difference(steps: list[Step]) -> Tensor:
        last = both.logits(inputs, steps)[:, -1]
        return (last[:, [7, 8]] - last[:, [9, 10]]).diagonal()

    expected = [float((difference(forbidding(edges, [l])) - difference([])).mean()) for l in range(3)]
    assert found.values[:, 0].tolist() == pytest.approx(expected, abs=2e-5)
    assert f"all → all: {int(tokens.sum())} queries" in found.notes[-1]
    cut = attention_knockout(both.model, pairs, [("last", "last")], metric="kl", **options)
    assert not any("kept themselves" in note for note in cut.notes), "other keys were left"


def test_boxes_masks_and_names_of_your_own() -> None:
    both = twin(random_qwen)
    pictures = random_llava.make_images(2, size=(40, 31))
    inputs = both.model.prepare(pictures, PROMPTS, ANSWERS)
    prompts, box = inputs.before_answers(), Box(0, 0, 15, 15)
    mask = token_mask(prompts, box)
    last = prompts.token_groups["last"]
    edges = {"corner": (box, "last"), "the same": (mask, last)}
    found = attention_knockout(both.model, inputs, edges, window=1, metric="kl", batch_size=1, progress=False)
    assert found.names("edge") == ("corner", "the same")
    assert torch.allclose(found.values[:, 0], found.values[:, 1], atol=1e-6)
    clean = both.logits(prompts)[:, -1].log_softmax(-1)
    for layer in range(3):
        steps = forbidding(last[:, :, None] & mask[:, None], [layer])
        cut = both.logits(prompts, steps)[:, -1].log_softmax(-1)
        expected = -(clean.exp() * (clean - cut)).sum(-1).mean()
        assert found.values[layer, 0].item() == pytest.approx(float(expected), abs=2e-5)


def test_generated_answers_lose_what_hugging_faces_would() -> None:
    """The task's own metric: each example alone, each token by a whole pass of Hugging Face's model."""
    model, task = HookedVLM.from_pretrained("tiny-llava"), load_task("vqa")
    hf = LlavaForConditionalGeneration.from_pretrained(
        checkpoint_path("tiny-llava"), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    examples = load_examples("shapes", "vqa", "dev", limit=9)

    def says(example, layers: list[int]) -> str:
        inputs = model.prepare([example.image], [task.target_prompt(example)])
        image, prompt = inputs.image_mask, inputs.input_ids.shape[1]
        said: list[int] = []
        while len(said) < 24 and (not said or said[-1] not in model.cfg.eos_token_ids):
            grown = inputs.extended(torch.tensor([said], dtype=torch.long))
            n = grown.input_ids.shape[1]
            edges = torch.zeros(1, n, n, dtype=torch.bool)
            edges[0, prompt - 1 :, :prompt] = image[0]
            with torch.no_grad(), hooked(hf, forbidding(edges, layers)):
                said.append(int(hf(**grown.to_hf()).logits[0, -1].argmax()))
        return model.tokenizer.decode(said, skip_special_tokens=True).strip()

    clean = [task.score(says(e, []), e) for e in examples]
    options = {"task": "vqa", "window": 3, "metric": "task", "batch_size": 4, "progress": False}
    found = attention_knockout(model, examples, [("image", "last")], **options)
    assert f"{sum(clean) / 9:.4g}" in found.notes[0]
    for layer, layers in ((1, [0, 1, 2]), (3, [2, 3])):
        cut = [task.score(says(e, layers), e) for e in examples]
        change = (sum(cut) - sum(clean)) / 9
        assert found.values[layer, 0].item() == pytest.approx(change, abs=1e-9)
    assert found.values[1, 0] < -0.3, "the answers come from the picture"
    assert found.low is not None and found.high is not None
    assert bool((found.low <= found.values).all()) and bool((found.values <= found.high).all())


def test_examples_are_asked_as_the_task_asks() -> None:
    model, task = HookedVLM.from_pretrained("tiny-qwen2.5-vl"), load_task("vqa")
    examples = load_examples("shapes", "vqa", "dev", limit=5)
    prompts, answers = [task.target_prompt(e) for e in examples], [task.answer(e) for e in examples]
    inputs = model.prepare([e.image for e in examples], prompts, answers)
    options = {"window": 2, "progress": False}
    by_examples = attention_knockout(model, examples, task="vqa", batch_size=2, **options)
    by_inputs = attention_knockout(model, inputs, **options)
    assert torch.allclose(by_examples.values, by_inputs.values, atol=1e-5)
    assert by_examples.values.min() < -0.1


def test_bad_input_raises() -> None:
    both = twin(random_llava)
    inputs = batch(both.model, ANSWERS)

    def run(edges=EDGES, data=inputs, **options) -> None:
        attention_knockout(both.model, data, edges, progress=False, **options)

    with pytest.raises(ValueError, match="'question → image' cuts nothing in row 0"):
        run([("question", "image")])
    with pytest.raises(ValueError, match="unknown token group 'picture'"):
        run([("picture", "last")])
    with pytest.raises(ValueError, match="no edges"):
        run([])
    with pytest.raises(ValueError, match="two edges have one name"):
        run([("image", "last"), ("image", "last")])
    with pytest.raises(ValueError, match="window must be at least 1"):
        run(window=0)
    with pytest.raises(ValueError, match="unknown patching metric 'loss'"):
        run(metric="loss")
    with pytest.raises(ValueError, match="no foil"):
        run(metric="logit_diff")
    with pytest.raises(ValueError, match="mark no answer"):
        run(data=batch(both.model))
    with pytest.raises(ValueError, match="examples with their task"):
        run(metric="task")
    with pytest.raises(ValueError, match="examples with their task"):
        run(data=load_examples("shapes", "vqa", "dev", limit=2))
    with pytest.raises(ValueError, match="no examples"):
        run(data=[], task="vqa")
