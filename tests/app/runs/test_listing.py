"""`hones runs`: what is done, what stopped, and what runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from helpers.hf_task_loops import examples_of, pair

from hones_lens.app.cli import main
from hones_lens.app.runs.folder import Run
from hones_lens.app.runs.listing import run_states, shown
from hones_lens.data import load_examples
from hones_lens.hones import compare_steering, localize_heads, masking_curve
from hones_lens.results import Racing, write_json


class Result:
    def save(self, file: Path) -> None:
        write_json(file, {"value": 1})

    @classmethod
    def load(cls, file: Path) -> Result:
        return cls()


def make(folder: Path, task: str = "vqa") -> Run:
    return Run(folder, {"model": "tiny-llava", "task": task})


def test_runs_are_listed_with_state_share_and_words(tmp_path: Path) -> None:
    done = make(tmp_path / "a" / "done", "ocr")
    done.stage("heads", Result, Result)
    done.log("heads: 3 critical of 32")
    stopped = make(tmp_path / "stopped")
    stopped.stage("heads", Result, Result)
    journal = stopped.journal("masking")
    for label in ("masking", "masking log-probabilities"):
        journal.expect(label, 4)
    journal["masking/0"] = [[[1.0]]]
    journal["other"] = 1
    del done, stopped
    running = make(tmp_path / "running")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "settings.json").write_text("{")
    (tmp_path / "no-run").mkdir()
    states = {state.folder.name: state for state in run_states(tmp_path)}
    assert set(states) == {"done", "stopped", "running", "damaged"}
    about = {name: (s.state, s.task, s.stage, s.share) for name, s in states.items()}
    assert about["done"] == ("done", "ocr", "heads", None)
    assert about["stopped"] == ("stopped", "vqa", "masking", 1 / 8)
    assert about["running"][0] == "running"
    assert states["damaged"].state == "damaged" and "settings.json" in states["damaged"].said
    assert states["done"].said == "heads: 3 critical of 32" and states["done"].model == "tiny-llava"
    now = datetime.fromtimestamp(states["stopped"].seen + 7300)
    assert shown(states["stopped"], now)["last sign"] == "2 h ago"
    assert shown(states["stopped"], now)["stage"] == "masking 12%"
    assert running.folder.exists()


class Watched(dict):
    """A journal that notes the share done after each batch."""

    def __init__(self, run: Run, stage: str):
        super().__init__()
        self.journal, self.folder, self.shares = run.journal(stage), run.folder, []
        self.expect = self.journal.expect
        self.keep_tensors, self.find_tensors = self.journal.keep_tensors, self.journal.find_tensors

    def __setitem__(self, key: str, value: object) -> None:
        self.journal[key] = value
        (state,) = run_states(self.folder)
        self.shares.append(state.share)


def masked(watched: Watched) -> None:
    masking_curve(pair()[1], "vqa", examples_of("vqa", 5), [[(0, 3)]], n_controls=0, **quietly(watched))


def raced(watched: Watched) -> None:
    race = Racing(epsilon=0.1, round_size=2)
    localize_heads(pair()[1], "vqa", examples_of("vqa", 5), 2, layers="0", racing=race, **quietly(watched))


def steered(watched: Watched) -> None:
    tuning = {"learning_rates": (0.01,), "epochs": (1, 2), "draws": 2, "factors": (0.5, 2.0)}
    dev, test = (load_examples("shapes", "retrieval", split, 3) for split in ("dev", "test"))
    compare_steering(pair()[1], "retrieval", dev, test, [(1, 3)], **tuning, **quietly(watched))


def quietly(watched: Watched) -> dict[str, Any]:
    return {"batch_size": 2, "progress": False, "journal": watched}


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", [masked, raced, pytest.param(steered, marks=pytest.mark.slow)])
def test_the_share_done_rises_to_the_whole(stage: Callable[[Watched], None], tmp_path: Path) -> None:
    watched = Watched(make(tmp_path), "masking")
    stage(watched)
    assert len(watched.shares) > 2 and watched.shares == sorted(set(watched.shares))
    assert watched.shares[0] < 0.5 and watched.shares[-1] == 1


def test_the_command_prints_a_line_for_each_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "one").log("evaluate-vqa: accuracy 0.930")
    assert main(["runs", str(tmp_path), "--json", str(tmp_path / "runs.json")]) == 0
    out = capsys.readouterr().out
    assert "stopped" in out and "0.930" in out
    (row,) = json.loads((tmp_path / "runs.json").read_text())
    assert row["folder"] == str(tmp_path / "one") and row["state"] == "stopped"
    (tmp_path / "empty").mkdir()
    assert main(["runs", str(tmp_path / "empty")]) == 0
    assert "no run folders" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "missing")]) == 1
    assert "is not a folder" in capsys.readouterr().err
