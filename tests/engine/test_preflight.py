"""Faults in examples are found before anything is computed, by file and record, and can be left out."""

from __future__ import annotations

import bisect
import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.dataset_files import WrittenDataset, coco_name, hones
from PIL import Image

import hones_lens as hl
from hones_lens.app.cli import main
from hones_lens.data import shapes_varied
from hones_lens.engine import MAX_NEW_TOKENS, find_faults, usable_examples

QUIET: Any = {"progress": False}


@pytest.fixture(scope="module")
def model() -> hl.HookedVLM:
    return hl.HookedVLM.from_pretrained("tiny-llava")


def bomb(file: Path) -> None:
    """A PNG of a few bytes that says it has 60,000 × 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )


def deep(file: Path) -> None:
    Image.new("I;16", (8, 8)).save(file, "PNG")


PICTURES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-200]), "can't be read as an image"),
    "garbage": (lambda file: file.write_bytes(b"junk" * 99), "in no format that Pillow knows"),
    "empty": (lambda file: file.write_bytes(b""), "it is empty"),
    "bomb": (bomb, "pixels"),
    "16 bits": (deep, "8 bits a channel"),
}
QUESTIONS: dict[str, tuple[str, str]] = {
    "over-long": ("what shape is it? " * 200, r"is too long: \d+ tokens .* for a context of"),
    "with image tokens": ("what is <image> here?", "already holds '<image>'"),
}


def damaged(folder: Path, damage: str, numbers: range) -> WrittenDataset:
    """HONES's format; the records with these numbers are damaged."""
    written = hones(folder)
    assert written.data_file is not None and written.image_dir is not None
    data = json.loads(written.data_file.read_text())
    for number in numbers:
        if damage in PICTURES:
            PICTURES[damage][0](written.image_dir / coco_name(data["data"][number]["image_id"]))
        else:
            data["data"][number]["vqa"]["question"] = QUESTIONS[damage][0]
    written.data_file.write_text(json.dumps(data))
    return written


def load(written: WrittenDataset, **options: Any) -> list[hl.Example]:
    return hl.load_examples(str(written.data_file), "vqa", "all", image_dir=written.image_dir, **options)


@pytest.mark.parametrize("damage", [*PICTURES, *QUESTIONS])
def test_every_fault_is_named_and_can_be_left_out(damage, tmp_path, model):
    written = damaged(tmp_path, damage, range(4, 7))
    assert written.data_file is not None
    examples, says = load(written), {**PICTURES, **QUESTIONS}[damage][1]
    with pytest.raises(ValueError, match=rf"3 of 40 vqa examples can't be used: .*{says}") as found:
        usable_examples(model, "vqa", examples, **QUIET)
    ids = {
        f"hones/{1000 * json.loads(written.data_file.read_text())['data'][i]['image_id']}" for i in (4, 5, 6)
    }
    assert all(name in str(found.value) for name in ids)
    with pytest.warns(UserWarning, match="3 of 40 vqa examples are left out"):
        kept, faults = usable_examples(model, "vqa", examples, "skip", **QUIET)
    assert {fault.example for fault in faults} == ids
    assert [e.id for e in kept] == [e.id for e in examples if e.id not in ids]
    if damage in PICTURES:
        assert all(str(written.image_dir) in fault.reason for fault in faults)


def test_the_first_ten_are_listed_and_all_are_counted(tmp_path, model):
    examples = load(damaged(tmp_path, "garbage", range(12)))
    with pytest.raises(ValueError, match="12 of 40 vqa examples can't be used") as found:
        usable_examples(model, "vqa", examples, **QUIET)
    assert str(found.value).count("in no format") == 10 and "; ..." in str(found.value)
    with pytest.raises(ValueError, match="12 of 12 vqa examples can't be used, so that none is left"):
        usable_examples(
            model, "vqa", [e for e in examples if find_faults(model, "vqa", [e], **QUIET)], "skip"
        )


