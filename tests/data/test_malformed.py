"""Files and records that are wrong in one way: named in an error, or skipped, counted and named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.dataset_files import FORMATS, WrittenDataset, own_rows, sample_scenes, write, write_csv

from hones_lens.data.check import check_data
from hones_lens.data.loading import load_examples


def edited(change: Callable[[Any], Any]) -> Callable[[WrittenDataset], None]:
    """Change the JSON of a data set's file in place."""

    def apply(dataset: WrittenDataset) -> None:
        data = json.loads(dataset.data_file.read_text())
        replaced = change(data)
        write(dataset.data_file, data if replaced is None else replaced)

    return apply


def record(change: Callable[[dict[str, Any]], Any]) -> Callable[[WrittenDataset], None]:
    """Change the fourth record (image 103) of a unified file."""
    return edited(lambda data: change(data["data"][3]) and None)


def box(*values: Any) -> Callable[[WrittenDataset], None]:
    return record(lambda r: r["ocr"].update(bbox=list(values)))


def picture(content: Callable[[bytes], bytes]) -> Callable[[WrittenDataset], None]:
    def apply(dataset: WrittenDataset) -> None:
        file = dataset.image_dir / "COCO_val2014_000000000103.jpg"
        file.write_bytes(content(file.read_bytes()))

    return apply


def without_picture(dataset: WrittenDataset) -> None:
    (dataset.image_dir / "COCO_val2014_000000000103.jpg").unlink()


