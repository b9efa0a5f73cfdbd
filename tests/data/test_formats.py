"""Every file format goes through the check, and into every task that it serves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.dataset_files import FORMATS, TASKS_BY_FORMAT, WrittenDataset, sample_scenes, write

from hones_lens import HookedVLM, evaluate
from hones_lens.data import shapes
from hones_lens.data.check import check_data
from hones_lens.data.examples import Example
from hones_lens.data.loading import DATASETS, load_examples
from hones_lens.tasks.registry import load_task

FORMATS_AND_TASKS = [(name, task) for name, tasks in TASKS_BY_FORMAT.items() for task in tasks]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, WrittenDataset]:
    folder: Path = tmp_path_factory.mktemp("formats")
    return {name: write(folder / name) for name, write in FORMATS.items()}


def test_every_data_set_that_is_read_from_files_has_a_fixture(written):
    fixtures = {w.dataset for w in written.values()} | {"own"}
    assert fixtures >= {name for name in DATASETS if not name.startswith("shapes")}
    assert {name: w.tasks for name, w in written.items()} == TASKS_BY_FORMAT


@pytest.mark.parametrize("name", FORMATS)
def test_all_records_pass_the_check(written, name):
    dataset = written[name]
    check = check_data(dataset.dataset, **dataset.files)
    assert check.ok and check.warnings == []
    assert {task: c.usable for task, c in check.tasks.items()} == dataset.n_records
    assert all(sum(c.splits.values()) == c.usable for c in check.tasks.values())
    assert check.images == 40 and " usable (discovery " in str(check) and ": ok, 40 pictures" in str(check)


@pytest.mark.parametrize(("name", "task"), FORMATS_AND_TASKS)
def test_all_records_load_into_the_task(written, name, task):
    dataset, chosen = written[name], load_task(task)
    examples = load_examples(dataset.dataset, task, "all", **dataset.files)
    assert len(examples) == len({e.id for e in examples}) == dataset.n_records[task]
    assert examples.skipped == () and examples.clipped == []
    for example in examples[:5]:
        assert example.image.mode == "RGB" and example.image.size == (112, 112)
        assert all(chosen.prompts(example)) and chosen.target(example) and chosen.answer(example)
        right = chosen.answer(example)
        if chosen.ranks:
            right = np.arange(50) == example.positive
        assert chosen.score(right, example) == pytest.approx(1)


@pytest.mark.parametrize(("name", "task"), FORMATS_AND_TASKS)
def test_splits_share_no_image_and_a_smaller_limit_gives_a_prefix(written, name, task):
    dataset = written[name]
    by_split = {
        s: load_examples(dataset.dataset, task, s, **dataset.files) for s in ("discovery", "dev", "test")
    }
    images = [{e.facts["image_id"] for e in examples} for examples in by_split.values()]
    assert sum(map(len, images)) == len(set().union(*images)) == 40
    assert sum(map(len, by_split.values())) == dataset.n_records[task]
    prefix = load_examples(dataset.dataset, task, "discovery", limit=7, **dataset.files)
    assert [example_fields(e) for e in prefix] == [example_fields(e) for e in by_split["discovery"][:7]]


def example_fields(example) -> tuple[object, ...]:
    fields = ("id", "question", "answers", "text", "references", "candidates", "positive", "kind")
    return tuple(getattr(example, name) for name in fields)


def test_fields_are_those_of_the_file(written):
    scene = sample_scenes()[0]
    question = shapes.questions(scene)[-1]
    for name in ("hones", "own_csv", "own_jsonl"):
        dataset = written[name]
        loaded = {t: load_examples(dataset.dataset, t, "all", 1, **dataset.files)[0] for t in dataset.tasks}
        assert loaded["vqa"].question == question.text and loaded["vqa"].answers[0] == question.answer
        assert loaded["ocr"].text == scene.word
        assert loaded["caption"].references == scene.captions
        assert loaded["retrieval"].candidates[loaded["retrieval"].positive] == scene.captions[0]
    assert len(load_examples("vqav2", "vqa", "all", 1, **written["vqav2"].files)[0].answers) == 10
    text = load_examples("textvqa", "vqa", "all", 1, **written["textvqa"].files)[0]
    assert text.answers == (*[scene.word] * 9, "") and text.id == "textvqa/34602"


def test_labels_to_break_results_down_by(written):
    kinds = {"hones": "other", "vqav2": "number", "gqa": "query", "textvqa": "all"}
    for name, kind in kinds.items():
        dataset = written[name]
        assert {e.kind for e in load_examples(dataset.dataset, "vqa", "all", **dataset.files)} == {kind}
    texts = load_examples("cocotext", "ocr", "all", **written["cocotext"].files)
    assert {e.kind for e in texts} == {"machine printed"}


def test_texts_that_are_not_legible_are_counted_and_not_meant_for_the_task(written):
    texts = load_examples("cocotext", "ocr", "all", **written["cocotext"].files)
    assert texts.not_for_task == {"with text that is not legible": 40}
    check = check_data("cocotext", **written["cocotext"].files)
    assert "40 with text that is not legible: not for this task" in str(check)


def test_the_files_of_coco_agree_on_splits(written):
    splits = []
    for name, task in (("coco_unified", "caption"), ("coco_karpathy", "caption"), ("vqav2", "vqa")):
        dataset = written[name]
        splits.append(
            {e.facts["image_id"] for e in load_examples(dataset.dataset, task, "test", **dataset.files)}
        )
    assert splits[0] == splits[1] == splits[2] != set()


@pytest.mark.parametrize("given", ["questions", "annotations", "folder"])
def test_vqav2_takes_either_file_or_their_folder(written, given):
    folder = written["vqav2"].data_file.parent
    files = {
        "questions": folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        "annotations": folder / "v2_mscoco_val2014_annotations.json",
        "folder": folder,
    }
    assert len(load_examples("vqav2", "vqa", "all", data_file=files[given])) == 80


def test_vqav2_names_what_is_missing_or_not_to_be_told_apart(tmp_path):
    folder = FORMATS["vqav2"](tmp_path / "set").data_file.parent
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").rename(tmp_path / "questions.json")
    with pytest.raises(FileNotFoundError, match="needs the other file of its pair beside it: v2_OpenEnded_"):
        load_examples("vqav2", "vqa", "all", data_file=folder / "v2_mscoco_val2014_annotations.json")
    with pytest.raises(ValueError, match=r"holds 0 files \*questions.json and 1 \*annotations.json"):
        load_examples("vqav2", "vqa", "all", data_file=folder)
    with pytest.raises(ValueError, match=r"its name must end in questions.json or annotations.json"):
        load_examples("vqav2", "vqa", "all", data_file=write(tmp_path / "vqa.json", {"some": "thing"}))


def test_a_file_of_captions_has_no_questions(written):
    dataset = written["coco_official"]
    with pytest.raises(ValueError, match="holds captions, nothing for vqa; use vqav2 or cocotext"):
        load_examples("coco", "vqa", "all", **dataset.files)
    assert set(check_data("coco", **dataset.files).tasks) == {"caption", "retrieval"}
    with pytest.raises(ValueError, match="'gqa' has no task 'ocr'; valid: vqa"):
        load_examples("gqa", "ocr", "all", **written["gqa"].files)


@cache
def shipped() -> HookedVLM:
    return HookedVLM.from_pretrained("tiny-llava")


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "task"), FORMATS_AND_TASKS)
def test_a_shipped_model_is_evaluated_on_every_format(written, name, task):
    """The scores are those of what the model says to one example at a time."""
    dataset, chosen = written[name], load_task(task)
    examples = load_examples(dataset.dataset, task, "all", 2 if chosen.ranks else 4, **dataset.files)
    result = evaluate(shipped(), task, examples, progress=False)
    assert result.example_ids == tuple(e.id for e in examples)
    assert result.interval.n == len(examples) and result.metric_name == chosen.metric_name
    subset = examples[: 1 if chosen.ranks else 2]
    expected = [
        chosen.score(answer, e) for answer, e in zip(model_outputs(chosen, subset), subset, strict=True)
    ]
    assert result.scores[: len(expected)] == pytest.approx(expected, abs=1e-6)


def model_outputs(task: Any, examples: Sequence[Example]) -> list[Any]:
    """What the model says to each example, one at a time."""
    outputs = []
    for example in examples:
        prompts = task.prompts(example)
        inputs = shipped().prepare([example.image] * len(prompts), prompts)
        if task.ranks:
            logits = shipped()(inputs, logits_to_keep=1)[:, -1]
            yes, no = (shipped().continuation(prompts[0], word)[0] for word in ("Yes", "No"))
            outputs.append((logits[:, yes] - logits[:, no]).detach().numpy())
        else:
            outputs.append(shipped().generate(inputs, max_new_tokens=24)[0])
    return outputs


def test_paths_names_and_files_that_contradict_each_other(written, tmp_path):
    dataset = written["hones"]
    with pytest.raises(ValueError, match="not both; names: shapes, "):
        load_examples(str(dataset.data_file), "vqa", "all", data_file=dataset.data_file)
    with pytest.raises(ValueError, match="data set 'gqa' is read from a file: give data_file"):
        load_examples("gqa", "vqa", "all")
    with pytest.raises(FileNotFoundError, match=r"no such file: .*nothing\.json"):
        load_examples(str(tmp_path / "nothing.json"), "vqa", "all")
    with pytest.raises(FileNotFoundError, match=r"no such folder of images: .*nowhere"):
        load_examples("hones", "vqa", "all", data_file=dataset.data_file, image_dir=tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"must hold exactly one file .json or .csv or .jsonl, but holds none"
    ):
        load_examples(tmp_path, "vqa", "all")
    with pytest.raises(ValueError, match="data set 'shapes' is drawn, not read from files"):
        check_data("shapes")
    with pytest.raises(ValueError, match="limit must be at least 1, not 0"):
        load_examples("hones", "vqa", "all", 0, **dataset.files)
    with pytest.raises(ValueError, match="unknown on_error 'ignore'; valid: raise, skip"):
        load_examples("hones", "vqa", "all", **dataset.files, on_error="ignore")
