from __future__ import annotations

import json

import pytest
import torch

from hones_lens.app.tiny import tiny_data, tiny_llava, tiny_qwen, train_tiny
from hones_lens.app.tiny.train_tiny import Recipe, learning_rate, train
from hones_lens.data import shapes
from hones_lens.model.hooked_vlm import HookedVLM

SMALL = Recipe(steps=2, naming_steps=2, frozen_steps=1, batch=2, warmup=1, save_every=1)


@pytest.fixture(autouse=True)
def _small_evaluation(monkeypatch):
    """What is held out is measured on one scene where training takes sixteen."""
    draw = tiny_data.training_scenes

    def few(seed, step, count, split="train", sides=shapes.IMAGE_SIZE[:1]):
        return draw(seed, step, count if split == "train" else 1, split, sides)

    monkeypatch.setattr(tiny_data, "training_scenes", few)


@pytest.mark.exhaustive
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_broken_training_goes_on_to_the_same_weights(tmp_path, monkeypatch, at):
    whole = train(tiny_llava, tmp_path / "whole", SMALL)
    step = train_tiny._step

    def broken(family, model, optimizers, price, number, recipe):
        if number == at:
            raise KeyboardInterrupt
        return step(family, model, optimizers, price, number, recipe)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_tiny, "_step", broken)
        train(tiny_llava, tmp_path / "broken", SMALL)
    resumed = train(tiny_llava, tmp_path / "broken", SMALL)
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "broken" / "log.jsonl").read_text().splitlines()
    ]
    assert steps == [0, 1, 2, 3]
    assert {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json"} <= {
        p.name for p in (tmp_path / "broken" / "model").iterdir()
    }


def test_another_recipe_is_refused(tmp_path):
    train(tiny_llava, tmp_path, Recipe(steps=1, naming_steps=0, batch=1))
    with pytest.raises(ValueError, match="another recipe"):
        train(tiny_llava, tmp_path, Recipe(steps=2, naming_steps=0, batch=1))


@pytest.mark.exhaustive
def test_pictures_have_one_size_at_first(tmp_path, monkeypatch):
    drawn, draw = [], tiny_data.training_scenes

    def watched(seed, step, count, split="train", sides=shapes.IMAGE_SIZE[:1]):
        if split == "train":
            drawn.append(tuple(sides))
        return draw(seed, step, count, split, sides)

    monkeypatch.setattr(tiny_data, "training_scenes", watched)
    train(tiny_qwen, tmp_path, Recipe(steps=3, naming_steps=1, batch=1, warmup=1, one_size_steps=2))
    assert drawn == [(112,), (112,), tiny_qwen.TRAINING_SIDES, tiny_qwen.TRAINING_SIDES]


def test_the_rate_warms_up_and_falls_in_every_part():
    recipe = Recipe(steps=1000, naming_steps=500, shape_steps=400)
    rates = [learning_rate(step, recipe) for step in range(1900)]
    parts = (
        (rates[:1000], recipe.lr),
        (rates[1000:1500], recipe.naming_lr),
        (rates[1500:], recipe.shape_lr),
    )
    for part, peak in parts:
        assert max(part) == pytest.approx(peak) and part.index(max(part)) in (99, 100)
        assert part[0] < part[50] < max(part)
        assert part[-1] == pytest.approx(0.02 * peak, rel=0.02)


def fresh(family):
    torch.manual_seed(0)
    processor = family.build_processor()
    hf_model = family.build_model(processor).eval()
    return hf_model, HookedVLM.from_hf(hf_model, processor)


def test_the_price_is_what_the_formula_says():
    hf_model, model = fresh(tiny_llava)
    price, neurons = train_tiny.NeuronPrice(model), []
    inputs = tiny_data.pack(model, tiny_data.training_scenes(0, 0, 1)).inputs  # no padding
    for layer in hf_model.model.language_model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args: neurons.append((module, args[0])))
    with torch.no_grad():
        model(inputs)
        hf_model(**inputs.to_hf())
        wanted = [
            sum(m[..., i].abs().mean() * d.weight[:, i].norm() for i in range(m.shape[-1]))
            for d, m in neurons
        ]
        torch.testing.assert_close(price.take(), torch.stack(wanted).mean())


@pytest.mark.exhaustive
@pytest.mark.parametrize("frozen_steps", [2, 1])
def test_the_second_part_leaves_what_sees_as_it_was_while_it_is_frozen(tmp_path, frozen_steps):
    recipe = Recipe(steps=0, naming_steps=2, frozen_steps=frozen_steps, batch=2, warmup=1)
    model = train(tiny_llava, tmp_path, recipe)
    torch.manual_seed(recipe.seed)
    before = tiny_llava.build_model(tiny_llava.build_processor())
    seeing = dict(HookedVLM.from_hf(before).named_parameters())
    for name, parameter in model.named_parameters():
        frozen = name.startswith("vision_") and frozen_steps == recipe.naming_steps
        assert torch.equal(parameter, seeing[name]) == frozen, name


def test_the_first_part_asks_for_no_names():
    for step in range(30):
        for scene, rng in tiny_data.training_scenes(0, step, 4):
            assert "name" not in {t.kind for t in tiny_data.conversation(scene, rng, naming=False)}


