"""Every stage, from the shell, on a tiny random checkpoint of every family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.families import SHAPES, FamilyPair, family_pair
from helpers.random_llava import make_images

from hones_lens import HookedVLM
from hones_lens.app.cli import main
from hones_lens.data.examples import Example
from hones_lens.tasks import load_task

pytestmark = pytest.mark.exhaustive
QUESTION = "what color is the circle?"


def own_data(folder: Path, model: HookedVLM) -> list[str]:
    """Four pictures of noise, labelled with the model's own answers, so that heads have something to lose."""
    folder.mkdir()
    rows, sizes = [], [(40, 31), (31, 60), (64, 64), (70, 28)]
    for i, size in enumerate(sizes):
        (picture,) = make_images(1, i, size)
        picture.save(folder / f"{i}.png")
        (prompt,) = load_task("vqa").prompts(Example(str(i), picture.copy, QUESTION))
        (said,) = model.generate(model.prepare(picture, prompt), 24)
        rows.append(json.dumps({"image": f"{i}.png", "question": QUESTION, "answer": said}))
    (folder / "own.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    splits = {"discovery": ["0.png", "1.png"], "test": ["2.png", "3.png"]}
    (folder / "splits.json").write_text(json.dumps(splits))
    files = ["--dataset", "own", "--data-file", str(folder / "own.jsonl"), "--image-dir", str(folder)]
    split = f"{folder / 'splits.json'}:"
    return [*files, "--discovery-split", f"{split}discovery", "--split", f"{split}test"]


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest) -> FamilyPair:
    return family_pair(request.param)


@pytest.fixture(scope="module")
def checkpoint(pair: FamilyPair, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    pair.model.save_pretrained(folder)
    return str(folder)


def test_check_passes(checkpoint: str, capsys) -> None:
    assert main(["check", checkpoint, "--quick"]) == 0, capsys.readouterr().out


def test_every_stage_runs(pair: FamilyPair, checkpoint: str, tmp_path: Path, capsys) -> None:
    data, run, page = own_data(tmp_path / "own", pair.model), tmp_path / "run", tmp_path / "page.html"
    base = ["--model", checkpoint, *data]
    given = [*base, "--top-k", "3", "--ratio", "0.1", "--out", str(run)]
    assert main(["mask", *given, "--controls", "2"]) == 0
    assert main(["report", str(run)]) == 0
    heads = json.loads((run / "heads.json").read_text(encoding="utf-8"))
    assert len(heads["scores"]) == pair.model.cfg.n_layers and max(map(max, heads["scores"])) > 0
    own = ["--model", checkpoint, *data[:6]]
    patched = ["--split", "all", "--limit", "1", "--corrupt", "blank", "--force", "--out"]
    assert main(["patch", *own, *patched, str(tmp_path / "patch")]) == 0
    assert main(["explore", "--model", checkpoint, "--out", str(page)]) == 0
    assert page.stat().st_size > 10_000
