"""Eighty real records in HONES's format, annotations only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hones_lens.data.check import check_data
from hones_lens.data.loading import load_examples
from hones_lens.tasks.registry import load_task

SAMPLE = Path(__file__).parent / "sample_hones_unified.json"
CLIPPED = ["101094", "247508", "57375"]


@pytest.mark.parametrize("dataset", ["path", "hones", "coco"])
@pytest.mark.parametrize("task", ["vqa", "ocr", "caption", "retrieval"])
def test_every_record_loads(dataset, task):
    files = {} if dataset == "path" else {"data_file": SAMPLE}
    examples = load_examples(SAMPLE if dataset == "path" else dataset, task, "all", **files)
    records = json.loads(SAMPLE.read_text())["data"]
    assert [e.facts["image_id"] for e in examples] == [str(r["image_id"]) for r in records]
    assert examples.skipped == () and examples.not_for_task == {}
    task_object = load_task(task)
    assert all(task_object.prompts(e) and task_object.target(e) for e in examples)


def test_fields_are_those_of_the_file():
    records = json.loads(SAMPLE.read_text())["data"]
    loaded = {t: load_examples(SAMPLE, t, "all") for t in ("vqa", "ocr", "caption")}
    for i, record in enumerate(records):
        vqa = loaded["vqa"][i]
        assert vqa.question == record["vqa"]["question"] and len(vqa.answers) == 10
        assert vqa.answers == tuple(record["vqa"]["all_answers"])
        assert load_task("vqa").target(vqa) == record["vqa"]["answer"]
        assert loaded["ocr"][i].text == record["ocr"]["text"]
        assert loaded["caption"][i].references == tuple(c["caption"].strip() for c in record["captions"])


def test_three_boxes_cross_the_border():
    examples = load_examples(SAMPLE, "ocr", "all")
    crossing = [e for e in examples if e.facts["box_clipped"]]
    assert sorted(e.facts["image_id"] for e in crossing) == CLIPPED
    assert examples.clipped == [e.id for e in crossing]


def test_the_check_without_and_with_pictures():
    check = check_data(SAMPLE, open_images=False)
    assert check.ok and check.images == 0
    assert {task: (c.usable, len(c.clipped)) for task, c in check.tasks.items()} == {
        "vqa": (80, 0),
        "ocr": (80, 3),
        "caption": (80, 0),
        "retrieval": (80, 0),
    }
    assert json.loads(json.dumps(check.to_json()))["tasks"]["ocr"]["clipped"] == check.tasks["ocr"].clipped
    assert "3 boxes cross the border and are clipped" in str(check)
    missing = check_data(SAMPLE, "vqa")
    assert not missing.ok and len(missing.tasks["vqa"].unusable) == 80
    assert "no picture lies in" in str(missing)


def test_a_picture_that_is_not_there_is_named_when_it_is_asked_for():
    example = load_examples(SAMPLE, "vqa", "all", limit=1)[0]
    with pytest.raises(
        FileNotFoundError, match=r"record 158362000: .*COCO_train2014_000000158362\.jpg does not"
    ):
        _ = example.image


def test_a_folder_of_pictures_that_has_none_of_them_raises(tmp_path):
    with pytest.raises(
        ValueError, match=r"record 158362000: its image .*158362\.jpg does not exist \(nor train2014/"
    ):
        load_examples(SAMPLE, "vqa", "all", image_dir=tmp_path)