# Task, what is done to HONES's JSON, and what the error says besides the record's name.
RECORDS: dict[str, tuple[str, Callable[[WrittenDataset], None], str]] = {
    "missing image": ("vqa", without_picture, r"image .*000103\.jpg does not exist"),
    "empty answer": ("vqa", record(lambda r: r["vqa"].update(all_answers=[" "])), "answer is empty"),
    "no answers": ("vqa", record(lambda r: r["vqa"].update(all_answers=[])), "has no answer"),
    "answers that are numbers": (
        "vqa",
        record(lambda r: r["vqa"].update(all_answers=[2])),
        r"answer is 2 \(int",
    ),
    "missing question": ("vqa", record(lambda r: r["vqa"].pop("question")), "has no question"),
    "empty question": ("vqa", record(lambda r: r["vqa"].update(question="\n")), "question is empty"),
    "question that is a list": (
        "vqa",
        record(lambda r: r["vqa"].update(question=["?"])),
        r"\(list\), not text",
    ),
    "section that is a text": (
        "vqa",
        record(lambda r: r.update(vqa="red?")),
        "vqa is 'red\\?' .* not an object",
    ),
    "duplicate id": (
        "vqa",
        record(lambda r: r["vqa"].update(question_id=100000)),
        "id 100000 is that of an earlier",
    ),
    "no file name": ("vqa", record(lambda r: r["image_info"].pop("file_name")), "no image_info.file_name"),
    "no image_info": ("vqa", record(lambda r: r.pop("image_info")), "has no image_info.file_name"),
    "size that is a text": (
        "vqa",
        record(lambda r: r["image_info"].update(width="112")),
        "size of the image",
    ),
    "box wholly outside": ("ocr", box(200.0, 3.0, 9.0, 9.0), "lies wholly outside the image of 112 × 112"),
    "NaN in a box": ("ocr", box(math.nan, 3.0, 9.0, 9.0), "holds a number that is not finite"),
    "infinite box": ("ocr", box(1.0, 3.0, math.inf, 9.0), "holds a number that is not finite"),
    "box without area": ("ocr", box(20.0, 3.0, 0.0, 9.0), "has no area"),
    "box of negative size": ("ocr", box(20.0, 3.0, 8.0, -9.0), "has no area"),
    "box of three numbers": ("ocr", box(20.0, 3.0, 8.0), r"not \[x, y, width, height\]"),
    "box of texts": ("ocr", box("20", "3", "8", "9"), r"'20' \(str\), not a number"),
    "no box": ("ocr", record(lambda r: r["ocr"].pop("bbox")), "has no bbox"),
    "empty text": ("ocr", record(lambda r: r["ocr"].update(text="  ")), "text is empty"),
    "endless caption": (
        "caption",
        record(lambda r: r["captions"][0].update(caption="a " * 5000)),
        "caption has 10,000 characters",
    ),
    "empty caption": ("caption", record(lambda r: r["captions"][0].update(caption="")), "caption is empty"),
    "no captions": ("caption", record(lambda r: r.update(captions=[])), "has no caption"),
    "captions that are numbers": ("caption", record(lambda r: r.update(captions=[3])), "caption is 3"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_bad_record_is_named_in_an_error_or_skipped_and_counted(tmp_path, name):
    task, corrupt, reason = RECORDS[name]
    dataset = FORMATS["hones"](tmp_path)
    corrupt(dataset)
    with pytest.raises(ValueError, match=rf"unified\.json: 1 record .*103.*{reason}"):
        load_examples("hones", task, "all", **dataset.files)
    with pytest.warns(UserWarning, match=rf"1 record left out: .*103.*{reason}"):
        examples = load_examples("hones", task, "all", **dataset.files, on_error="skip")
    assert len(examples) == 39 and len(examples.skipped) == 1
    assert "103" in examples.skipped[0].record
    check = check_data("hones", task, **dataset.files)
    assert not check.ok and check.tasks[task].usable == 39
    assert [s.reason for s in check.tasks[task].unusable] == [s.reason for s in examples.skipped]


PICTURES = {
    "truncated JPEG": (
        lambda content: content[: len(content) // 2],
        "can't be read as an image: .*truncated",
    ),
    "text with the name of a JPEG": (lambda content: b"no image at all", "can't be read as an image"),
    "empty file": (lambda content: b"", "can't be read as an image"),
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("task", ["vqa", "ocr"])
def test_a_bad_picture_is_found_by_the_check_and_named_when_it_is_opened(tmp_path, name, task):
    content, reason = PICTURES[name]
    dataset = FORMATS["hones"](tmp_path)
    picture(content)(dataset)
    check = check_data("hones", **dataset.files)
    assert not check.ok and check.images == 40
    assert [c.usable for c in check.tasks.values()] == [39] * 4
    assert "000103.jpg can't be read as an image" in str(check)
    assert check_data("hones", **dataset.files, open_images=False).ok
    example = load_examples("hones", task, "all", **dataset.files)[3]
    with pytest.raises(ValueError, match=rf"record (103000|5003): image .*000103\.jpg {reason}"):
        _ = example.image


def cut(file: Path, content: bytes) -> None:
    file.write_bytes(content)


FILES = {
    "not JSON": (b'{"data": [', "is not JSON"),
    "empty file": (b"", "is empty"),
    "white space": (b" \n", "is empty"),
    "not UTF-8": (b'{"data": ["\xff\xfe"]}', "is not UTF-8 text"),
    "top level of another type": (b'"data"', "is not HONES's unified JSON"),
    "another object": (b'{"items": []}', "no list of records, but an object with 1 keys: items"),
    "no records": (b'{"data": []}', "has no records"),
    "one key twice": (b'{"data": [], "data": []}', "has the key 'data' twice in one object"),
    "nested without end": (b'{"data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_file_that_is_wrong_as_a_whole_raises_always(tmp_path, name, on_error):
    content, reason = FILES[name]
    file = tmp_path / "wrong.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"wrong\.json.* {reason}"):
        load_examples(str(file), "vqa", "all", on_error=on_error)
    with pytest.raises(ValueError, match=rf"wrong\.json.* {reason}"):
        check_data(file)


def test_records_that_are_no_objects_are_told_by_their_place(tmp_path):
    file = write(tmp_path / "list.json", [{"image_id": 1}, "two", {"image_id": True}])
    with pytest.raises(ValueError, match=r"2 records .* number 2: the record is 'two'.* number 3: image_id"):
        load_examples(file, "vqa", "all")


def test_a_task_that_no_record_is_meant_for_raises(tmp_path):
    dataset = FORMATS["hones"](tmp_path)
    edited(lambda data: [r.pop("ocr") for r in data["data"]] and None)(dataset)
    with pytest.raises(ValueError, match=r"has no ocr records \(40 without ocr\)"):
        load_examples("hones", "ocr", "all", **dataset.files)
    check = check_data("hones", **dataset.files)
    assert check.ok and check.tasks["ocr"].not_for_task == {"without ocr": 40}


def test_an_image_without_a_section_is_no_fault(tmp_path):
    dataset = FORMATS["hones"](tmp_path)
    edited(lambda data: data["data"][3].pop("vqa") and None)(dataset)
    examples = load_examples("hones", "vqa", "all", **dataset.files)
    assert len(examples) == 39 and examples.skipped == ()
    assert examples.not_for_task == {"without vqa": 1}


OFFICIAL = {
    "VQA annotation without question": (
        "vqav2",
        "questions",
        lambda d: d["questions"].pop(0),
        "annotation 100000: belongs to no question",
    ),
    "VQA question without annotation": (
        "vqav2",
        "annotations",
        lambda d: d["annotations"].pop(0),
        "record 100000: has no annotation",
    ),
    "VQA annotation of another image": (
        "vqav2",
        "annotations",
        lambda d: d["annotations"][0].update(image_id=9),
        "record 100000: is of image 100, but its",
    ),
    "VQA question twice": (
        "vqav2",
        "questions",
        lambda d: d["questions"].append(d["questions"][0]),
        "record 100000: id 100000 is that of an earlier",
    ),
    "VQA answers that are texts": (
        "vqav2",
        "annotations",
        lambda d: d["annotations"][0].update(answers=["a"]),
        "record 100000: an answer is 'a'",
    ),
    "caption of an image that is not listed": (
        "coco_official",
        "",
        lambda d: d["annotations"].append({"id": 7, "image_id": 1, "caption": "a"}),
        "annotation 7: is of image 1, which",
    ),
    "image without captions": (
        "coco_official",
        "",
        lambda d: d["images"].append({"id": 7, "file_name": "7.jpg"}),
        "record 7: has no caption",
    ),
    "Karpathy's image without name": (
        "coco_karpathy",
        "",
        lambda d: d["images"][0].pop("filename"),
        "record 100: has no filename",
    ),
    "GQA without image": ("gqa", "", lambda d: d["201000"].pop("imageId"), "record 201000: has no imageId"),
    "GQA with a path for an image": (
        "gqa",
        "",
        lambda d: d["201000"].update(imageId="../x"),
        "record 201000: imageId '../x' is no name",
    ),
    "GQA without answer": ("gqa", "", lambda d: d["201000"].pop("answer"), "record 201000: has no answer"),
    "TextVQA without answers": (
        "textvqa",
        "",
        lambda d: d["data"][0].pop("answers"),
        "record 34602: has no answer",
    ),
    "COCO-Text of an unknown image": (
        "cocotext",
        "",
        lambda d: d["imgs"].pop("100"),
        "record 5000: is of image 100, which",
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_bad_records_of_the_official_files_are_named(tmp_path, name):
    kind, which, corrupt, reason = OFFICIAL[name]
    dataset = FORMATS[kind](tmp_path)
    file = dataset.data_file
    if which == "questions":
        file = file.with_name("v2_OpenEnded_mscoco_val2014_questions.json")
    data = json.loads(file.read_text())
    corrupt(data)
    write(file, data)
    with pytest.raises(ValueError, match=reason):
        load_examples(dataset.dataset, dataset.tasks[0], "all", **dataset.files)
    with pytest.warns(UserWarning, match="left out"):
        examples = load_examples(dataset.dataset, dataset.tasks[0], "all", **dataset.files, on_error="skip")
    assert any(reason in str(skipped) for skipped in examples.skipped)


WRONG_KIND = {
    "coco": "is neither HONES's unified JSON nor a file of COCO captions",
    "gqa": "is not GQA's",
    "textvqa": "has no list 'data' at its top level",
    "cocotext": "is not COCO-Text's",
    "flickr30k": "is not Karpathy's JSON",
}


@pytest.mark.parametrize("name", WRONG_KIND)
def test_a_file_of_another_kind_raises(tmp_path, name):
    file = write(tmp_path / "file.json", {"some": "thing"})
    task = "ocr" if name == "cocotext" else "caption" if name == "flickr30k" else "vqa"
    with pytest.raises(ValueError, match=rf"file\.json {WRONG_KIND[name]}"):
        load_examples(name, task, "all", data_file=file)


def own(folder: Path, header: list[str], *rows: list[str]) -> Path:
    (folder / "a.png").write_bytes(b"")
    sample_scenes(1)[0].load().save(folder / "a.png")
    return write_csv(folder / "own.csv", header, rows)


OWN = {
    "more cells than columns": (
        ["image", "question", "answer"],
        ["a.png", "q", "a", "b"],
        "line 2: 4 cells for 3",
    ),
    "column twice": (["image", "question", "image"], ["a.png", "q", "a.png"], "each column needs a name"),
    "misspelled column": (
        ["image", "question", "awnser"],
        ["a.png", "q", "a"],
        "no column answer or answers",
    ),
    "answers that are no list": (
        ["image", "question", "answers"],
        ["a.png", "q", "red"],
        "line 2: answers is not a JSON list",
    ),
    "no answer": (["image", "question", "answer"], ["a.png", "q", ""], "line 2: has no answer"),
    "no image": (["image", "question", "answer"], ["", "q", "a"], "line 2: has no image"),
    "missing image": (
        ["image", "question", "answer"],
        ["b.png", "q", "a"],
        "line 2: its image .*b.png does not exist",
    ),
    "header only": (["image", "question", "answer"], [], "has a header and no rows"),
}


@pytest.mark.parametrize("name", OWN)
def test_own_files_are_told_by_line_or_column(tmp_path, name):
    header, cells, reason = OWN[name]
    file = own(tmp_path, header, *([cells] if cells else []))
    with pytest.raises(ValueError, match=rf"own\.csv.*{reason}"):
        load_examples(file, "vqa", "all")


def test_own_boxes_are_checked_against_the_picture(tmp_path):
    header = ["image", "text", "bbox"]
    file = own(tmp_path, header, ["a.png", "WORD", "[500, 1, 5, 5]"], ["a.png", "WORD", "[100, 1, 50, 5]"])
    with pytest.raises(
        ValueError, match=r"line 2: bbox .* lies wholly outside the image of 112 × 112 pixels"
    ):
        load_examples(file, "ocr", "all")
    with pytest.warns(UserWarning, match="line 2"):
        examples = load_examples(file, "ocr", "all", on_error="skip")
    assert examples.clipped == ["own/line 3"]
    assert check_data(file, "ocr").tasks["ocr"].clipped == ["line 3"]


def test_jsonl_errors_name_the_line(tmp_path):
    file = tmp_path / "own.jsonl"
    rows = own_rows(sample_scenes(1))
    file.write_text(json.dumps(rows[0]) + "\n\n{nothing}\n")
    with pytest.raises(ValueError, match=r"own\.jsonl, line 3, is not JSON"):
        load_examples(file, "vqa", "all")


def test_retrieval_needs_captions_of_other_images(tmp_path):
    dataset = FORMATS["hones"](tmp_path)
    edited(lambda data: data.update(data=data["data"][:12]))(dataset)
    with pytest.raises(
        ValueError, match=r"unified\.json: record 100: retrieval needs 49 captions .* has \d+"
    ):
        load_examples("hones", "retrieval", "all", **dataset.files)
    check = check_data("hones", "retrieval", **dataset.files)
    assert (
        not check.ok and check.tasks["retrieval"].usable == 0 and len(check.tasks["retrieval"].unusable) == 12
    )
