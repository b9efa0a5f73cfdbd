"""The shapes world: the same bytes everywhere, right answers, false negatives, disjoint splits."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from helpers.picture_reader import Seen, answer_from_picture, look

from hones_lens.data import shapes, shapes_varied

# Of the first 12 scenes of seed 11: the shipped models were trained on this world.
GOLDEN_PIXELS = {
    "train": "ee122960e19cdf9a",
    "discovery": "b5f2463688332ad4",
    "dev": "6575bcb0e1f9e4a4",
    "test": "10102cfdadae7853",
}
GOLDEN_TEXTS = {
    "train": "1385bed55352cece",
    "discovery": "d487416dd94763d8",
    "dev": "0c63505a7b792121",
    "test": "ac78de4074596bab",
}


def sample_scenes(split: str, seed: int, count: int) -> list[shapes.Scene]:
    return list(itertools.islice(shapes.scenes(split, seed), count))


def pixel_hash(split: str) -> str:
    pixels = b"".join(scene.load().tobytes() for scene in sample_scenes(split, 11, 12))
    return hashlib.sha256(pixels).hexdigest()[:16]


def text_hash(split: str) -> str:
    lines: list[str] = []
    for k, scene in enumerate(sample_scenes(split, 11, 12)):
        rng, questions = shapes.SeededRandom("golden", split, k), shapes.questions(scene)
        lines += [repr(scene), scene.id, *scene.captions, *map(" ".join, questions)]
        lines += [shapes.random_question(rng, scene, q.kind).text for q in questions]
        lines += shapes.hard_negatives(rng, scene, 49)
    for task in ("vqa", "ocr", "caption", "retrieval"):
        lines += map(fields, shapes.load(task, split, 8, seed=5))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def fields(example: shapes.Example) -> str:
    return repr({k: v for k, v in vars(example).items() if k != "image"})


@pytest.mark.parametrize("split", shapes.SPLITS)
def test_pixels_and_texts_never_change(split):
    assert pixel_hash(split) == GOLDEN_PIXELS[split]
    assert text_hash(split) == GOLDEN_TEXTS[split]


def test_another_process_draws_the_same_bytes():
    program = "import test_shapes as t; print(t.pixel_hash('dev'), t.text_hash('dev'))"
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.dirname(here), os.path.dirname(os.path.dirname(here))])
    environment = os.environ | {"PYTHONHASHSEED": "4242", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.stdout.split() == [pixel_hash("dev"), text_hash("dev")], run.stderr


def test_a_seed_and_a_split_draw_other_scenes():
    ids = {s.id for split in shapes.SPLITS for seed in range(3) for s in sample_scenes(split, seed, 20)}
    assert len(ids) == 4 * 3 * 20


def test_an_unknown_split_raises_and_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"unknown split 'val' .* valid: train, discovery, dev, test"):
        next(shapes.scenes("val", 0))


def test_splits_share_no_word_and_no_image_whatever_the_seeds():
    of_word: dict[str, set[str]] = {}
    of_image: dict[bytes, set[str]] = {}
    for split in shapes.SPLITS:
        for seed in (0, 1, 3407):
            for scene in sample_scenes(split, seed, 30):
                image = hashlib.sha256(scene.load().tobytes()).digest()
                of_word.setdefault(scene.word, set()).add(split)
                of_image.setdefault(image, set()).add(split)
                assert scene.split == split
    assert len(of_word) > 200 and all(len(splits) == 1 for splits in of_word.values())
    assert len(of_image) > 300 and all(len(splits) == 1 for splits in of_image.values())


def test_seven_in_ten_words_are_for_training():
    words = ("".join(letters) for letters in itertools.product(shapes.LETTERS, repeat=3))
    share = Counter(map(shapes.split_of_word, words))
    total = sum(share.values())
    assert total == 16**3
    assert 0.67 < share["train"] / total < 0.73
    assert all(0.08 < share[split] / total < 0.12 for split in ("discovery", "dev", "test"))


@pytest.mark.parametrize("sides", [shapes.IMAGE_SIZE[:1], shapes_varied.IMAGE_SIDES])
def test_pictures_show_the_scene(sides):
    for scene in itertools.islice(shapes.scenes("discovery", 8, sides), 80):
        image = scene.load()
        assert image.size == scene.size
        picture = look(image)
        drawn = {
            Seen(
                t.shape,
                t.color,
                t.size,
                ("top", "center", "bottom")[t.row],
                ("left", "middle", "right")[t.col],
            )
            for t in scene.things
        }
        assert picture.things == drawn
        assert picture.word == scene.word
        assert picture.text_row == ("top", "center", "bottom")[scene.text_row]


def test_every_colour_and_shape_has_a_name_and_every_name_is_of_two():
    assert set(shapes.THING_NAMES) == set(itertools.product(shapes.COLORS, shapes.SHAPES))
    assert set(Counter(shapes.THING_NAMES.values()).values()) == {2}
    assert shapes.THING_NAMES["red", "circle"] == shapes.THING_NAMES["yellow", "triangle"] == "dax"


def test_no_sum_of_a_colours_and_a_shapes_evidence_tells_names_apart():
    """In every block of 2 x 2 the sums of the right scores and of the wrong ones are equal."""
    owners: dict[str, list[tuple[str, str]]] = {}
    for pair, name in shapes.THING_NAMES.items():
        owners.setdefault(name, []).append(pair)
    for name, ((c1, s1), (c2, s2)) in owners.items():
        assert c1 != c2 and s1 != s2
        others = {shapes.THING_NAMES[c1, s2], shapes.THING_NAMES[c2, s1]}
        assert len(others) == 1 and name not in others


def test_all_shapes_of_a_colour_and_all_colours_of_a_shape_have_different_names():
    for color in shapes.COLORS:
        assert len({shapes.THING_NAMES[color, shape] for shape in shapes.SHAPES}) == 4
    for shape in shapes.SHAPES:
        assert len({shapes.THING_NAMES[color, shape] for color in shapes.COLORS}) == 6


def test_every_question_has_the_answer_that_the_picture_shows():
    kinds = Counter()
    for scene in sample_scenes("test", 21, 80):
        picture = look(scene.load())
        for question in shapes.questions(scene):
            assert question.answer == answer_from_picture(question.text, picture)
            kinds[question.kind] += 1
    assert set(kinds) == set(shapes.KINDS)


def test_vqa_takes_the_seven_kinds_in_turn_and_uses_many_answers():
    examples = shapes.load("vqa", "discovery", 140, seed=2)
    assert Counter(e.kind for e in examples) == dict.fromkeys(shapes.KINDS, 20)
    answers = {kind: {e.answers[0] for e in examples if e.kind == kind} for kind in shapes.KINDS}
    assert answers["count"] == {"zero", "one", "two"}
    assert answers["size"] == {"small", "large"}
    assert answers["where"] == {"left", "middle", "right"}
    assert answers["text"] == {"top", "center", "bottom"}
    assert len(answers["color"]) >= 5 and len(answers["shape"]) == 4 and len(answers["name"]) >= 8
    for example in examples[:35]:
        assert example.answers == (answer_from_picture(example.question, look(example.image)),)


def parse(caption: str) -> tuple[tuple[str, ...], ...]:
    """Things of a caption as (size, color, shape, place), in any order."""
    phrase = re.compile(r"a (\w+) (\w+) (\w+) at the (\w+ \w+)")
    parts = [phrase.fullmatch(part) for part in caption.split(" and ")]
    return tuple(sorted(part.groups() for part in parts if part))


def distance(a: tuple[tuple[str, ...], ...], b: tuple[tuple[str, ...], ...]) -> int:
    """How many attributes differ, things matched so that it is as few as can be."""
    assert len(a) == len(b)
    orders = itertools.permutations(b)
    return min(
        sum(x != y for one, other in zip(a, order, strict=True) for x, y in zip(one, other, strict=True))
        for order in orders
    )


def test_captions_say_what_the_picture_shows():
    for scene in sample_scenes("dev", 4, 40):
        picture = look(scene.load())
        expected = tuple(sorted((t.size, t.color, t.shape, f"{t.row} {t.column}") for t in picture.things))
        assert len(scene.captions) == len(set(scene.captions)) == len(picture.things)
        assert [parse(caption) for caption in scene.captions] == [expected] * len(scene.captions)


def test_there_are_always_49_false_negatives_of_one_or_two_changes():
    sizes = Counter()
    for k, scene in enumerate(sample_scenes("dev", 6, 20)):
        negatives = shapes.hard_negatives(shapes.SeededRandom("test", k), scene, 49)
        truth = parse(scene.captions[0])
        assert len({parse(caption) for caption in negatives}) == 49
        assert {distance(parse(caption), truth) for caption in negatives} == {1, 2}
        sizes[len(scene.things)] += 1
    assert min(sizes[1], sizes[2]) >= 4


def test_retrieval_hides_the_one_true_caption_among_the_negatives():
    positions = set()
    for example in shapes.load("retrieval", "test", 20, seed=3):
        scene = example.facts["scene"]
        assert len(example.candidates) == len(set(example.candidates)) == 50
        truths = [i for i, c in enumerate(example.candidates) if parse(c) == parse(scene.captions[0])]
        assert truths == [example.positive]
        positions.add(example.positive)
    assert len(positions) > 10


def test_ocr_and_caption_examples_read_the_scene():
    for example in shapes.load("ocr", "dev", 10):
        assert example.text == look(example.image).word
    for example in shapes.load("caption", "dev", 10):
        assert example.references == example.facts["scene"].captions


@pytest.mark.parametrize("task", ["vqa", "ocr", "caption", "retrieval"])
def test_a_smaller_limit_gives_a_prefix_and_tasks_share_scenes(task):
    many = [fields(e) for e in shapes.load(task, "dev", 6, seed=9)]
    assert [fields(e) for e in shapes.load(task, "dev", 3, seed=9)] == many[:3]
    assert [e.image_source for e in shapes.load(task, "dev", 6, seed=9)] == sample_scenes("dev", 9, 6)
    assert len({e.id for e in shapes.load(task, "dev", 6, seed=9)}) == 6


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match=r"no task 'vqaa'; valid: vqa, ocr, caption, retrieval"):
        shapes.load("vqaa", "dev", 1)
    with pytest.raises(ValueError, match="limit must be at least 1, not 0"):
        shapes.load("vqa", "dev", 0)
