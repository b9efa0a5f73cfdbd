"""Random checkpoints with the counts, and of the size, of those that the package is for."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import real_size

from hones_lens.hones import HeadScores, HeldOutHeads, NeuronScores

SHAPES = {"llava": (32, 32, 11008), "qwen": (28, 28, 18944)}
IMAGE_TOKENS = {"llava": 576, "qwen": 1024}
WEIGHTS_GB = 14.13


def shown(usages) -> dict[str, real_size.Usage]:
    """The stages by name, each printed as it comes."""
    found = {}
    for usage in usages:
        print(usage.row(), flush=True)
        found[usage.stage] = usage
    return found


@pytest.mark.by_hand
@pytest.mark.true_counts
@pytest.mark.parametrize("kind", SHAPES)
def test_every_stage_at_true_counts(kind: str, tmp_path: Path) -> None:
    found = shown(real_size.true_counts(kind, tmp_path))
    layers, n_heads, d_mlp = SHAPES[kind]
    assert f"{IMAGE_TOKENS[kind]} image tokens" in found["answers of 3 pictures"].said
    heads = HeadScores.load(tmp_path / "run" / "heads.json")
    assert tuple(heads.scores.shape) == (layers, n_heads) and int(heads.asked.sum()) == 2 * n_heads
    assert heads.baseline == 1.0 and {c[:2] for c in heads.top()} == set(real_size.planted(kind))
    held_out = HeldOutHeads.load(tmp_path / "run" / "heads-held-out.json")
    assert len(held_out.example_ids) == 2 and held_out.mean_drop.value > max(held_out.random)
    neurons = NeuronScores.load(tmp_path / "run" / "neurons.json")
    assert tuple(neurons.scores.shape) == (layers, d_mlp) and float(neurons.scores.nan_to_num(0).max()) > 0
    assert found["rankings"].said.count(f"({layers}, {d_mlp})") == len(real_size.RANKINGS)
    masked = json.loads((tmp_path / "run" / "masking.json").read_text(encoding="utf-8"))
    assert len(masked["results"]) == 5
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert report.count("<svg") > 5 and f"{layers * n_heads:,}" in report
    page = (tmp_path / "explorer.html").read_text(encoding="utf-8")
    assert len(page) < 2e6
    (data,) = re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)
    kept = json.loads(data)["kept"]
    assert not kept["attention"] and len(kept["head"]) > 50
    assert max(usage.peak_gb for usage in found.values()) < 8


@pytest.mark.true_size
def test_llava_of_true_size(tmp_path: Path) -> None:
    try:
        found = shown(real_size.true_size(tmp_path))
    finally:
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
    assert found["checkpoint"].peak_gb < 4  # a shard of 2 GB, not two
    # The weights once, and no copy of them: a second would be at 28 GB.
    for stage in ("the answer of a picture", "two heads", "neurons, flow, lenses", "check --quick"):
        assert WEIGHTS_GB < found[stage].peak_gb < 1.5 * WEIGHTS_GB, stage
    heads = HeadScores.load(tmp_path / "run" / "heads.json")
    assert int(heads.asked.sum()) == 2 and heads.baseline == 1.0 and len(heads.top()) == 1
    assert NeuronScores.load(tmp_path / "run" / "neurons.json").count() > 0
    assert found["resumed"].written_mb < 0.01
    assert "FAIL" not in found["check --quick"].said
