"""Every file of a run folder, damaged in every way: refused by its name wherever it is read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import example_comparisons as compared, example_results as made

from hones_lens.app.cli import main
from hones_lens.app.report.run_files import verified
from hones_lens.app.runs.folder import Run, save_picture
from hones_lens.app.runs.stages import MaskingResults
from hones_lens.app.runs.views import save_examples
from hones_lens.engine.evaluation import Evaluation
from hones_lens.hones.attribution.head_scores import HeadScores
from hones_lens.hones.attribution.held_out import HeldOutHeads
from hones_lens.hones.attribution.neuron_scores import NeuronScores
from hones_lens.hones.overlap.group_masking import GroupMasking
from hones_lens.hones.overlap.groups import Overlap
from hones_lens.hones.release_files import save_heads, save_neurons
from hones_lens.hones.steering.side_effects import SideEffects
from hones_lens.hones.steering.table import SteeringTable
from hones_lens.results.files import write_json
from hones_lens.results.labelled import Labelled

NAMES = "kind image prompt answer foil corrupted_image corrupted_prompt corrupt strength color corrupt_box"


def settings(seed: int) -> dict[str, object]:
    patch = {"what": "z", "by": "group", "direction": "denoise", "metric": "logit_diff", "raw": False}
    common = {"model": "tiny-llava", "task": "vqa", "dataset": "shapes", "seed": seed}
    return {**dict.fromkeys(NAMES.split()), **common, "patch": patch}


def many_heads(seed: int) -> HeadScores:
    """Scores with more drops than go into the JSON."""
    heads = made.heads()
    drops = torch.rand(*heads.scores.shape, 3000, generator=torch.Generator().manual_seed(seed))
    changes = {"drops": drops.double(), "example_ids": tuple(map(str, range(3000))), "kinds": ("",) * 3000}
    return replace(heads, **changes, base_scores=torch.ones(3000, dtype=torch.float64))


def fill(run: Run, seed: int) -> None:
    """Every stage of every command, finished."""

    def localized() -> HeadScores:
        heads = many_heads(seed)
        save_heads(heads, run.path("hones/heads.json"))
        return heads

    def attributed() -> NeuronScores:
        save_neurons(made.neurons(), run.path("hones/neurons_top1pct.json"))
        return made.neurons()

    run.journal("heads")["heads/0"] = [[[0.5]]]
    run.stage("heads", HeadScores, localized, beside=["hones/heads.json"])
    run.stage("heads-held-out", HeldOutHeads, compared.held_out)
    run.stage("neurons", NeuronScores, attributed, beside=["hones/neurons_top1pct.json"])
    run.stage("masking", MaskingResults, lambda: MaskingResults(made.curve()))
    run.stage("others", MaskingResults, lambda: MaskingResults([made.masking(0.9, -0.3, method="direct")]))
    run.stage("evaluate-vqa", Evaluation, compared.evaluation)
    run.stage("overlap", Overlap, compared.shared)
    run.stage("groups", GroupMasking, compared.groups)
    run.stage("side-effects-on-shapes", SideEffects, compared.effects)
    run.stage("lens", type(compared.lens()), compared.lens)
    run.stage("patch", Labelled, lambda: Labelled("x", torch.ones(2), ("layer",), n=1 + seed))
    run.files("examples", lambda: save_examples(run, [made.example()]))
    run.files("promoted", lambda: [written(run, "promoted", neurons=[[3, 7, ["dax"], 0.5 + seed]])])
    answers = {"clean": f"red {seed}", "corrupted": "blue", "text": "t"}
    run.record("answers", [written(run, "patch-answers", "answers.json", **answers)])
    left_out = {"dev": [{"example": f"e{seed}", "reason": "cut"}]}
    run.record("left-out", [written(run, "left out", "left-out.json", splits=left_out)])
    run.files("pair", lambda: first_pair(run, seed))


def written(run: Run, kind: str, name: str = "", **data: object) -> Path:
    file = run.path(name or f"{kind}.json")
    write_json(file, {"kind": kind, **data})
    return file


def first_pair(run: Run, seed: int) -> list[Path]:
    picture = save_picture(made.image((24, 20 + seed)), run.path("pair-clean.png"))
    pair = {"clean": "pair-clean.png", "corrupted": None, "id": f"p{seed}", "layouts": []}
    pair |= {"prompt": "p", "answer": "red", "foil": None, "image_mask": "0110", "grids": [[1, 2]]}
    regions = [[2.0, 0.0, 22.0, 20.0]]
    return [picture, written(run, "patch-pair", "pair.json", **pair, regions=regions)]


def fill_steering(run: Run, n: int) -> None:
    def steered() -> SteeringTable:
        compared.scales().save_hones(run.path("neuron_scales.json"))
        return compared.steering(n=n)

    run.stage("steering", SteeringTable, steered, beside=["neuron_scales.json"])
    run.stage("on-gqa", SteeringTable, lambda: compared.steering(n=n + 1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of the same commands, which are two runs all the same."""
    both = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp(f"run{seed}") / "run"
        fill(Run(folder, settings(seed)), seed)
        fill_steering(Run(folder / "steering" / "shapes", settings(seed)), 50 + seed)
        both.append(folder)
    return both[0], both[1]


