from __future__ import annotations

import pytest

from hones_lens.data import shapes
from hones_lens.data.drawing import text_box
from hones_lens.data.loading import load_examples


def test_the_name_resolves_to_its_module():
    loaded = load_examples("shapes", "vqa", "test", limit=4, seed=12)
    drawn = shapes.load("vqa", "test", 4, 12)
    assert [(e.id, e.question, e.answers) for e in loaded] == [(e.id, e.question, e.answers) for e in drawn]
    assert [e.image.mode for e in loaded] == ["RGB"] * 4
    assert loaded[0].image.tobytes() == drawn[0].image.tobytes()


def test_pictures_of_many_sizes():
    varied = load_examples("shapes-varied", "vqa", "test", limit=60)
    assert {e.image.size for e in varied} == {(w, h) for w in (112, 140, 168) for h in (112, 140, 168)}
    assert {e.image.size for e in load_examples("shapes", "vqa", "test", limit=20)} == {(112, 112)}
    assert varied[0].id == "shapes-varied/test/3407/0"


def test_letters_lie_on_the_grid_of_patches_whatever_the_size():
    for example in load_examples("shapes-varied", "ocr", "dev", limit=60):
        scene = example.facts["scene"]
        left, top, right, bottom = text_box(scene)
        assert 0 <= left < right <= scene.size[0] and 0 <= top < bottom <= scene.size[1]
        assert min((left + 6) % 14, -(left + 6) % 14) <= 2
        assert min((top + 5) % 14, -(top + 5) % 14) <= 2


def test_the_default_seed_is_3407():
    default = load_examples("shapes", "ocr", "dev", limit=3)
    assert [e.text for e in default] == [e.text for e in shapes.load("ocr", "dev", 3, seed=3407)]


def test_an_unknown_data_set_raises_and_lists_the_valid_ones():
    with pytest.raises(ValueError, match="unknown data set 'shape'; valid: shapes"):
        load_examples("shape", "vqa", "dev")


def test_an_unknown_task_or_split_raises_and_lists_the_valid_ones():
    with pytest.raises(ValueError, match="'vqaa'; valid: vqa, ocr, caption, retrieval"):
        load_examples("shapes", "vqaa", "dev")
    with pytest.raises(ValueError, match=r"'val' .* valid: train, discovery, dev, test"):
        load_examples("shapes", "vqa", "val")


@pytest.mark.parametrize("name", ["data_file", "image_dir"])
def test_files_for_a_drawn_data_set_raise(name):
    with pytest.raises(ValueError, match="drawn, not read: leave out data_file and image_dir"):
        load_examples("shapes", "vqa", "dev", **{name: "somewhere"})


def test_a_world_that_is_drawn_takes_no_unknown_words_either():
    with pytest.raises(ValueError, match="unknown on_error 'ignore'; valid: raise, skip"):
        load_examples("shapes", "vqa", "dev", 1, on_error="ignore")
