"""`hones runs`: what is done, what stopped, and what runs."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from hones_lens.app.cli import main
from hones_lens.app.runs.folder import Run
from hones_lens.app.runs.listing import run_states, shown
from hones_lens.results import write_json


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
    journal.expect("masking", 4)
    journal["masking/0"] = [[[1.0]]]
    journal.expect("log-probabilities", 4)
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
