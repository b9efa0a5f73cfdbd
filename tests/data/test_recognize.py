"""A file of another known data set is refused by its name, and one without answers says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.dataset_files import FORMATS, WrittenDataset, write

from hones_lens.data.check import check_data
from hones_lens.data.loading import DATASETS, load_examples, tasks_of
from hones_lens.data.recognize import KNOWN_FILES

FILE_OF = {
    "hones": "hones",
    "coco captions": "coco_official",
    "coco karpathy": "coco_karpathy",
    "cocotext": "cocotext",
    "gqa": "gqa",
    "gqa list": "gqa_list",
    "textvqa": "textvqa",
    "flickr30k": "flickr30k_json",
    "vizwiz": "vizwiz",
    "docvqa": "docvqa",
    "pope": "pope",
}
# What reads the file beside the data set that it is of.
ALSO_READ_BY = {"hones": {"coco"}}

# The questions of test sets, without answers, with the fields that their publishers give.
QUESTIONS_ONLY: dict[str, tuple[str, Any]] = {
    "test.json": (
        "VizWiz's file of questions",
        [{"image": "VizWiz_test_00000000.jpg", "question": "What is this?"}],
    ),
    "TextVQA_0.5.1_test.json": (
        "TextVQA's file of questions",
        {
            "dataset_type": "test",
            "data": [
                {
                    "question_id": 39602,
                    "image_id": "0009acae53edcdf1",
                    "question": "what is on the sign?",
                    "image_classes": ["Sign"],
                    "set_name": "test",
                }
            ],
        },
    ),
    "test_v1.0.json": (
        "DocVQA's file of questions",
        {
            "dataset_name": "docvqa",
            "dataset_split": "test",
            "data": [
                {
                    "questionId": 57344,
                    "question": "What is the date?",
                    "image": "documents/lflm0081_3.png",
                    "docId": 5555,
                    "data_split": "test",
                }
            ],
        },
    ),
    "challenge_balanced_questions.json": (
        "GQA's file of questions",
        {"201971873": {"isBalanced": True, "question": "Is it red?", "imageId": "n15740"}},
    ),
    "v2_OpenEnded_mscoco_test2015_questions.json": (
        "VQA v2's test questions",
        {
            "data_type": "mscoco",
            "data_subtype": "test2015",
            "questions": [{"image_id": 262144, "question": "Is it flying?", "question_id": 262144000}],
        },
    ),
    "llava_pope_test.jsonl": (
        "LLaVA's form of questions",
        [
            {
                "question_id": 1,
                "image": "COCO_val2014_000000310196.jpg",
                "text": "Is there a snowboard in the image?",
                "category": "adversarial",
            }
        ],
    ),
}


def json_readers() -> list[str]:
    return [name for name in DATASETS if not name.startswith("shapes") and name not in ("own", "vqav2")]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, WrittenDataset]:
    folder: Path = tmp_path_factory.mktemp("known")
    return {kind: FORMATS[name](folder / name) for kind, name in FILE_OF.items()}


@pytest.mark.parametrize("reader", json_readers())
@pytest.mark.parametrize("kind", FILE_OF)
def test_every_reader_refuses_the_files_of_the_others_by_their_name(written, kind, reader):
    dataset = written[kind]
    if reader == dataset.dataset or reader in ALSO_READ_BY.get(dataset.dataset, ()):
        return
    for on_error in ("raise", "skip"):
        with pytest.raises(ValueError, match=rf"use the data set '{dataset.dataset}' for it") as error:
            load_examples(reader, tasks_of(reader)[0], "all", data_file=dataset.data_file, on_error=on_error)
        assert str(dataset.data_file) in str(error.value)


def test_a_path_alone_is_refused_by_name_too(tmp_path):
    for kind in ("gqa", "textvqa", "coco_official", "cocotext", "flickr30k_json"):
        dataset = FORMATS[kind](tmp_path / kind)
        with pytest.raises(ValueError, match=rf"use the data set '{dataset.dataset}' for it"):
            load_examples(dataset.data_file, "vqa", "all")


def test_the_files_of_vqav2_are_refused_and_refuse(tmp_path):
    folder = FORMATS["vqav2"](tmp_path / "vqa").data_file.parent
    for reader in json_readers():
        for file in folder.glob("*.json"):
            with pytest.raises(ValueError, match="use the data set 'vqav2' for it"):
                load_examples(reader, tasks_of(reader)[0], "all", data_file=file)
    for kind in ("gqa", "textvqa", "vizwiz", "docvqa", "pope"):
        dataset = FORMATS[kind](tmp_path / kind)
        with pytest.raises(ValueError, match=rf"use the data set '{kind}' for it"):
            load_examples("vqav2", "vqa", "all", data_file=dataset.data_file)


@pytest.mark.parametrize("reader", [*DATASETS, ""])
@pytest.mark.parametrize("name", QUESTIONS_ONLY)
def test_every_reader_says_of_a_file_of_questions_that_it_has_no_answers(tmp_path, name, reader):
    """By a bare path too (`reader` is empty)."""
    if reader.startswith("shapes"):
        return
    description, content = QUESTIONS_ONLY[name]
    file = tmp_path / name
    lines = content if name.endswith(".jsonl") else [content]
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    task = tasks_of(reader)[0] if reader else "vqa"
    dataset, files = (reader, {"data_file": file}) if reader else (file, {})
    with pytest.raises(ValueError, match="no answers") as error:
        load_examples(dataset, task, "all", **files, on_error="skip")
    text = str(error.value)
    assert str(file) in text
    own = {"test.json": "vizwiz", "llava_pope_test.jsonl": "pope"}.get(name, "")
    if reader not in (own, "textvqa", "docvqa", "gqa", "vqav2"):
        assert f"{file} is {description}, not " in text


# Official files that no data set here reads, with the fields that their publishers give.
UNREAD: dict[str, tuple[Any, str]] = {
    "image_info_test2014.json": (
        {
            "info": {"year": 2014},
            "images": [
                {"license": 6, "file_name": "COCO_test2014_000000523573.jpg", "height": 500, "id": 523573}
            ],
            "licenses": [],
            "categories": [],
        },
        "COCO's list of images, without captions",
    ),
    "instances_val2014.json": (
        {
            "images": [{"file_name": "COCO_val2014_000000000042.jpg", "id": 42}],
            "annotations": [
                {"segmentation": [], "image_id": 42, "bbox": [1, 2, 3, 4], "category_id": 18, "id": 7}
            ],
            "categories": [{"id": 18, "name": "dog"}],
        },
        "COCO's file of objects",
    ),
    "val_sceneGraphs.json": (
        {"2407890": {"width": 640, "height": 480, "objects": {"271881": {"name": "chair"}}}},
        "GQA's file of scene graphs",
    ),
    "TextCaps_0.1_val.json": (
        {"dataset_name": "textcaps", "data": [{"image_id": "0054c91397f2fe05", "caption_str": "A sign."}]},
        "TextCaps's file of captions",
    ),
    "aokvqa_v1p0_val.json": (
        [
            {
                "question_id": "22",
                "image_id": 461751,
                "question": "?",
                "direct_answers": ["a"],
                "choices": ["a"],
            }
        ],
        "A-OKVQA's file of questions",
    ),
    "infographicsVQA_val_v1.0.json": (
        {
            "dataset_name": "infographicVQA",
            "data": [
                {
                    "questionId": 98313,
                    "question": "Which?",
                    "image_local_name": "38511.jpeg",
                    "image_url": "",
                    "answers": ["a"],
                }
            ],
        },
        "InfographicVQA's file of questions",
    ),
    "train_task_3.json": (
        {
            "dataset_name": "st-vqa",
            "data": [
                {
                    "file_path": "coco-text/COCO_train2014_000000509003.jpg",
                    "file_name": "COCO_train2014_000000509003.jpg",
                    "question": "Where?",
                    "answers": ["a"],
                    "question_id": 17100,
                }
            ],
        },
        "ST-VQA's file of questions",
    ),
    "test_human.json": (
        [{"imgname": "41699051005347.png", "query": "How many?", "label": "14"}],
        "ChartQA's file of questions",
    ),
    "problems.json": (
        {"1": {"question": "?", "choices": ["a", "b"], "answer": 0, "lecture": "", "image": "image.png"}},
        "ScienceQA's file of questions",
    ),
    "dataset.json": (
        {"761183272": {"imageURL": "http://a/b.jpg", "questions": ["?"], "answers": ["a"], "title": "t"}},
        "OCR-VQA's file of questions",
    ),
    "llava_instruct_150k.json": (
        [{"id": "33471", "image": "000000033471.jpg", "conversations": [{"from": "human", "value": "?"}]}],
        "a file of conversations",
    ),
}


@pytest.mark.parametrize("reader", json_readers())
@pytest.mark.parametrize("name", UNREAD)
def test_a_file_that_nothing_reads_is_named_and_not_taken_for_another(tmp_path, name, reader):
    content, description = UNREAD[name]
    file = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=rf"{name} is {description}.*no data set reads such files"):
        load_examples(reader, tasks_of(reader)[0], "all", data_file=file, on_error="skip")
    with pytest.raises(ValueError, match=description):
        check_data(reader, data_file=file)


def test_one_faulty_record_does_not_hide_the_format(tmp_path):
    file = FORMATS["textvqa"](tmp_path).data_file
    data = json.loads(file.read_text())
    data["data"][0] = "no record"
    with pytest.raises(ValueError, match="use the data set 'textvqa'"):
        load_examples("hones", "vqa", "all", data_file=write(file, data))


def test_every_data_set_that_is_named_exists():
    assert {known.dataset for known in KNOWN_FILES} - {""} <= set(DATASETS)


def _without(keys: tuple[str, ...], file: Path) -> Path:
    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in keys}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return write(file, strip(json.loads(file.read_text())))


@pytest.mark.parametrize("kind", ["hones", "coco_unified", "gqa", "gqa_list", "textvqa", "vizwiz", "docvqa"])
def test_a_file_of_questions_only_says_that_it_has_no_answers(tmp_path, kind):
    dataset = FORMATS[kind](tmp_path)
    _without(("answer", "answers", "all_answers", "fullAnswer"), dataset.data_file)
    task = dataset.tasks[0]
    n = dataset.n_records[task]
    with pytest.raises(ValueError, match=rf"json holds {n} questions and no answers .*test sets"):
        load_examples(dataset.dataset, task, "all", **dataset.files, on_error="skip")
    with pytest.raises(ValueError, match="no answers"):
        check_data(dataset.dataset, task, **dataset.files)


def test_the_test_questions_of_vqav2_have_no_answers(tmp_path):
    questions = [{"image_id": 262144, "question": "Is the ball flying?", "question_id": 262144000}]
    file = write(
        tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json",
        {"data_subtype": "test2015", "questions": questions},
    )
    for given in (file, tmp_path):
        with pytest.raises(ValueError, match=r"test2015_questions\.json holds a test set's questions"):
            load_examples("vqav2", "vqa", "all", data_file=given)


BAD_BOXES = {
    "no area": ([10.0, 20.0, 0.0, 9.0], "has no area"),
    "outside": ([900.0, 3.0, 9.0, 9.0], "lies wholly outside the image of 112 × 112"),
    "three numbers": ([1.0, 3.0, 9.0], "not \\[x, y, width, height\\]"),
}


@pytest.mark.parametrize("name", BAD_BOXES)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_one_bad_box_of_cocotext_is_left_out_by_name_and_the_rest_is_read(tmp_path, name, on_error):
    bbox, reason = BAD_BOXES[name]
    dataset = FORMATS["cocotext"](tmp_path)
    data = json.loads(dataset.data_file.read_text())
    data["anns"]["5003"]["bbox"] = bbox
    write(dataset.data_file, data)
    with pytest.warns(UserWarning, match=rf"v2\.json: 1 record left out: record 5003: bbox .*{reason}"):
        examples = load_examples("cocotext", "ocr", "all", **dataset.files, on_error=on_error)
    assert len(examples) == 39 and "cocotext/5003" not in {e.id for e in examples}
    assert [s.record for s in examples.skipped] == ["5003"]
    check = check_data("cocotext", **dataset.files)
    assert check.ok and check.tasks["ocr"].usable == 39
    assert any("left out: record 5003" in warning for warning in check.tasks["ocr"].warnings)


def test_a_bad_box_in_ones_own_file_still_raises(tmp_path):
    dataset = FORMATS["hones"](tmp_path)
    data = json.loads(dataset.data_file.read_text())
    data["data"][3]["ocr"]["bbox"] = [10.0, 20.0, 0.0, 9.0]
    write(dataset.data_file, data)
    with pytest.raises(ValueError, match=r"record 103: bbox .* has no area"):
        load_examples("hones", "ocr", "all", **dataset.files)
