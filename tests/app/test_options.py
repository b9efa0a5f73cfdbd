"""Every option of every command, from the parser: what can't be right is refused before anything runs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from helpers.dataset_files import hones

from hones_lens.app.cli import build_parser, main
from hones_lens.app.commands import values
from hones_lens.app.config_file import apply_config
from hones_lens.app.runs.data_choice import DataChoice
from hones_lens.app.runs.evaluate import TaskExamples
from hones_lens.app.runs.patch import PairsChoice
from hones_lens.data import load_examples
from hones_lens.model import HookedVLM
from hones_lens.model.loading import load_model

# Options for which 0 is a value.
ZERO = {"--controls", "--race", "--seed", "--port", "--factors", "--kl-weight", "--l2-weight"}
ZERO |= {"--naming-steps", "--shape-steps", "--units", "--layers"}
HUGE = ("1" + 30 * "0", "1" + 5000 * "0")


def commands(
    parser: argparse.ArgumentParser, words: str = ""
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command and action of a command by its words, with its parser."""
    inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for action in inner:
        for name, command in action.choices.items():
            yield from commands(command, f"{words} {name}".strip())
    if not inner:
        yield words, parser


def reads_numbers(action: argparse.Action) -> bool:
    """Whether an option takes a number, or several."""
    try:
        value = action.type("1") if callable(action.type) else None
    except (ValueError, argparse.ArgumentTypeError):
        value = None
    if action.type is not None and value is None:  # four sides of a box
        return action.type is values.box
    parts = value if isinstance(value, tuple) else (value,)
    return all(isinstance(part, (int, float)) for part in parts)


def numeric_options() -> Iterator[tuple[str, argparse.ArgumentParser, argparse.Action]]:
    for words, parser in commands(build_parser()):
        for action in parser._actions:
            if action.option_strings and action.type and reads_numbers(action):
                yield words, parser, action


def refusal(parser: argparse.ArgumentParser, action: argparse.Action, text: str) -> str:
    """What wrong usage is told of a value; empty if it is taken."""
    try:
        parser._get_values(action, [text])
    except argparse.ArgumentError as error:
        return str(error)
    return ""


def test_no_number_passes_that_can_not_be_right() -> None:
    found, passed = list(numeric_options()), []
    names = {action.option_strings[-1] for *_, action in found}
    assert len(found) > 60 and {"--limit", "--draws", "--box", "--seed"} | ZERO <= names
    for words, parser, action in found:
        name = action.option_strings[-1]
        for value in ("-1", "nan", "inf", "-inf", "1e400", "x", "", "0", *HUGE):
            said, is_right = refusal(parser, action, value), value == "0" and name in ZERO
            if (said == "") != is_right or (said and f"argument {name}: " not in said) or len(said) > 200:
                passed.append((words, name, value[:9], said[:99]))
    assert not passed


def test_plain_int_and_float_are_no_types_of_options() -> None:
    for words, parser in commands(build_parser()):
        for action in parser._actions:
            assert action.type not in (int, float), (words, action.option_strings)


WRONG = [
    (["evaluate", "--model", "nope"], "--model: unknown model 'nope'"),
    (["check", "nope"], "--model: unknown model 'nope'"),
    (["evaluate", "--dataset", "nope"], "--dataset: unknown data set 'nope'"),
    (["data", "check", "nope"], "--dataset: unknown data set 'nope'"),
    (["mask", "--data-file", "nope.json", "--dataset", "x.csv"], "--dataset, --data-file: give"),
    (["localize", "--split", "nope"], "--split: unknown split 'nope'"),
    (["localize", "--split", "nope.json", "--dataset", "coco"], "--split: no such file: nope.json"),
    (["steer", "--dev-split", "dve"], "did you mean 'dev'?"),
    (["evaluate", "--split", "discovry"], "did you mean 'discovery'?"),
    (["mask", "--split", "discovery"], "--split: neurons can't be judged on the split that selected them"),
    (["localize", "--device", "nonsense"], "--device: device 'nonsense' can't be used"),
    (
        ["localize", "--max-pixels", "9", "--min-pixels", "10"],
        "--min-pixels: 10 is more than --max-pixels, 9",
    ),
    (["steer", "--methods", "HONES,Gird-Search"], "--methods: unknown method"),
    (["reproduce", "--tasks", "vqa,orc"], "--tasks: unknown task 'orc'"),
    (["patch", "--corrupt", "blank", "--color", "reddish"], "'reddish' is not a colour"),
    (["patch", "--kind", "taste"], "no vqa pairs of kind 'taste'"),
    (["patch", "--metric", "task", "--corrupt", "blur"], "--metric: task needs counterfactual pairs"),
    (["localize", "--max-pixels", "9999"], "--max-pixels: 'tiny-llava' sees all pictures in one size"),
    (["explore", "--model", "llava", "--min-pixels", "9"], "--min-pixels: 'llava' sees all pictures"),
    (["mask", "--device", "cpu", "--device-map", "auto"], "--device, --device-map: give one of the two"),
    (["explore", "--raw-prompt"], "--raw-prompt needs --prompt"),
    (["check", "tiny-llava", "--flips", "2", "--dtype", "float32"], "--flips compares another type"),
]
AGAINST_THE_MODEL = [
    (["localize", "--top-k", "999"], "--top-k: 999 heads asked for, but only "),
    (["mask", "--top-k", "3", "--heads", "L0H0,L1H1"], "--top-k: 3 heads asked for, but only 2 are measured"),
    (["demo", "--prefilter", "999"], "--prefilter: 999 heads to keep, but there are only"),
    (["localize", "--prefilter", "2", "--top-k", "3"], "--prefilter: 2 heads to keep, fewer than the 3"),
    (["localize", "--race", "0.01", "--task", "caption"], "--race: BLEU-4 of --task caption is not a mean"),
    (["localize", "--heads", "L0H99"], "--heads: head L0H99 does not exist"),
    (["reproduce", "--layers", "99"], "--layers: layer 99 is not in 0"),
    (["patch", "--layers", "99"], "--layers: layer 99 is not in 0"),
]


