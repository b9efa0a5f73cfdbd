"""Data sets of files on the command line: tasks of their own, encodings."""

from __future__ import annotations

import argparse
import json

import pytest
from helpers.dataset_files import docvqa, pope
from PIL import Image
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

import hones_lens as hl
from hones_lens.app.cli import build_parser, main
from hones_lens.app.commands.arguments import data_from


def files_of(dataset) -> list[str]:
    return [
        "--dataset",
        dataset.dataset,
        "--data-file",
        str(dataset.data_file),
        "--image-dir",
        str(dataset.image_dir),
    ]


def test_pope_is_measured_as_its_own_evaluation_does(tmp_path, capsys):
    dataset = pope(tmp_path)
    argv = ["evaluate", *files_of(dataset), "--task", "yes-no", "--split", "all", "--limit", "12"]
    assert main([*argv, "--json", str(tmp_path / "r.json")]) == 0
    (written,) = json.loads((tmp_path / "r.json").read_text())
    shipped = hl.HookedVLM.from_pretrained("tiny-llava")
    examples = hl.load_examples("pope", "yes-no", "all", 12, **dataset.files)
    task = hl.load_task("yes-no")
    inputs = shipped.prepare([e.image for e in examples], [task.prompt(e) for e in examples])
    texts = shipped.generate(inputs, max_new_tokens=24)
    said = ["no" if {"no", "not", "No"} & set(text.split(".")[0].split()) else "yes" for text in texts]
    labels = [e.kind for e in examples]
    p, r, f, _ = precision_recall_fscore_support(
        labels, said, pos_label="yes", average="binary", zero_division=0
    )
    measures = written["measures"]
    assert measures["accuracy"] == written["interval"]["value"] == pytest.approx(accuracy_score(labels, said))
    assert [measures[k] for k in ("precision", "recall", "f1")] == pytest.approx([p, r, f], nan_ok=True)
    assert measures["yes_ratio"] == pytest.approx(said.count("yes") / 12)
    assert f"f1 {f:.3f}, yes_ratio" in capsys.readouterr().out


def test_docvqa_is_measured_by_anls_and_by_nothing_else(tmp_path, capsys):
    dataset = docvqa(tmp_path)
    argv = ["evaluate", *files_of(dataset), "--split", "all", "--limit", "4"]
    assert main(argv) == 0
    assert "vqa-anls: ANLS" in capsys.readouterr().out
    assert main([*argv, "--task", "vqa"]) == 1
    assert "data set 'docvqa' has no task 'vqa'; valid: vqa-anls" in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.slow
def test_yes_no_goes_through_every_stage(tmp_path, capsys):
    small = ["--limit", "6", "--task", "yes-no", *files_of(pope(tmp_path / "set"))]
    run = str(tmp_path / "run")
    assert main(["mask", *small, "--controls", "2", "--out", run]) == 0
    assert (
        main(["steer", *small, "--out", run, "--epochs", "1", "--lr", "0.01", "--methods", "fixed_amp,HONES"])
        == 0
    )
    assert main(["report", run]) == 0 and "yes-no" in capsys.readouterr().out


def in_latin_1(folder, separator: str = ",") -> list[str]:
    """A CSV file of one's own whose answer, rosé, is no UTF-8."""
    folder.mkdir()
    rows = ["image,question,answer", *(f"{i}.png,what color is it?,rosé" for i in range(24))]
    for i in range(24):
        Image.new("RGB", (112, 112), (200, 10 * i, 150)).save(folder / f"{i}.png")
    text = "\n".join(rows).replace(",", separator) + "\n"
    (folder / "mine.csv").write_bytes(text.encode("latin-1"))
    return ["--dataset", str(folder)]