@pytest.mark.parametrize("naming", [False, True])
def test_captions_to_judge_are_true_or_false_as_said(naming):
    verdicts, parts = [], 0
    for step in range(40):
        for scene, rng in tiny_data.training_scenes(0, step, 4):
            true = {*scene.captions, *(thing.phrase for thing in scene.things)}
            turns = tiny_data.conversation(scene, rng, naming)
            turns = [t for t in turns if t.kind == "retrieval"]
            assert len(turns) == 4
            for turn in turns:
                candidate = turn.prompt.splitlines()[0].removeprefix("Candidate: ")
                assert turn.answer == ("Yes" if candidate in true else "No")
                verdicts.append(turn.answer)
                parts += len(scene.things) == 2 and " and " not in candidate
    assert 0.4 < verdicts.count("Yes") / len(verdicts) < 0.6
    assert (parts == 0) == naming


def test_most_false_captions_of_the_second_part_move_a_thing_within_its_row():
    """The column is the last word of a phrase: put another there and all else must agree."""
    sideways = total = 0
    for step in range(60):
        for scene, rng in tiny_data.training_scenes(0, step, 4):
            for turn in tiny_data.conversation(scene, rng):
                if turn.kind == "retrieval" and turn.answer == "No":
                    said = turn.prompt.splitlines()[0].removeprefix("Candidate: ").split(" and ")
                    shown = scene.captions[0].split(" and ")
                    rows = [sorted(p.rpartition(" ")[0] for p in phrases) for phrases in (said, shown)]
                    sideways += rows[0] == rows[1]
                    total += 1
    assert 0.4 < sideways / total < 0.7


def test_the_share_of_pictures_whose_word_is_asked_for():
    for share, wanted in ((0.0, 0), (1.0, 40)):
        scenes = [pair for step in range(10) for pair in tiny_data.training_scenes(0, step, 4)]
        kinds = [
            [turn.kind for turn in tiny_data.conversation(scene, rng, True, share)] for scene, rng in scenes
        ]
        assert sum("ocr" in asked for asked in kinds) == wanted


@pytest.mark.exhaustive
def test_the_second_part_makes_neurons_quieter(tmp_path):
    train(tiny_llava, tmp_path, Recipe(steps=1, naming_steps=12, batch=2, warmup=1, neuron_price=1.0))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["neurons"] < 0.9 * log[1]["neurons"]


@pytest.mark.parametrize("family", [tiny_llava, tiny_qwen])
def test_a_packed_row_gives_the_logits_of_ordinary_prompts(family):
    """Packing behind one image prefix must be the same computation as separate prompts."""
    hf_model, model = fresh(family)
    steps = [step for step in range(20) if family is tiny_llava or _size(family, step) != (112, 112)]
    drawn = tiny_data.training_scenes(0, steps[0], 2, sides=family.TRAINING_SIDES)
    row = 0
    with torch.no_grad():
        packed = tiny_data.answer_logits(model, tiny_data.pack(model, drawn))
        for scene, rng in tiny_data.training_scenes(0, steps[0], 2, sides=family.TRAINING_SIDES):
            for turn in tiny_data.conversation(scene, rng):
                inputs = model.prepare(scene.load(), turn.prompt, answers=turn.answer)
                said = int(inputs.answer_mask.sum()) + 1  # and the end of the answer
                logits = hf_model(**inputs.to_hf()).logits[0, -said:]
                torch.testing.assert_close(packed[row : row + said], logits, atol=5e-5, rtol=0)
                row += said
    assert row == len(packed)


def test_the_third_part_dwells_on_shapes():
    asked = possible = other_shape = false = 0
    for step in range(60):
        for scene, rng in tiny_data.training_scenes(1, step, 4):
            possible += any(q.kind == "shape" for q in shapes.questions(scene))
            things = [f"{t.size} {t.color}" for t in sorted(scene.things, key=lambda t: (t.row, t.col))]
            places = [f"{t.row} {t.col}" for t in sorted(scene.things, key=lambda t: (t.row, t.col))]
            for turn in tiny_data.conversation(scene, rng, emphasis="shape"):
                asked += turn.kind == "shape"
                if turn.kind == "retrieval" and turn.answer == "No":
                    said = [
                        phrase.split() for phrase in turn.prompt.split("\n")[0].split(": ")[1].split(" and ")
                    ]
                    told = [f"{words[1]} {words[2]}" for words in said]
                    where = [f"{shapes.ROWS.index(w[6])} {shapes.COLUMNS.index(w[7])}" for w in said]
                    false += 1
                    other_shape += told == things and where == places
    assert asked == possible > 150
    assert 0.5 < other_shape / false < 0.75


@pytest.mark.exhaustive
def test_all_three_parts_train(tmp_path):
    train(tiny_qwen, tmp_path, Recipe(steps=1, naming_steps=1, shape_steps=1, batch=1, warmup=1))
    steps = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps] == [0, 1, 2] and "held_out" in steps[-1]


def _size(family, step: int) -> tuple[int, int]:
    return tiny_data.training_scenes(0, step, 1, sides=family.TRAINING_SIDES)[0][0].size


def test_half_the_steps_of_qwen_show_other_sizes():
    sizes = [_size(tiny_qwen, step) for step in range(200)]
    assert 80 < sum(size == (112, 112) for size in sizes) < 140
    assert len(set(sizes)) == 9


def test_training_sees_no_word_of_another_split():
    for step in range(40):
        for scene, _ in tiny_data.training_scenes(0, step, 4):
            assert shapes.split_of_word(scene.word) == "train"


def test_a_bad_loss_stops_the_training(tmp_path, monkeypatch):
    logits = tiny_data.answer_logits
    monkeypatch.setattr(tiny_data, "answer_logits", lambda model, batch: logits(model, batch) * float("nan"))
    with pytest.raises(FloatingPointError, match="step 0"):
        train(tiny_llava, tmp_path, SMALL)
