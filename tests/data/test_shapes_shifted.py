"""The shifted shapes world: the same bytes everywhere, the same rules as `shapes`, another look."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import replace

import numpy as np
import pytest

from hones_lens.data import shapes, shapes_shifted
from hones_lens.data.drawing import LETTERS, PALETTE, RADII, glyph, shape_mask, text_box
from hones_lens.data.loading import load_examples
from hones_lens.data.shapes_shifted import SHIFTED_STYLE, ShiftedScene, backdrop, shifted_glyph

GOLDEN_PIXELS = {"discovery": "90e64d38e149706f", "dev": "1863799708eb6271", "test": "dca6bf7b24536957"}
TASKS = ("vqa", "ocr", "caption", "retrieval")


def sample_scenes(split: str, seed: int, count: int) -> list[ShiftedScene]:
    return list(itertools.islice(shapes_shifted.scenes(split, seed), count))


@pytest.mark.parametrize("split", GOLDEN_PIXELS)
def test_pixels_never_change(split):
    pixels = b"".join(scene.load().tobytes() for scene in sample_scenes(split, 11, 6))
    assert hashlib.sha256(pixels).hexdigest()[:16] == GOLDEN_PIXELS[split]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_served_by_name_with_right_answers(task):
    examples = load_examples("shapes-shifted", task, "dev", limit=12)
    assert [e.id for e in examples] == [f"shapes-shifted/dev/3407/{k}" for k in range(12)]
    assert [e.image_source for e in examples] == sample_scenes("dev", 3407, 12)
    assert {(e.image.size, e.image.mode) for e in examples} == {((112, 112), "RGB")}
    for example in examples:
        scene = example.facts["scene"]
        if task == "vqa":
            answers = {q.text: q.answer for q in shapes.questions(scene)}
            assert example.answers == (answers[example.question],)
        elif task == "ocr":
            assert example.text == scene.word
        elif task == "caption":
            assert example.references == scene.captions
        else:
            assert len(set(example.candidates)) == 50
            assert [c in scene.captions for c in example.candidates].index(True) == example.positive


def test_splits_are_by_word_and_share_no_scene_with_each_other_or_with_shapes():
    of_word: dict[str, set[str]] = {}
    for split, seed in itertools.product(("train", "discovery", "dev", "test"), (0, 3407)):
        plain = {s.things for s in itertools.islice(shapes.scenes(split, seed), 40)}
        for scene in sample_scenes(split, seed, 40):
            assert scene.split == split == shapes.split_of_word(scene.word)
            of_word.setdefault(scene.word, set()).add(split)
            assert scene.things not in plain
    assert all(len(splits) == 1 for splits in of_word.values())


def test_pictures_show_the_scene_in_the_shifted_look():
    for scene in sample_scenes("test", 5, 60):
        pixels = np.asarray(replace(scene, haze=0).load())
        expected = backdrop(scene).copy()
        for thing in scene.things:
            center = (thing.col + 0.5) * 112 / 3 + thing.dx, (thing.row + 0.5) * 112 / 3 + thing.dy
            mask = shape_mask(thing.shape, center, SHIFTED_STYLE.radii[thing.size], (112, 112))
            expected[mask] = np.clip(np.array(SHIFTED_STYLE.palette[thing.color]) + thing.shade, 0, 255)
        left, top, right, bottom = text_box(scene)
        outside = np.ones((112, 112), dtype=bool)
        outside[top:bottom, left:right] = False
        assert (pixels == expected)[outside].all()
        ink = (pixels == SHIFTED_STYLE.ink).all(-1)
        for i, letter in enumerate(scene.word):
            x = left + 8 + 14 * i
            assert (ink[top + 5 : top + 19, x : x + 10] == shifted_glyph(letter)).all()


def test_the_world_really_is_shifted():
    assert all(SHIFTED_STYLE.palette[color] != paint for color, paint in PALETTE.items())
    differ = [letter for letter in LETTERS if (glyph(letter) != shifted_glyph(letter)).any()]
    assert differ == list(LETTERS)
    assert all(SHIFTED_STYLE.radii[size] != radius for size, radius in RADII.items())
    assert len({shifted_glyph(letter).tobytes() for letter in LETTERS}) == len(LETTERS)
    scenes = sample_scenes("dev", 3407, 300)
    assert {abs(v) for s in scenes for t in s.things for v in (t.dx, t.dy)} == {0, 1, 2, 3, 4}


def test_every_third_scene_lies_in_haze():
    scenes = sample_scenes("dev", 3407, 300)
    assert [k for k, scene in enumerate(scenes) if scene.haze] == list(range(2, 300, 3))
    assert {scene.haze for scene in scenes if scene.haze} == set(range(50, 66))
    for scene in scenes[:9]:
        clear, seen = (np.asarray(s.load(), dtype=float) for s in (replace(scene, haze=0), scene))
        towards = clear + (235 - clear) * scene.haze / 100
        assert np.abs(seen - towards).max() < 1
        contrast = np.ptp(seen, axis=(0, 1)) / np.ptp(clear, axis=(0, 1))
        assert contrast == pytest.approx(1 - scene.haze / 100, abs=0.02)


def test_colours_can_still_be_told_apart():
    paints = {name: np.array(paint) for name, paint in SHIFTED_STYLE.palette.items()}
    for (a, one), (b, other) in itertools.combinations(paints.items(), 2):
        assert np.abs(one - other).sum() > 70, (a, b)
    for name, paint in paints.items():
        nearest = min(PALETTE, key=lambda plain: int(np.abs(paint - PALETTE[plain]).sum()))
        assert nearest == name


def test_the_backdrop_stays_when_a_fact_is_changed():
    scene = sample_scenes("dev", 1, 1)[0]
    for other in shapes.counterfactual_scenes(scene)[:5]:
        assert isinstance(other, ShiftedScene) and other.id != scene.id
        assert (backdrop(other) == backdrop(scene)).all()
    assert (backdrop(replace(scene, clutter=scene.clutter + 1)) != backdrop(scene)).any()


def test_a_smaller_limit_gives_a_prefix():
    many = [e.question for e in shapes_shifted.load("vqa", "dev", 8, seed=2)]
    assert [e.question for e in shapes_shifted.load("vqa", "dev", 3, seed=2)] == many[:3]


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match=r"unknown split 'val' .* valid: train, discovery, dev, test"):
        shapes_shifted.load("vqa", "val", 1)
    with pytest.raises(ValueError, match=r"no task 'vqaa'; valid: vqa, ocr, caption, retrieval"):
        shapes_shifted.load("vqaa", "dev", 1)
    with pytest.raises(ValueError, match="drawn, not read"):
        shapes_shifted.load("vqa", "dev", 1, data_file="x.json")