def test_the_longest_prompt_that_fits_is_the_longest_that_is_taken(model):
    """With its picture and 24 new tokens it fills the context, counted by what `prepare` makes."""
    (example,) = hl.load_examples("shapes", "vqa", "test", limit=1)

    def asked(words: int) -> hl.Example:
        return hl.Example("x", example.image_source, "red " * words + "?", example.answers)

    def length(words: int) -> int:
        prompt = hl.load_task("vqa").prompt(asked(words))
        return model.prepare(example.image, prompt).input_ids.shape[1]

    room = model.cfg.n_ctx - MAX_NEW_TOKENS
    words = bisect.bisect_right(range(930), room, key=length) - 1
    assert length(words) <= room < length(words + 1)
    assert find_faults(model, "vqa", [asked(words)], **QUIET) == []
    (fault,) = find_faults(model, "vqa", [asked(words + 1)], **QUIET)
    assert f"{length(words + 1)} tokens" in fault.reason


@pytest.mark.parametrize("task", ["vqa", "ocr", "caption", "retrieval"])
def test_nothing_is_wrong_with_what_is_whole(task, model, tmp_path):
    written = hones(tmp_path)
    examples = hl.load_examples(str(written.data_file), task, "test", 3, image_dir=written.image_dir)
    assert usable_examples(model, task, examples, **QUIET) == (list(examples), ())


def test_no_picture_stays_in_memory(model):
    """Nothing is read through the cache of `Example.image`, whose pictures would stay."""
    from hones_lens.data.examples import PICTURES

    examples = shapes_varied.load("vqa", "test", 5, 0)
    PICTURES.clear()
    assert find_faults(model, "vqa", examples, **QUIET) == []
    assert len(PICTURES) == 0


def test_evaluate_leaves_faulty_examples_out(tmp_path, model):
    examples = load(damaged(tmp_path, "truncated", range(3)), limit=None)
    few = [*examples[:6], *(e for e in examples if find_faults(model, "vqa", [e], **QUIET))]
    few = list(dict.fromkeys(few))
    with pytest.raises(ValueError, match="vqa examples can't be used"):
        hl.evaluate(model, "vqa", few, on_error="raise", **QUIET)
    with pytest.warns(UserWarning, match="are left out"):
        found = hl.evaluate(model, "vqa", few, on_error="skip", **QUIET)
    assert len(found.left_out) == 3 and "left out: 3 examples" in str(found)
    kept = [e for e in few if e.id in found.example_ids]
    assert len(kept) == len(few) - 3 and found.scores == hl.evaluate(model, "vqa", kept, **QUIET).scores
    found.save(tmp_path / "e.json")
    assert hl.Evaluation.load(tmp_path / "e.json").left_out == found.left_out


@pytest.mark.exhaustive
@pytest.mark.parametrize("command", ["localize", "evaluate", "mask", "patch"])
def test_commands_find_faults_before_they_compute(command, tmp_path, capsys):
    written = damaged(tmp_path / "data", "truncated", range(40))
    argv = [command, "--dataset", str(written.data_file), "--image-dir", str(written.image_dir)]
    argv += ["--limit", "5", "--corrupt", "blank"] if command == "patch" else ["--limit", "5"]
    argv += [] if command == "evaluate" else ["--out", str(tmp_path / "run")]
    argv += ["--task", "vqa"]
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert re.search(r"hones: \d+ of \d+ vqa examples can't be used: ", said) and "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_folder_holds_what_was_left_out_and_goes_on(tmp_path, capsys):
    written = damaged(tmp_path / "data", "garbage", range(0, 40, 4))
    argv = ["localize", "--dataset", str(written.data_file), "--image-dir", str(written.image_dir)]
    argv += ["--limit", "8", "--heads", "L0H0,L1H1", "--stage", "heads", "--out", str(tmp_path / "run")]
    assert main(argv) == 1
    with pytest.warns(UserWarning, match="are left out"):
        assert main([*argv, "--on-error", "skip"]) == 0
    left_out = json.loads((tmp_path / "run" / "left-out.json").read_text())
    listed = {fault["example"] for faults in left_out["splits"].values() for fault in faults}
    assert listed and all("in no format" in f["reason"] for fs in left_out["splits"].values() for f in fs)
    heads = (tmp_path / "run" / "heads.json").read_bytes()
    assert not any(name in heads.decode() for name in listed)
    with pytest.warns(UserWarning, match="are left out"):
        assert main([*argv, "--on-error", "skip"]) == 0  # the same records are used
    assert (tmp_path / "run" / "heads.json").read_bytes() == heads
