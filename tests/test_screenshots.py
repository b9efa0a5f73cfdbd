"""The README's picture of a report: what Chromium draws of a run folder, small enough, and one command."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import example_results as made
from PIL import Image

from docs import screenshots
from hones_lens.app.runs.folder import Run
from hones_lens.hones.masking_result import save_masking


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = Run(tmp_path / "run", {"model": "tiny-llava", "task": "vqa"})
    neurons, masking = run.path("neurons.json"), run.path("masking.json")
    made.neurons().save(neurons)
    save_masking(masking, made.curve())
    run.record("neurons", [neurons])
    run.record("masking", [masking])
    return run.folder


@pytest.mark.exhaustive
@pytest.mark.browser
def test_the_top_of_the_report_is_taken(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("playwright")
    (file,) = screenshots.shoot_report(folder, tmp_path / "images")
    assert file == tmp_path / "images" / "report.png" and file.stat().st_size <= 300_000
    with Image.open(file) as picture:
        assert picture.size == screenshots.REPORT_SHOTS["report"][:2]
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels[2, 2].tolist() == [0xF4, 0xF6, 0xF8], "the page's ground, in the light"
    assert (pixels.reshape(-1, 3) == [0x00, 0x72, 0xB2]).all(-1).sum() > 500, "a figure's bars"


def test_both_kinds_are_made_by_one_command_and_large_ones_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def shot(name: str):
        def shoot(source: object, out: Path) -> list[Path]:
            out.mkdir(exist_ok=True)
            (out / name).write_bytes(b"x" * 1000)
            return [out / name]

        return shoot

    monkeypatch.setattr(screenshots, "load_model", lambda name: name)
    monkeypatch.setattr(screenshots, "shoot_explorer", shot("explorer.png"))
    monkeypatch.setattr(screenshots, "shoot_report", shot("report.png"))
    argv = ["--out", str(tmp_path / "images"), "--run", str(folder)]
    assert screenshots.main(argv) == 0
    said = capsys.readouterr().out
    assert "explorer.png: 1,000 bytes" in said and "report.png: 1,000 bytes" in said
    monkeypatch.setattr(screenshots, "MOST_BYTES", 999)
    with pytest.raises(RuntimeError, match=r"explorer\.png has 1,000 bytes, more than 999"):
        screenshots.main(argv)


def test_the_demo_is_run_where_there_is_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append(command))
    assert screenshots.demo_run(folder) == folder and not asked
    assert screenshots.demo_run(tmp_path / "new") == tmp_path / "new"
    assert asked[0][1:] == ["-m", "hones_lens.app.cli", "demo", "--out", str(tmp_path / "new")]