def one_byte(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def other_type(content: bytes) -> bytes:
    """The first field that is not the kind as another type of value."""
    data = json.loads(content)
    rows = data if isinstance(data, dict) else data[0]
    name = next(name for name in rows if name not in ("kind", "format"))
    rows[name] = 17 if isinstance(rows[name], (str, list, dict)) else "seventeen"
    return json.dumps(data).encode()


def with_nan(content: bytes) -> bytes:
    """The first number as NaN."""
    text = content.decode()
    number = next(i for i, c in enumerate(text) if c.isdigit() and text[i - 1] in " [")
    return f"{text[:number]}NaN{text[number + 1 :].lstrip('0123456789.')}".encode()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "one byte": one_byte,
    "another type": other_type,
    "NaN": with_nan,
    "no text": lambda content: b"\xff\x00" * 20,
}
SHOWN = (
    "settings.json stages.json heads.json heads.arrays.safetensors neurons.json masking.json others.json "
    "heads-held-out.json promoted.json examples.json example-0.png evaluate-vqa.json overlap.json "
    "groups.json side-effects-on-shapes.json lens.json patch.json pair.json pair-clean.png answers.json "
    "steering/shapes/settings.json steering/shapes/stages.json steering/shapes/steering.json "
    "steering/shapes/on-gqa.json"
).split()
BINARY = (".png", ".safetensors")
CASES = [
    (name, how)
    for name in SHOWN
    for how in [*DAMAGES, "another run's", "deleted"]
    if not (name.endswith(BINARY) and how in ("another type", "NaN", "no text"))
    and not (
        name.endswith("stages.json") and how in ("one byte", "NaN", "deleted")
    )  # named by what they lose
    and not (name.endswith("settings.json") and how in ("NaN", "deleted"))  # it has no number; no run folder
]


def damaged(folders: tuple[Path, Path], name: str, how: str, to: Path) -> Path:
    """A copy of the first run, with a damaged file."""
    folder = to / "run"
    shutil.copytree(folders[0], folder)
    file = folder / name
    if how == "deleted":
        file.unlink()
    else:
        before = file.read_bytes()
        content = (folders[1] / name).read_bytes() if how == "another run's" else DAMAGES[how](before)
        if content == before:  # what two runs have in common is the same file
            content = before + b"\n"
        file.write_bytes(content)
    return folder


