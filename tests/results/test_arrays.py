"""Large results: arrays in safetensors beside a small JSON, checked when they are read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import example_comparisons, example_results

from hones_lens.hones import (
    HeadScores,
    MaskingResult,
    NeuronScales,
    NeuronScores,
    SteeringTable,
    load_masking,
    save_masking,
)
from hones_lens.results import Labelled, to_json


def large_heads() -> HeadScores:
    small, n = example_results.heads(), 4000
    shape = (*small.scores.shape, n)
    drops = torch.rand(shape, dtype=torch.float64)
    drops[0, 0, 0] = torch.nan
    ids = tuple(str(i) for i in range(n))
    return replace(small, drops=drops, base_scores=torch.rand(n), example_ids=ids, kinds=("",) * n)


def test_drops_go_into_a_file_beside(tmp_path: Path) -> None:
    before, file = large_heads(), tmp_path / "heads.json"
    before.save(file)
    arrays = tmp_path / "heads.arrays.safetensors"
    assert file.stat().st_size < 200_000 and arrays.stat().st_size >= before.drops.numel() * 8
    assert isinstance(json.loads(file.read_text())["scores"], list)  # small: inside
    after = HeadScores.load(file)
    assert torch.equal(after.drops.nan_to_num(9), before.drops.nan_to_num(9)) and after.top() == before.top()
    assert HeadScores.from_dict(before.to_dict()).drops.shape == before.drops.shape


def test_small_results_stay_in_the_json(tmp_path: Path) -> None:
    example_results.heads().save(tmp_path / "heads.json")
    assert [entry.name for entry in tmp_path.iterdir()] == ["heads.json"]
    large_heads().save(tmp_path / "heads.json")
    example_results.heads().save(tmp_path / "heads.json")  # over a large one
    assert [entry.name for entry in tmp_path.iterdir()] == ["heads.json"]


def test_a_missing_or_wrong_arrays_file_is_refused_by_name(tmp_path: Path) -> None:
    file, arrays = tmp_path / "heads.json", tmp_path / "heads.arrays.safetensors"
    large_heads().save(file)
    content = bytearray(arrays.read_bytes())
    content[-1] ^= 1
    arrays.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"heads\.arrays\.safetensors is not the file"):
        HeadScores.load(file)
    arrays.unlink()
    with pytest.raises(FileNotFoundError, match=r"heads\.arrays\.safetensors is not there"):
        HeadScores.load(file)


def test_neurons_and_labelled_values(tmp_path: Path) -> None:
    scores = torch.rand(8, 11_008, dtype=torch.float64)
    scores[3] = -torch.inf
    neurons = NeuronScores("vqa", "hones", "m", scores, 0.01, 5)
    neurons.save(tmp_path / "neurons.json")
    assert torch.equal(NeuronScores.load(tmp_path / "neurons.json").scores, scores)
    assert (tmp_path / "neurons.arrays.safetensors").stat().st_size < scores.numel() * 8 + 1000
    values = Labelled("w", torch.rand(300, 300), ("a", "b"))
    values.save(tmp_path / "patch.json")
    assert torch.equal(Labelled.load(tmp_path / "patch.json").values, values.values.double())


def long_masking(n: int) -> MaskingResult:
    drops = torch.randn(n, dtype=torch.float64).tolist()
    ids = tuple(str(i) for i in range(n))
    return replace(
        example_results.masking(0.9, -0.2), drops=tuple(drops), log_prob_drops=tuple(drops), example_ids=ids
    )


def test_drops_of_masking_go_into_a_file_beside(tmp_path: Path) -> None:
    """Five sets of neurons, 10,000 examples: 100,000 drops."""
    before, file = [long_masking(10_000) for _ in range(5)], tmp_path / "masking.json"
    save_masking(file, before)
    inside = sum(len(json.dumps(result.example_ids, indent=1)) for result in before)
    assert file.stat().st_size < inside + 300_000
    assert (tmp_path / "masking.arrays.safetensors").stat().st_size >= 100_000 * 8
    assert [to_json(result) for result in load_masking(file)] == [to_json(result) for result in before]
    (tmp_path / "masking.arrays.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"masking\.arrays\.safetensors is not there"):
        load_masking(file)
    save_masking(file, [long_masking(10)])
    assert [entry.name for entry in tmp_path.iterdir()] == ["masking.json"]


def test_many_middling_sequences_go_beside_together(tmp_path: Path) -> None:
    """Rows of steering: each has 2,000 scores, log-probabilities and statistics of two numbers."""
    table, n = example_comparisons.steering(), 2000
    values = torch.rand(n, 2, dtype=torch.float64)
    long = {"scores": tuple(values[:, 0].tolist()), "log_probs": tuple(values[:, 1].tolist())}
    long["statistics"] = tuple((a, float(b)) for a, b in values.tolist())
    rows = tuple(replace(row, **long) for row in table.rows for _ in range(2))
    before = replace(table, rows=rows, example_ids=tuple(str(i) for i in range(n)))
    before.save(tmp_path / "steering.json")
    assert (tmp_path / "steering.arrays.safetensors").exists()
    assert (tmp_path / "steering.json").stat().st_size < 300_000
    after = SteeringTable.load(tmp_path / "steering.json")
    assert after.to_dict() == before.to_dict() and after.rows[0].statistics == long["statistics"]


def test_old_files_with_all_drops_inside_still_load(tmp_path: Path) -> None:
    before, file = long_masking(70_000), tmp_path / "masking.json"
    file.write_text(json.dumps({"kind": "masking", "results": [to_json(before)]}))
    assert load_masking(file)[0].drops == before.drops


def test_whole_numbers_stay_whole(tmp_path: Path) -> None:
    neurons = tuple((layer, i) for layer in range(4) for i in range(11_000))
    NeuronScales.uniform(neurons, 2.0).save(tmp_path / "scales.json")
    assert (tmp_path / "scales.arrays.safetensors").exists()
    assert NeuronScales.load(tmp_path / "scales.json").neurons == neurons
