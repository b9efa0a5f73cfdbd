"""VizWiz, DocVQA and POPE, from records as they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.dataset_files import FORMATS, write

from hones_lens.data.check import check_data
from hones_lens.data.loading import load_examples, tasks_of
from hones_lens.tasks.registry import load_task

# VizWiz_val_00000001, https://vizwiz.org/tasks-and-datasets/vqa/
MEDICINE = ["no", "unanswerable", "night time", "unanswerable", *["night time"] * 6]
VIZWIZ = {
    "image": "VizWiz_val_00000001.jpg",
    "question": "Can you tell me what this medicine is please?",
    "answers": [{"answer": answer, "answer_confidence": "yes"} for answer in MEDICINE],
    "answer_type": "other",
    "answerable": 1,
}
# Question 49153 of val_v1.0.json, https://www.docvqa.org
DOCVQA = {
    "questionId": 49153,
    "question": "What is the ‘actual’ value per 1000, during the year 1975?",
    "image": "documents/pybv0228_81.png",
    "docId": 14465,
    "ucsf_document_id": "pybv0228",
    "ucsf_document_page_no": "81",
    "answers": ["0.28"],
    "data_split": "val",
}
# coco_pope_random.json, https://github.com/AoiDragon/POPE; the adversarial file has no image_id
POPE = [
    {
        "question_id": 0,
        "image": "COCO_val2014_000000548882.jpg",
        "image_id": 548882,
        "text": "Is there a dining table in the image?",
        "label": "yes",
    },
    {
        "question_id": 3,
        "image": "COCO_val2014_000000548882.jpg",
        "text": "Is there a tv in the image?",
        "label": "no",
    },
]


def pope_file(folder: Path, records: list[Any]) -> Path:
    file = folder / "coco_pope_random.json"
    file.write_text("\n".join(map(json.dumps, records)) + "\n")
    return file


def test_a_question_of_vizwiz(tmp_path):
    file = write(tmp_path / "val.json", [VIZWIZ])
    (example,) = load_examples("vizwiz", "vqa", "all", data_file=file)
    assert example.id == "vizwiz/VizWiz_val_00000001.jpg" and example.kind == "other"
    assert example.question == VIZWIZ["question"] and example.answers == tuple(MEDICINE)
    assert example.facts["file"] == str(tmp_path / "VizWiz_val_00000001.jpg")
    task = load_task("vqa")
    assert task.score("night time", example) == 1
    # Two annotators say so: (2 x 1/3 + 8 x 2/3) / 10.
    assert task.score("unanswerable", example) == pytest.approx(0.6)


def test_a_question_of_docvqa(tmp_path):
    file = write(tmp_path / "val_v1.0.json", {"dataset_name": "docvqa", "data": [DOCVQA]})
    (example,) = load_examples("docvqa", "vqa-anls", "all", data_file=file)
    assert example.id == "docvqa/49153" and example.answers == ("0.28",)
    assert example.question == DOCVQA["question"]
    assert example.facts["file"] == str(tmp_path / "documents/pybv0228_81.png")
    with pytest.raises(ValueError, match="'docvqa' has no task 'vqa'; valid: vqa-anls"):
        load_examples("docvqa", "vqa", "all", data_file=file)


@pytest.mark.parametrize("as_list", [False, True])
def test_questions_of_pope(tmp_path, as_list):
    file = write(tmp_path / "pope.json", POPE) if as_list else pope_file(tmp_path, POPE)
    table, tv = load_examples("pope", "yes-no", "all", data_file=file)
    assert load_task("yes-no").score("Yes, there is a dining table.", table) == 1
    table, tv = load_examples("pope", "vqa", "all", data_file=file)
    assert (table.id, table.question, table.answers) == ("pope/0", POPE[0]["text"], ("yes",))
    assert (tv.id, tv.answers, tv.kind) == ("pope/3", ("no",), "no")
    assert table.facts["image_id"] == tv.facts["image_id"] == "548882"
    assert load_task("vqa").score("No.", tv) == 1 and load_task("vqa").score("Yes", tv) == 0


def test_pope_and_coco_agree_on_splits(tmp_path):
    splits = []
    for name, task in (("pope", "vqa"), ("vqav2", "vqa"), ("coco_karpathy", "caption")):
        dataset = FORMATS[name](tmp_path / name)
        examples = load_examples(dataset.dataset, task, "test", **dataset.files)
        splits.append({e.facts["image_id"] for e in examples})
    assert splits[0] == splits[1] == splits[2] != set()


BAD: dict[str, tuple[str, Any, str]] = {
    "no image": ("vizwiz", [{**VIZWIZ, "image": None}], "number 1: has no image"),
    "one without answers": ("vizwiz", [VIZWIZ, {**VIZWIZ, "image": "b.jpg", "answers": []}], "b.jpg: has no"),
    "answers of texts": (
        "vizwiz",
        [{**VIZWIZ, "answers": ["a"]}],
        "VizWiz_val_00000001.jpg: an answer is 'a'",
    ),
    "one picture twice": ("vizwiz", [VIZWIZ, VIZWIZ], "id VizWiz_val_00000001.jpg is that of an earlier"),
    "not a list": (
        "vizwiz",
        {"some": "thing"},
        "is not VizWiz's: no list of questions, but an object with 1",
    ),
    "no question": ("docvqa", {"data": [{**DOCVQA, "question": ""}]}, "record 49153: question is empty"),
    "no id": ("docvqa", {"data": [DOCVQA, {**DOCVQA, "questionId": None}]}, "number 2: has no questionId"),
    "empty": ("docvqa", {"data": []}, "has no records"),
    "no data": ("docvqa", {"some": "thing"}, "has no list 'data' at its top level"),
    "no label": ("pope", [POPE[0], {**POPE[1], "label": "maybe"}], "record 3: label is 'maybe', neither"),
    "id twice": ("pope", [POPE[0], POPE[0]], "record 0: id 0 is that of an earlier record"),
    "no text": (
        "pope",
        [POPE[0], {"question_id": 3, "image": "a.jpg", "label": "no"}],
        "record 3: has no text",
    ),
    "no records of HONES": (
        "hones",
        [{"some": "thing"}],
        "not HONES's unified JSON: no record has 'image_id'",
    ),
    "other records": ("docvqa", {"data": [{"some": "thing"}]}, "is not DocVQA's: no objects with 'question'"),
    "another list": ("pope", [{"some": "thing"}], "is not POPE's: no objects with 'text', but a list of 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named(tmp_path, name):
    dataset, content, reason = BAD[name]
    file = write(tmp_path / "file.json", content)
    with pytest.raises(ValueError, match=rf"file\.json.*{reason}"):
        load_examples(dataset, tasks_of(dataset)[0], "all", data_file=file)


def test_a_line_of_pope_that_is_not_json_is_named(tmp_path):
    file = pope_file(tmp_path, POPE)
    file.write_text(file.read_text() + "{nothing\n")
    with pytest.raises(ValueError, match=r"coco_pope_random\.json, line 3, is not JSON"):
        check_data("pope", data_file=file, open_images=False)
