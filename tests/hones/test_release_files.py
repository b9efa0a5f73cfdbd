"""HONES's own files: what its scripts write is read, and what we write has their keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.hf_task_loops import N_HEADS, N_LAYERS, pair

from hones_lens.hones.attribution.head_scores import HeadScores
from hones_lens.hones.attribution.neuron_scores import NeuronScores
from hones_lens.hones.release_files import load_heads, load_neurons, save_heads, save_neurons


def heads() -> HeadScores:
    torch.manual_seed(3)
    drops = torch.rand(N_LAYERS, N_HEADS, 5, dtype=torch.float64) - 0.4
    return HeadScores(
        task="vqa",
        metric_name="accuracy",
        intervention="replace_with_other_heads_mean",
        model_name="m",
        scores=drops.mean(-1),
        drops=drops,
        baseline=0.8,
        base_scores=torch.ones(5, dtype=torch.float64),
        example_ids=tuple("abcde"),
        kinds=("",) * 5,
        top_k=3,
    )


def cells(found: list) -> list[tuple[int, int]]:
    return [(c.layer, c.index) for c in found]


def test_heads_there_and_back(tmp_path: Path) -> None:
    _, model = pair()
    before = heads()
    save_heads(before, tmp_path / "heads.json")
    data = json.loads((tmp_path / "heads.json").read_text())
    assert data["baseline"] == {"metric": 0.8, "metric_name": "accuracy", "n": 5}
    assert len(data["all_heads"]) == N_LAYERS * N_HEADS
    assert set(data["top_heads"][0]) == set(data["all_heads"][0]) | {"rank"}
    scores = [row["score"] for row in data["all_heads"]]
    assert scores == sorted(scores, reverse=True)
    first = data["top_heads"][0]
    assert first["score"] == pytest.approx(first["baseline"] - first["intervened"])
    after = load_heads(tmp_path / "heads.json", "vqa", model)
    assert torch.allclose(after.scores, before.scores) and after.baseline == 0.8
    assert cells(after.top()) == cells(before.top())
    after.save(tmp_path / "ours.json")
    assert cells(HeadScores.load(tmp_path / "ours.json").top()) == cells(before.top())


def test_heads_of_a_file_that_lists_the_best_alone(tmp_path: Path) -> None:
    _, model = pair()
    rows = [
        {"rank": 1, "layer": 2, "head": 1, "score": 0.3},
        {"rank": 2, "layer": 0, "head": 3, "score": -0.1},
    ]
    (tmp_path / "heads.json").write_text(json.dumps({"top_heads": rows}))
    found = load_heads(tmp_path / "heads.json", "caption", model)
    assert cells(found.top()) == [(2, 1)] and found.metric_name == "BLEU-4"
    assert int((~found.scores.isnan()).sum()) == 2


def test_neurons_there_and_back(tmp_path: Path) -> None:
    _, model = pair()
    torch.manual_seed(4)
    scores = torch.rand(model.cfg.n_layers, model.cfg.d_mlp, dtype=torch.float64)
    before = NeuronScores("ocr", "hones", "m", scores, 0.1, 7)
    save_neurons(before, tmp_path / "neurons_top1pct.json")
    rows = json.loads((tmp_path / "neurons_top1pct.json").read_text())
    assert [set(row) for row in rows] == [{"rank", "layer", "neuron", "score", "global_index"}] * 6
    assert all(row["global_index"] == row["layer"] * model.cfg.d_mlp + row["neuron"] for row in rows)
    after = load_neurons(tmp_path / "neurons_top1pct.json", "ocr", model)
    assert cells(after.top()) == cells(before.top())
    after.save(tmp_path / "ours.json")
    assert cells(NeuronScores.load(tmp_path / "ours.json").top()) == cells(before.top())


@pytest.mark.parametrize("key", [None, "selected_neurons", "neurons", "groups"])
def test_neurons_in_each_shape_that_hones_reads(key: str | None, tmp_path: Path) -> None:
    _, model = pair()
    rows = [{"layer": 1, "neuron": 9}, {"layer": 0, "neuron": 2}]
    data = rows if key is None else {key: {"VQA+OCR": rows} if key == "groups" else rows}
    (tmp_path / "bank.json").write_text(json.dumps(data))
    assert cells(load_neurons(tmp_path / "bank.json", "vqa", model).top()) == [(1, 9), (0, 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no list of neurons"),
        ('{"groups": {"a": [], "b": []}}', "several groups"),
        ('[{"layer": 1}]', "row 1 has no 'layer', 'neuron'"),
        ('[{"layer": 9, "neuron": 0}]', "row 1: the model has no layer 9, neuron 0"),
        ('[{"layer": 1, "neuron": 0}, {"layer": 1, "neuron": 0}]', "row 2 repeats layer 1, neuron 0"),
    ],
)
def test_neurons_that_cannot_be_read(text: str, message: str, tmp_path: Path) -> None:
    _, model = pair()
    (tmp_path / "bank.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_neurons(tmp_path / "bank.json", "vqa", model)


def test_a_file_that_is_no_heads_file(tmp_path: Path) -> None:
    _, model = pair()
    (tmp_path / "heads.json").write_text("[]")
    with pytest.raises(ValueError, match=r"heads\.json is no heads\.json of HONES"):
        load_heads(tmp_path / "heads.json", "vqa", model)
