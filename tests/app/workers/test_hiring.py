"""Options of workers that would do nothing are refused, and workers compare all that identifies a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from hones_lens.app.cli import main
from hones_lens.app.runs.identity import model_identity
from hones_lens.app.workers import hiring
from hones_lens.model import load_model


@pytest.mark.parametrize("options", [[], ["--workers", "2"], ["--engine", "slurm"]])
def test_parameters_of_slurm_are_for_its_jobs_alone(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["localize", "--limit", "2", "--out", str(tmp_path / "run"), "--slurm", "mem_gb=4", *options]
    assert main(command) == 2
    assert "--slurm: give --workers and --engine slurm, too" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["steer", "--engine", "ray"], "--engine: give --workers, too"),
        (["evaluate", "--worker-threads", "2"], "--worker-threads: give --workers, too"),
        (["evaluate", "--workers", "2"], "--workers: what they find is kept in a run folder"),
        (["overlap", "a", "b", "--workers", "2"], "--workers: there is nothing to measure without --mask"),
    ],
)
def test_options_of_workers_that_would_do_nothing(
    command: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    assert says in capsys.readouterr().err


def test_workers_compare_all_that_identifies_a_model() -> None:
    assert set(hiring._OF_THE_MODEL) == set(model_identity(load_model("tiny-llava", "cpu")))