RUNS = {
    "evaluate": ["--task", "vqa", "--split", "all", "--limit", "2"],
    "localize": ["--limit", "2", "--stage", "heads", "--plan"],
    "mask": ["--limit", "2", "--plan"],
    "patch": ["--corrupt", "blank", "--split", "all", "--limit", "2", "--plan"],
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("command", RUNS)
def test_the_encoding_can_be_named_wherever_data_are_read(command, tmp_path, capsys):
    argv = [command, *in_latin_1(tmp_path / "mine"), *RUNS[command]]
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert "line 2 holds the byte 0xe9" in said and "(--encoding cp1252)" in said
    assert main([*argv, "--encoding", "cp1252"]) == 0


def test_data_check_takes_an_encoding_and_names_separators(tmp_path, capsys):
    (folder,) = in_latin_1(tmp_path / "mine")[1:]
    check = ["data", "check", folder, "--task", "vqa"]
    assert main(check) == 1 and main([*check, "--encoding", "latin-1"]) == 0
    assert "24 usable" in capsys.readouterr().out
    (folder,) = in_latin_1(tmp_path / "other", ";")[1:]
    assert main(["data", "check", folder, "--task", "vqa", "--encoding", "latin-1"]) == 1
    assert "its columns are separated by semicolons, not commas" in capsys.readouterr().err


def test_an_unknown_encoding_and_one_without_use_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--encoding", "latin-99"])
    assert stop.value.code == 2 and "unknown encoding 'latin-99'" in capsys.readouterr().err
    assert main(["evaluate", "--task", "vqa", "--encoding", "cp1252"]) == 2
    assert "--encoding: is for data from files, and this data set is drawn" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is drawn, not read from files: encoding='cp1252' has no use"):
        hl.load_examples("shapes", "vqa", "test", 1, encoding="cp1252")
    with pytest.raises(ValueError, match="encoding='cp1252' has no use"):
        hl.load_examples("hf:lmms-lab/textvqa@validation", "vqa", "all", encoding="cp1252")


def test_a_measure_of_nothing_is_saved_and_said(tmp_path, capsys):
    """The recall where the right answer is never yes."""
    dataset = pope(tmp_path)
    lines = [line for line in dataset.data_file.read_text().splitlines() if json.loads(line)["label"] == "no"]
    dataset.data_file.write_text("\n".join(lines[:4]))
    argv = ["evaluate", *files_of(dataset), "--task", "yes-no", "--split", "all"]
    assert main([*argv, "--json", str(tmp_path / "r.json")]) == 0
    (written,) = json.loads((tmp_path / "r.json").read_text())
    assert written["measures"]["recall"] is None and "recall of nothing" in capsys.readouterr().out


def commands_with_pictures(parser: argparse.ArgumentParser) -> dict[str, set[str]]:
    """Options by command, of all commands that take `--image-dir`, actions such as `data check` too."""
    found, options = {}, {option for action in parser._actions for option in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                found |= commands_with_pictures(each)
    return found | ({parser.prog: options} if "--image-dir" in options else {})


def test_every_command_that_reads_pictures_bounds_them_alike():
    commands = commands_with_pictures(build_parser())
    assert {"hones localize", "hones evaluate", "hones patch", "hones data check"} <= commands.keys()
    bounds = {"--allow-outside", "--allow-large-pictures", "--encoding"}
    assert {name: bounds - options for name, options in commands.items() if bounds - options} == {}


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "argv",
    [
        ["data", "check"],
        ["evaluate", "--limit", "2", "--split", "all", "--dataset"],
        ["patch", "--force", "--corrupt", "blank", "--limit", "2", "--split", "all", "--dataset"],
    ],
    ids=lambda argv: argv[0],
)
def test_bounds_on_pictures_are_lifted_from_the_command_line(argv, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hones_lens.data.images.MOST_MEGAPIXELS", 0.001)
    (tmp_path / "set").mkdir()
    Image.new("RGB", (60, 40), "red").save(tmp_path / "x.png")
    file = tmp_path / "set" / "data.csv"
    rows = "../x.png,what?,red\n" * 2
    file.write_text("image,question,answer\n" + rows, encoding="utf-8")
    argv = [*argv, str(file), "--task", "vqa"]
    argv += ["--out", str(tmp_path / "run")] if argv[0] == "patch" else []
    said = []
    for lifted in ([], ["--allow-outside"], ["--allow-outside", "--allow-large-pictures"]):
        code = main([*argv, *lifted])
        said.append((code, "".join(capsys.readouterr())))
    assert [code for code, _ in said] == [1, 1, 0], said
    assert "line 2" in said[0][1] and "x.png lies outside the folder of images" in said[0][1]
    assert "x.png is of 60 × 40 pixels, more than 0.001 megapixels" in said[1][1]


def test_bounds_on_pictures_reach_the_data_of_every_stage():
    given = ["--allow-outside", "--allow-large-pictures"]
    for lifted in ([], given[:1], given):
        data = data_from(build_parser().parse_args(["localize", *lifted]), None)
        assert [data.allow_outside, data.allow_large_pictures] == [flag in lifted for flag in given]
        assert data._files.items() >= {("allow_outside", given[0] in lifted)}


def test_a_check_for_a_model_sees_prompts_that_are_too_long(tmp_path, capsys):
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    rows = {"what?": True, "red " * 990: False}
    table = "image,question,answer\n" + "".join(f"a.png,{question},red\n" for question in rows)
    (tmp_path / "data.csv").write_text(table, encoding="utf-8")
    argv = ["data", "check", str(tmp_path / "data.csv"), "--task", "vqa"]
    argv += ["--json", str(tmp_path / "found.json")]
    assert main(argv) == 0
    assert main([*argv, "--model", "tiny-llava"]) == 1
    assert (
        "vqa: 1 of 2 examples can't be asked of tiny-llava\n    own/line 3: its prompt"
        in capsys.readouterr().out
    )
    (fault,) = json.loads((tmp_path / "found.json").read_text())["unfit"]["tasks"]["vqa"]
    assert "is too long" in fault["reason"] and "for a context of" in fault["reason"]
    assert main([*argv, "--model", "tiny-llava", "--no-images"]) == 2
