"""Data sets by the package `datasets`, here from a local folder in place of the Hub."""

from __future__ import annotations

import sys

import pytest
from helpers.dataset_files import box, sample_scenes, ten_answers
from PIL import Image

from hones_lens.data import shapes
from hones_lens.data.check import check_data
from hones_lens.data.loading import load_examples

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    scenes = sample_scenes(30)
    questions = [shapes.questions(scene)[-1] for scene in scenes]
    table = {
        "image": [scene.load() for scene in scenes],
        "image_id": [f"i{n}" for n in range(30)],
        "question_id": list(range(30)),
        "question": [q.text for q in questions],
        "answers": [ten_answers(q.answer) for q in questions],
        "text": [scene.word for scene in scenes],
        "bbox": [box(scene) for scene in scenes],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "image_id": datasets.Value("string"),
            "question_id": datasets.Value("int64"),
            "question": datasets.Value("string"),
            "answers": datasets.List(datasets.Value("string")),
            "text": datasets.Value("string"),
            "bbox": datasets.List(datasets.Value("float64")),
        }
    )
    path = tmp_path_factory.mktemp("hub") / "set"
    path.mkdir()
    data = datasets.Dataset.from_dict(table, features=features)
    data.to_parquet(path / "validation-00000.parquet")
    data.remove_columns(["image_id", "question_id"]).to_parquet(path / "test-00000.parquet")
    return path


@pytest.fixture(autouse=True)
def _own_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")


def test_a_set_loads_with_its_pictures(folder):
    name = f"hf:{folder}@validation"
    for task in ("vqa", "ocr"):
        examples = load_examples(name, task, "all")
        assert [e.facts["image_id"] for e in examples] == [f"i{n}" for n in range(30)]
        assert examples[0].image.size == (112, 112) and examples[3].image.mode == "RGB"
    assert len(load_examples(name, "vqa", "test")[0].answers) == 10
    assert check_data(name).tasks["vqa"].usable == 30


def test_without_ids_pictures_are_told_apart_by_their_bytes(folder):
    examples = load_examples(f"hf:{folder}@test", "vqa", "all")
    assert len({e.facts["image_id"] for e in examples}) == 30
    assert examples[4].id.endswith("@test/number 5")


def test_what_can_not_be_loaded_is_told(folder, monkeypatch):
    with pytest.raises(ValueError, match="must be hf:REPO@SPLIT or hf:REPO:CONFIG@SPLIT"):
        load_examples("hf:lmms-lab/textvqa", "vqa", "all")
    with pytest.raises(ValueError, match=r"has no column caption or references, which caption needs"):
        load_examples(f"hf:{folder}@validation", "caption", "all")
    with pytest.raises(ValueError, match=r"@train can't be loaded"):
        load_examples(f"hf:{folder}@train", "vqa", "all")
    with pytest.raises(ValueError, match=r"hf:nobody/nothing@test can't be loaded \(is the Hub in reach\?\)"):
        load_examples("hf:nobody/nothing@test", "vqa", "all")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="needs the package datasets: pip install datasets"):
        load_examples(f"hf:{folder}@validation", "vqa", "all")


def test_a_picture_outside_the_data_set_is_refused_by_record_and_file(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    files = [folder / "in.png", tmp_path / "out.png"]
    for file in files:
        Image.new("RGB", (8, 8)).save(file)
    table = {"image": [{"bytes": None, "path": str(file)} for file in files]}
    table |= {"image_id": ["a", "b"], "question": ["what?"] * 2, "answer": ["red"] * 2}
    data = datasets.Dataset.from_dict(table)
    data.to_parquet(folder / "test-00000.parquet")
    name = f"hf:{folder}@test"
    inside, outside = sorted(load_examples(name, "vqa", "all"), key=lambda e: e.facts["image_id"])
    assert inside.image.size == (8, 8)
    with pytest.raises(ValueError, match=r"record number 2: .*image .*out\.png lies outside the data"):
        _ = outside.image
    (refused,) = check_data(name).tasks["vqa"].unusable
    assert refused.record == "number 2" and "out.png lies outside the data set" in refused.reason