def mostly_exhaustive(cases: list[tuple[str, str]], every: int) -> list[object]:
    """All cases, of which every so many are run by `make test`."""
    marks = [() if i % every == 0 else pytest.mark.exhaustive for i in range(len(cases))]
    return [pytest.param(*case, marks=mark) for case, mark in zip(cases, marks, strict=True)]


@pytest.mark.parametrize(("name", "how"), mostly_exhaustive(CASES, 5))
def test_a_report_refuses_a_damaged_file_by_name(folders, name, how, tmp_path, capsys):
    folder = damaged(folders, name, how, tmp_path)
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 1
    said = capsys.readouterr().err
    if name.endswith("settings.json") and how == "another run's":
        name = name.replace("settings.json", "stages.json")  # these are not its marks
    assert said.startswith(f"hones: {folder / name}"), said
    assert said.count("\n") == 1 and "fault" not in said and not (tmp_path / "page.html").exists()


RECORDED = [name for name in SHOWN if not name.endswith(("settings.json", "stages.json", "answers.json"))]
RECORDED += ["hones/heads.json", "hones/neurons_top1pct.json", "steering/shapes/neuron_scales.json"]


ON_RESUME = [(name, how) for name in RECORDED for how in ("empty", "one byte", "another run's")]


@pytest.mark.parametrize(("name", "how"), mostly_exhaustive(ON_RESUME, 7))
def test_a_run_that_goes_on_refuses_a_damaged_file_by_name(folders, name, how, tmp_path):
    folder = damaged(folders, name, how, tmp_path)
    with pytest.raises(ValueError, match=re.escape(str(folder / name))):
        fill(Run(folder, settings(0)), 0)
        fill_steering(Run(folder / "steering" / "shapes", settings(0)), 50)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [*RECORDED, "answers.json", "left-out.json"])
def test_a_run_that_goes_on_writes_a_deleted_file_again(folders, name, tmp_path):
    folder = damaged(folders, name, "deleted", tmp_path)
    if name == "heads.arrays.safetensors":  # it goes with its JSON file
        (folder / "heads.json").unlink()
    fill(Run(folder, settings(0)), 0)
    fill_steering(Run(folder / "steering" / "shapes", settings(0)), 50)
    assert (folder / name).read_bytes() == (folders[0] / name).read_bytes()


@pytest.mark.parametrize("how", ["one byte", pytest.param("NaN", marks=pytest.mark.exhaustive)])
def test_what_reads_one_file_of_a_run_refuses_it_by_name(folders, how, tmp_path, capsys):
    folder = damaged(folders, "neurons.json", how, tmp_path / "a")
    assert main(["overlap", str(folder), str(folders[1]), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith(f"hones: {folder}/neurons.json was changed or damaged")
    folder = damaged(folders, "heads.json", how, tmp_path / "b")
    assert main(["explore", "--run", str(folder), "--out", str(tmp_path / "page.html")]) == 1
    assert capsys.readouterr().err.startswith(f"hones: {folder}/heads.json was changed or damaged")


def test_files_for_steering_are_of_a_run_or_of_their_own(folders, tmp_path):
    folder = damaged(folders, "neurons.json", "one byte", tmp_path)
    for name in ("neurons.json", "hones/../neurons.json"):
        with pytest.raises(ValueError, match=r"neurons\.json was changed or damaged"):
            verified(folder / name)
    with pytest.raises(ValueError, match=r"copied\.json is not one that this run finished"):
        verified(shutil.copy(folders[1] / "hones" / "neurons_top1pct.json", folder / "hones" / "copied.json"))
    own = shutil.copy(folder / "neurons.json", tmp_path / "own.json")
    assert verified(own) == Path(own)
    with pytest.raises(FileNotFoundError, match="absent"):
        verified(tmp_path / "absent.json")


@pytest.mark.exhaustive
def test_the_undamaged_folder_is_shown(folders, tmp_path):
    assert main(["report", str(folders[0]), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "vqa: accuracy" in page, "the evaluation"
    assert "learned on shapes, measured on gqa" in page
