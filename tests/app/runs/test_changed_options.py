"""Every option of every command with a run folder, from the parser: a change of it in a finished folder.

It is refused by name, or on a short list: of what changes no number, or of what the command never reads.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers import example_results

from hones_lens.app.cli import build_parser, main
from hones_lens.app.commands.recorded import CHANGE_NOTHING, SELECT, recorded_options
from hones_lens.app.runs.folder import Run
from hones_lens.app.runs.stages import DECIDED
from hones_lens.model import HookedVLM
from hones_lens.model.loading import load_model

SMALL = {"localize": ["--limit", "2"], "mask": ["--limit", "2"], "demo": ["--limit", "2"]}
SMALL |= {
    "steer": ["--limit", "2"],
    "patch": ["--limit", "2", "--corrupt", "noise", "--strength", "2", "--what", "z"],
}
SMALL |= {"evaluate": ["--limit", "2", "--task", "vqa"], "reproduce": ["--limit", "2", "--tasks", "vqa,ocr"]}
SMALL |= {"overlap": ["a", "b", "--mask", "--limit", "2"]}
# Options that change no number, and are not recorded.
HARMLESS = {
    "workers",
    "wait",
    "allow_code_change",
    "force",
    "stage",
    "gpu",
    "gpus",
    "mfu",
    "throughput",
    "memory_budget",
}
# Options that a command takes, since commands share them, and does not read.
NOT_READ = {"steer": {"dataset", "neurons"}}  # it names the folder; and they are given below
NOT_READ |= {"reproduce": {"dev_split", "dev_limit"}}  # of its first folder: that of steering refuses
# What is no change here: no data from files, and no other device.
NO_CHANGE = {"on_error", "allow_outside", "allow_large_pictures", "device"}
OTHER_TEXTS = {"model": "tiny-qwen2.5-vl", "device": "cpu", "dataset": "shapes-varied", "split": "discovery"}
OTHER_TEXTS |= {
    "discovery_split": "dev",
    "dev_split": "discovery",
    "methods": "HONES",
    "tasks": "vqa,caption",
}
OTHER_TEXTS |= {"prompt": "what?", "answer": "red", "foil": "blue", "color": "red", "kind": "color"}
OTHER_TEXTS |= {"groups": "image"}
OTHER_VALUES = ("3", "0.25", "L0H1", "0,0,9,9", "utf-16", "time=3")


class Reached(Exception):
    """The run folder was opened: what comes next is read from it, or computed."""


@cache
def loaded(*args: Any, **options: Any) -> HookedVLM:
    return load_model(*args, **options)


@pytest.fixture(autouse=True)
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def reached(*args: Any, **options: Any) -> None:
        raise Reached

    neurons = example_results.neurons()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hones_lens.model.load_model", loaded)
    monkeypatch.setattr(Run, "stage", reached)
    monkeypatch.setattr(Run, "files", reached)
    monkeypatch.setattr("hones_lens.app.commands.steer._neurons_to_steer", lambda *args: neurons)
    both = ("tiny-llava", {"vqa": neurons, "ocr": neurons})
    monkeypatch.setattr("hones_lens.app.runs.overlap.neurons_of_runs", lambda runs: both)


def told(argv: list[str]) -> str:
    """Why a command refuses to go on; empty if it goes on."""
    try:
        main([*argv, "--debug"])
    except Reached:
        return ""
    except (ValueError, OSError) as error:
        return str(error)
    raise AssertionError(f"{argv} is done, and opened no run folder")


def changes(command: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    """Every option of a command by its name, with another value than it has now."""
    for action in command._actions:
        name, flag = action.dest, (action.option_strings or [""])[-1]
        if flag and name not in {"help", "debug", "config", "json", "out", "plan", "limit"}:
            yield name, [flag] if action.nargs == 0 else [f"{flag}={another_value(action)}"]
    yield "limit", ["--limit", "3"]


def another_value(action: argparse.Action) -> str:
    if action.choices is not None:
        return str([choice for choice in action.choices if choice != action.default][-1])
    if action.dest in OTHER_TEXTS or action.type is None:
        return OTHER_TEXTS.get(action.dest, "other")
    for value in OTHER_VALUES:
        try:
            action.type(value)
        except (ValueError, argparse.ArgumentTypeError):
            continue
        return value
    raise AssertionError(f"{action.option_strings}: no value of OTHER_VALUES is one")


def command_parser(name: str) -> argparse.ArgumentParser:
    [commands] = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return commands.choices[name]


# Those of `localize`; the commands share them.
SHARED = [pytest.param(name, marks=pytest.mark.exhaustive) for name in ("mask", "demo")]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [*(name for name in SMALL if name not in ("mask", "demo")), *SHARED])
def test_no_changed_option_gives_the_numbers_of_a_finished_folder(name: str) -> None:
    start = [name, *SMALL[name], "--out", "run"]
    assert told(start) == "" == told(start)
    for folder in [file.parent for file in Path("run").rglob("settings.json")]:
        for stage in DECIDED:
            (folder / (stage if "." in stage else f"{stage}.json")).touch()
    silent, unnamed = set(), set()
    recorded = set(recorded_options(build_parser().parse_args(start)))
    for option, words in changes(command_parser(name)):
        if words[0] in start and option != "limit":
            continue
        said = told([*start, *words])
        if not said:
            silent.add(option)
        elif option in recorded and option not in said and words[0].split("=")[0] not in said:
            unnamed.add((option, said))
    assert not unnamed
    assert silent - HARMLESS - NO_CHANGE == NOT_READ.get(name, set())
    assert not silent & recorded


def test_the_short_lists_name_options_and_a_new_one_is_recorded() -> None:
    parsers = [command_parser(name) for name in SMALL]
    names = {action.dest for parser in parsers for action in parser._actions}
    assert names >= CHANGE_NOTHING | SELECT and not CHANGE_NOTHING & SELECT
    command = command_parser("localize")
    command.add_argument("--new", default=3)
    args = command.parse_args([])
    assert recorded_options(args)["new"] == 3
    decided = {setting for settings in DECIDED.values() for setting in settings}
    assert set(recorded_options(args)) - {"new"} <= decided, "of no stage: any change is refused"


def test_of_a_race_more_heads_are_other_measurements(tmp_path: Path) -> None:
    for race, says in (
        (None, ""),
        (0.1, "top_k: 2 there, 3 now, which decides the stage heads, already begun"),
    ):
        start = [
            "localize",
            "--limit",
            "2",
            "--out",
            f"run-{race}",
            *([] if race is None else [f"--race={race}"]),
        ]
        assert told([*start, "--top-k", "2"]) == ""
        Path(f"run-{race}", "heads.journal.jsonl").touch()
        said = told([*start, "--top-k", "3"])
        assert says in said and bool(said) == bool(says)


def test_what_decides_a_stage_that_a_command_does_not_run_stays_as_it_is() -> None:
    masked = ["mask", "--limit", "2", "--ratio", "0.1", "--out", "run", "--controls"]
    assert told([*masked, "3"]) == ""
    for stage in ("neurons", "masking"):
        Path("run", f"{stage}.json").touch()
    localized = ["localize", "--limit", "2", "--out", "run"]
    assert told([*localized, "--ratio", "0.1"]) == "" == told([*localized, "--stage", "heads"])
    assert "ratio: 0.1 there" in told(localized)
    assert "controls: 3 there, 4 now, which decides the stage masking" in told([*masked, "4"])
    assert told([*masked, "3"]) == ""
    heads = ["localize", "--limit", "2", "--stage", "heads", "--out", "heads"]
    assert told(heads) == ""
    settings = Path("heads", "settings.json").read_bytes()
    assert told(heads) == "" and Path("heads", "settings.json").read_bytes() == settings
