"""All stages on two tasks: each file and table against the stage run by itself, resumed after a kill."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from helpers.dataset_files import hones_path

from hones_lens import HookedVLM, load_examples
from hones_lens.app.report.reproduction import Reproduction
from hones_lens.app.runs.data_choice import DataChoice
from hones_lens.app.runs.reproduce import RANKINGS, reproduce
from hones_lens.hones.attribution.held_out import remeasure_heads
from hones_lens.hones.masking import evaluate_masking
from hones_lens.hones.masking_result import load_masking
from hones_lens.hones.overlap.group_masking import GroupMasking
from hones_lens.hones.overlap.lens_delta import lens_delta
from hones_lens.hones.steering.side_effects import SideEffects, side_effects
from hones_lens.results.statistics import metric_interval
from hones_lens.tasks.registry import load_task

pytestmark = pytest.mark.exhaustive  # what they share takes twenty seconds
DATA = DataChoice("shapes-shifted", n_discovery=6, n_dev=5, n_held_out=6)
STEERING = {"learning_rates": (5e-2,), "epochs": (1,), "draws": 2, "factors": (0.5, 2.0)}
OPTIONS = {"tasks": ("vqa", "ocr"), "shifted": None, "ratios": (0.02,), "n_controls": 2}


@cache
def model() -> HookedVLM:
    return HookedVLM.from_pretrained("tiny-llava")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Reproduction]]:
    folder = tmp_path_factory.mktemp("reproduced") / "r"
    yield folder, reproduce(model(), folder, DATA, steering=STEERING, **OPTIONS)


def test_stages_are_those_run_by_themselves(made):
    folder, found = made
    for task, results in found.tasks.items():
        test = DATA.test(task)
        again = remeasure_heads(model(), task, test, results.heads, progress=False)
        assert results.held_out == again
        neurons = [(layer, index) for layer, index in found.overlap.selected[task]]
        alone = evaluate_masking(model(), task, test, neurons, n_controls=2, progress=False)
        hones = results.masking["hones", 0.02]
        assert replace(alone, method="hones") == hones
        assert [result.method for result in load_masking(folder / task / "others.json")] == list(RANKINGS)
        assert {"examples.json", "flow.json"} <= {file.name for file in (folder / task).iterdir()}
        delta = lens_delta(model(), task, test, neurons, progress=False)
        assert found.lenses[task].falls == delta.falls and found.lenses[task].rises == delta.rises
    tests = {task: DATA.test(task) for task in found.tasks}
    name = "shapes-shifted"
    scales = {task: r.steering[name, name].scales() for task, r in found.tasks.items()}
    effects = side_effects(model(), tests, scales, progress=False)
    assert found.side_effects == {name: effects}
    assert SideEffects.load(folder / "across" / "side-effects-on-shapes-shifted.json") == effects
    assert GroupMasking.load(folder / "across" / "groups.json") == found.groups


def test_tables_say_n_and_intervals(made):
    folder, found = made
    said = (folder / "tables.md").read_text(encoding="utf-8")
    assert said == found.to_markdown()
    titles = re.findall(r"^## (.*)$", said, flags=re.MULTILINE)
    assert titles == [
        "Masking 2 % of the neurons: drop in % of the baseline",
        "Masking 2 % of the neurons: nats lost",
        "Steering: learned on shapes-shifted, measured on shapes-shifted",
        "Side effects on shapes-shifted: every task under the scales of every task",
        "Critical heads",
        "Neurons that tasks share",
        f"Masking each group at one size ({found.groups.size} neurons)",
        "Logit lens of vqa: baseline minus masked",
        "Logit lens of ocr: baseline minus masked",
    ]
    for part in [*said.split("\n## ")[1:6], said.split("\n## ")[7]]:
        assert re.search(r"n = 6\b", part), part
    cells = [cell for line in said.splitlines() for cell in line.split(" | ")[1:] if "." in cell]
    figures = [cell for cell in cells if re.match(r"^[-+]?\d", cell) and "discovery" not in cell]
    assert len(figures) > 40
    for cell in figures:
        stated = re.search(r"\[.*\]|worst of \d|draws: |largest of \d|, n = \d", cell)
        assert stated, f"neither interval nor number of draws: {cell}"


def test_masking_table_is_relative_to_the_baseline(made):
    _, found = made
    for task, results in found.tasks.items():
        frame = found.masking_table(0.02).set_index("method")[task]
        hones = results.masking["hones", 0.02]
        drop, low, high = (float(x) for x in re.findall(r"-?[\d.]+", frame["hones"])[:3])
        assert drop == pytest.approx(100 * hones.drop / hones.baseline, rel=5e-3, abs=1e-9)
        assert low == pytest.approx(hones.relative_interval.low, rel=5e-3, abs=1e-9)
        assert high == pytest.approx(hones.relative_interval.high, rel=5e-3, abs=1e-9)
        assert frame["hones"].endswith(f"p = {hones.metric_p:.2g}, {hones.beats('metric')}/2")
        others = [r for (name, _), r in results.masking.items() if name != "hones"]
        assert len(others) == len(RANKINGS) and all(len(r.controls) == 5 for r in others)
        direct = results.masking["direct", 0.02]
        assert frame["direct"].endswith(f", {direct.beats('metric')}/5")
        lost = [100 * (hones.baseline - c.metric) / hones.baseline for c in hones.controls]
        assert frame["matched random"] == f"{np.mean(lost):.3g} (worst of 2: {max(lost):.3g})"
        nats = found.masking_table(0.02, "log_prob").set_index("method")[task]
        assert nats["direct"].startswith(f"{results.masking['direct', 0.02].log_prob_drop:.3g} [")
        assert "baseline" in frame and "baseline" not in nats


def test_steering_table_says_the_base_with_its_interval(made):
    _, found = made
    name = "shapes-shifted"
    for task, results in found.tasks.items():
        table = results.steering[name, name]
        column = found.steering_table(name, name).set_index("method")[task]
        base = metric_interval(load_task(task), np.array(table.row("Base").statistics))
        assert column["Base"] == f"{base.value:.3f} [{base.low:.3f}, {base.high:.3f}]"
        gains = [table.row("RandNeuron", draw).gain.value for draw in range(2)]
        assert f"2 draws: {min(gains):+.3f} to {max(gains):+.3f}" in column["RandNeuron"]
        assert column["HONES"].endswith(f"p = {table.row('HONES').p:.2g}")
        steered = metric_interval(load_task(task), np.array(table.row("HONES").statistics))
        assert column["HONES"].startswith(f"{steered.value:.3f} [{steered.low:.3f}, {steered.high:.3f}], ")
        chosen = found.choices_table(name).set_index("method")[task]
        assert f"{table.row('HONES').max_abs:.3g}" in chosen["HONES"] and "lr 0.05" in chosen["HONES"]


def test_a_killed_run_gives_the_same_numbers(made, tmp_path):
    """What a kill leaves: finished files and the beginnings of journals."""
    folder, found = made
    copied = tmp_path / "r"
    unfinished = {"side-effects-on-shapes-shifted.json", "groups.json", "heads-held-out.json", "tables.md"}
    for file in folder.rglob("*"):
        if file.is_file() and file.name not in unfinished:
            target = copied / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            whole = file.read_bytes()
            cut = file.name.startswith(("side-effects", "groups", "heads-held-out"))
            target.write_bytes(whole[: 2 * len(whole) // 3] if cut else whole)
    again = reproduce(model(), copied, DATA, steering=STEERING, **OPTIONS)
    assert again.to_markdown() == found.to_markdown()


def test_a_file_with_split_files(tmp_path):
    """Each stage reads the images of its own split file, and folders and tables are called after the file."""
    written = hones_path(tmp_path / "data")
    images = [str(100 + i) for i in range(40)]
    parts = {"discovery": images[:12], "dev": images[12:24], "test": images[24:]}
    file = tmp_path / "splits.json"
    file.write_text(json.dumps(parts), encoding="utf-8")
    sizes = {"n_discovery": 3, "n_dev": 3, "n_held_out": 3}
    splits = [f"{file}:{name}" for name in parts]
    names = dict(zip(("discovery_split", "dev_split", "held_out"), splits, strict=True))
    data = DataChoice(written.dataset, image_dir=str(written.image_dir), **names, **sizes)
    found = reproduce(model(), tmp_path / "r", data, steering=STEERING, **OPTIONS)
    for task, results in found.tasks.items():
        table = results.steering["unified", "unified"]
        read = {"discovery": results.heads.example_ids, "test": results.held_out.example_ids}
        assert table.example_ids == results.held_out.example_ids
        for name, ids in read.items():
            there = load_examples(data.dataset, task, f"{file}:{name}", image_dir=data.image_dir)
            assert len(ids) == 3 and set(ids) <= {e.id for e in there}, f"{task}, {name}"
        assert (tmp_path / "r" / task / "steering" / "unified" / "steering.json").exists()
    said = (tmp_path / "r" / "tables.md").read_text(encoding="utf-8")
    assert "## Steering: learned on unified, measured on unified" in said and str(tmp_path) not in said


def test_what_is_refused(made, tmp_path):
    folder, _ = made
    with pytest.raises(ValueError, match="at least two tasks are needed, not \\['vqa'\\]"):
        reproduce(model(), tmp_path / "one", DATA, tasks=("vqa",))
    assert not (tmp_path / "one").exists()
    with pytest.raises(ValueError, match=r"tasks: .*choose another --out"):
        reproduce(model(), folder, DATA, steering=STEERING, **{**OPTIONS, "tasks": ("vqa", "caption")})
    settings = json.loads((folder / "across" / "settings.json").read_text())["settings"]
    assert settings["tasks"] == ["vqa", "ocr"]
