"""Splits are drawn over images, or taken from a file that lists them."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.dataset_files import FORMATS, WrittenDataset, write

from hones_lens.data.loading import load_examples
from hones_lens.data.splits import SPLITS, split_of

KEYS = [str(n) for n in range(5000)]


@pytest.fixture
def dataset(tmp_path: Path) -> WrittenDataset:
    return FORMATS["hones"](tmp_path / "set")


def ids(dataset: WrittenDataset, split: object, task: str = "vqa", **options) -> list[str]:
    loaded = load_examples("hones", task, str(split), **dataset.files, **options)
    return [e.facts["image_id"] for e in loaded]


def test_seven_one_and_two_in_ten_whatever_the_seed():
    for seed in (0, 3407):
        splits = [split_of(key, seed) for key in KEYS]
        assert 0.68 < splits.count("discovery") / 5000 < 0.72
        assert 0.09 < splits.count("dev") / 5000 < 0.11
        assert 0.18 < splits.count("test") / 5000 < 0.22


def test_the_split_of_an_image_never_changes():
    known = {"158362": "discovery", "n161313": "discovery", "1000092795.jpg": "discovery", "42": "dev"}
    assert {key: split_of(key, 3407) for key in known} == known


def test_another_seed_draws_another_split_and_order(dataset):
    assert set(ids(dataset, "test")) != set(ids(dataset, "test", seed=1))
    assert ids(dataset, "test") == ids(dataset, "test", seed=3407)
    assert ids(dataset, "discovery") != sorted(ids(dataset, "discovery"))


def test_all_keeps_the_order_of_the_file(dataset):
    assert ids(dataset, "all") == ids(dataset, "all", seed=1) == [str(100 + i) for i in range(40)]


def test_the_four_tasks_see_the_same_images(dataset):
    assert (
        set(ids(dataset, "test"))
        == set(ids(dataset, "test", "ocr"))
        == set(ids(dataset, "test", "retrieval"))
    )


def test_an_unknown_split_raises_and_lists_the_valid_ones(dataset):
    with pytest.raises(
        ValueError, match=r"unknown split 'val'; valid: discovery, dev, test, all, or a .json"
    ):
        ids(dataset, "val")
    assert SPLITS == ("discovery", "dev", "test", "all")


@pytest.mark.parametrize(
    "content",
    [
        [104, 101],
        ["104", "101"],
        ["COCO_val2014_000000000104.jpg", "COCO_val2014_000000000101.jpg"],
        [{"image_id": 104, "vqa": {}}, {"image_id": 101}],
        {"image_ids": [104, 101]},
        {"ids": [104, 101], "seed": 3407},
        {"file_names": ["COCO_val2014_000000000104.jpg", "COCO_val2014_000000000101.jpg"]},
        {"images": [{"file_name": "COCO_val2014_000000000104.jpg"}, 101]},
    ],
)
def test_a_split_file_lists_images(dataset, tmp_path, content):
    assert set(ids(dataset, write(tmp_path / "dev.json", content))) == {"101", "104"}


def test_a_file_of_several_splits_is_asked_by_name(dataset, tmp_path):
    file = write(tmp_path / "splits.json", {"discovery": [100, 101, 102], "dev": {"image_ids": [103]}})
    assert set(ids(dataset, f"{file}:discovery")) == {"100", "101", "102"}
    assert ids(dataset, f"{file}:dev") == ["103"]


def test_split_files_that_are_wrong_raise(dataset, tmp_path):
    file = tmp_path / "splits.json"
    write(file, {"discovery": [100], "dev": [101]})
    with pytest.raises(ValueError, match=r"splits\.json has no split 'test'; it has: discovery, dev"):
        ids(dataset, f"{file}:test")
    with pytest.raises(ValueError, match=r"a split needs a list or one key of .*give .*splits\.json:NAME"):
        ids(dataset, file)
    write(file, {"discovery": [100, 101], "dev": ["101"]})
    with pytest.raises(ValueError, match="splits 'dev' and 'discovery' share image 101"):
        ids(dataset, f"{file}:dev")
    write(file, [])
    with pytest.raises(ValueError, match="must be a list that is not empty"):
        ids(dataset, file)
    write(file, [100, 1.5])
    with pytest.raises(ValueError, match="entry 2 is neither an image's id nor a file name"):
        ids(dataset, file)
    with pytest.raises(FileNotFoundError, match=r"no such file: .*absent\.json"):
        ids(dataset, tmp_path / "absent.json")


def test_what_a_split_file_lists_in_vain_is_named(dataset, tmp_path):
    file = write(tmp_path / "dev.json", [104, 999])
    with pytest.raises(ValueError, match=r"record 999: is in .*dev\.json, but not in the data file"):
        ids(dataset, file)
    with pytest.warns(UserWarning, match="1 record left out: record 999"):
        assert ids(dataset, file, on_error="skip") == ["104"]
