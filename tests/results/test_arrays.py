"""Large results: arrays in safetensors beside a small JSON, checked when they are read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import example_results

from hones_lens.hones import HeadScores, NeuronScores
from hones_lens.results import Labelled


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
