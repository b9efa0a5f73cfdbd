"""An evaluation in a run folder: it goes on where it stopped, and is one of its settings alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hones_lens.app.cli import main
from hones_lens.engine.sweep import Sweep


@pytest.mark.exhaustive
def test_a_stopped_evaluation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    few = ["evaluate", "--task", "vqa", "--limit", "34", "--json", str(tmp_path / "result.json")]
    assert main(few) == 0  # in two batches
    plain = json.loads((tmp_path / "result.json").read_text())
    sizes, predictions = [], Sweep.predictions

    def counted(self, task, batch):
        if sizes == [32]:
            raise KeyboardInterrupt
        sizes.append(len(batch.examples))
        return predictions(self, task, batch)

    monkeypatch.setattr(Sweep, "predictions", counted)
    out = tmp_path / "run"
    assert main([*few, "--out", str(out)]) == 130 and not (out / "evaluate-vqa.json").exists()
    sizes[:] = []
    assert main([*few, "--out", str(out)]) == 0 and sizes == [2], "the first batch is not run again"
    assert json.loads((tmp_path / "result.json").read_text()) == plain
    assert main([*few, "--out", str(out)]) == 0 and sizes == [2]
    assert "Run: " in capsys.readouterr().out
    assert main([*few, "--out", str(out), "--limit", "33"]) == 1
    assert "examples: " in capsys.readouterr().err