@cache
def shipped(name: str, *args: object, **options: object) -> HookedVLM:
    return load_model(name)


@pytest.mark.parametrize(("argv", "says"), WRONG + AGAINST_THE_MODEL)
def test_wrong_options_are_named_before_anything_is_measured(
    argv: list[str], says: str, capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hones_lens.app.runs.stages.localize_heads", None)
    monkeypatch.setattr("hones_lens.model.load_hf_model", None)
    monkeypatch.setattr("hones_lens.model.load_model", None if (argv, says) in WRONG else shipped)
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert says in said and said.startswith("hones: ") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("split", ["discovery", "dev", "test"])
def test_no_examples_are_not_the_default_number(split: str) -> None:
    sizes = dict.fromkeys(("n_discovery", "n_dev", "n_held_out"), 0)
    with pytest.raises(ValueError, match="limit must be at least 1, not 0"):
        getattr(DataChoice(**sizes), split)("vqa")


def test_a_configuration_s_limit_of_0_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "c.yaml"
    for text in ("limit: 0", "model: {name: llava}\ndata: {test_limit: 0, eval_limit: 9}"):
        file.write_text(text)
        assert main(["localize", "--config", str(file)]) == 2
        assert "--limit does not take: 0 must be at least 1" in capsys.readouterr().err
    assert main(["localize", "--config", "nowhere.yaml"]) == 2
    assert "--config: nowhere.yaml can't be read: No such file" in capsys.readouterr().err


IN_A_FILE = [
    ("localize", "model: {name: llava}\ndata: {test_limit: 0}", "data.test_limit is 0, which --limit does"),
    ("localize", "run: {task: vqa, top_k_heads: many}", "run.top_k_heads is 'many', which --top-k does"),
    ("steer", "steering: {lr: fast}", "steering.lr is 'fast', which --lr does not take"),
    ("steer", "steering: {epochs: [2, x]}", "steering.epochs is [2, 'x'], which --epochs does not take"),
    ("steer", "steering: {dataset: 5}", "data.datasets has no 5; it has: none"),
    ("steer", "data: {datasets: {a: {}}}\nsteering: {dataset: [a]}", "data.datasets has no ['a']; it has: a"),
    ("patch", "box: [1, 2, 3]", "box is [1, 2, 3], which --box does not take"),
    ("explore", "run_folder: x", "unknown key 'run_folder'; valid: "),
    ("localize", "engine: ray", "--engine: give --workers, too"),
    ("localize", "model: tiny-llava\nmin-pixels: 9", "--min-pixels: 'tiny-llava' sees all pictures in one"),
]


@pytest.mark.parametrize(("command", "text", "says"), IN_A_FILE)
def test_what_is_wrong_in_a_file_is_wrong_usage(
    command: str, text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert main([command, "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and (str(file) in said or says.startswith("--"))


def test_boxes_in_a_file_are_those_of_the_command_line(tmp_path: Path) -> None:
    file, parser = tmp_path / "c.yaml", build_parser()
    for text in ("[[0, 0, 9, 9], [1, 1, 5, 5]]", "['0,0,9,9', '1,1,5,5']"):
        file.write_text(f"box: {text}")
        apply_config(parser.parse_args(["patch", "--config", str(file)]))
        assert parser.parse_args(["patch"]).box == [(0, 0, 9, 9), (1, 1, 5, 5)]


@pytest.mark.parametrize("command", ["evaluate", "overlap", "patch"])
def test_fewer_examples_than_the_limit_are_said(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hones(tmp_path)
    files = {
        "dataset": "hones",
        "data_file": str(tmp_path / "unified.json"),
        "image_dir": str(tmp_path / "images"),
    }
    there = len(load_examples(task="vqa", split="test", **files))
    model = shipped("tiny-llava")
    for asked, is_said in ((there, False), (there + 1, True), (None, False)):
        if command == "evaluate":
            options = {"on_error": "raise", "data_file": files["data_file"], "image_dir": files["image_dir"]}
            TaskExamples.of(model, "vqa", "hones", "test", asked, 3407, **options)
        elif command == "overlap":
            DataChoice(n_held_out=asked, **files).test("vqa")
        else:
            PairsChoice(corrupt="blank", split="test", limit=asked, **files).load(model)
        said = f"hones: {there} vqa examples of 'test' in hones, not the {there + 1} asked for: all are used"
        assert [x for x in capsys.readouterr().err.splitlines() if x[:6] == "hones:"] == [said] * is_said
