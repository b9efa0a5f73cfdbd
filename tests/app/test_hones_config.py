"""HONES's own configuration files, with the keys and values of its release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from hones_lens.app.hones_config import is_hones_config, read_options as read_settings

# The keys of `configs/llava_hones.yaml`; Qwen's has two more in `model`.
LLAVA = {
    "model": {
        "name": "llava",
        "model_id": "llava-hf/llava-1.5-7b-hf",
        "dtype": "auto",
        "device_map": "auto",
    },
    "data": {
        "data_file": "data/merged.json",
        "image_dir": "data/original_images",
        "discovery_split": "data/splits/discovery.json",
        "test_split": "data/splits/test.json",
        "dev_split": "data/splits/development.json",
        "discovery_limit": 5000,
        "eval_limit": 3000,
        "seed": 3407,
        "datasets": {
            "coco": {
                "name": "coco",
                "data_file": "data/merged.json",
                "image_dir": "data/original_images",
                "dev_split": "data/splits/development.json",
                "test_split": "data/splits/test.json",
            },
            "gqa": {
                "name": "gqa",
                "data_file": "data/ood/gqa/questions.json",
                "image_dir": "data/ood/gqa/images",
            },
        },
    },
    "run": {
        "task": "vqa",
        "output_dir": "artifacts/llava/vqa",
        "top_k_heads": 30,
        "top_neuron_ratio": 0.01,
        "max_new_tokens": 24,
        "retrieval_negatives": 49,
        "ndcg_k": 5,
    },
    "steering": {
        "dataset": "coco",
        "output_dir": "artifacts/llava/vqa/steering/coco",
        "dev_limit": 2000,
        "test_limit": 3000,
        "bank_topk": None,
        "methods": ["fixed_amp", "grid_search", "HONES_no_kl", "HONES", "rand_neuron"],
        "always_eval_base": True,
        "fixed_amp": 2.0,
        "grid_amps": [0.5, 0.75, 1.0, 1.25, 1.5, 2.0],
        "epochs": 2,
        "lr": 5.0e-4,
        "grad_accum_steps": 4,
        "l2_weight": 1.0e-5,
        "clamp": 1.5,
    },
}


def read_options(*args: Any, **options: Any) -> dict[str, Any]:
    """The values alone."""
    return {name: setting.value for name, setting in read_settings(*args, **options).items()}


def test_localization(tmp_path: Path) -> None:
    assert is_hones_config(LLAVA) and not is_hones_config({"task": "vqa", "model": "tiny-llava"})
    found = read_options(LLAVA, tmp_path / "configs" / "llava_hones.yaml")
    assert found["model"] == "llava-hf/llava-1.5-7b-hf" and "dtype" not in found
    assert (found["task"], found["top_k"], found["ratio"], found["seed"]) == ("vqa", 30, 0.01, 3407)
    assert found["device_map"] == "auto"
    assert found["dataset"] == "coco" and found["data_file"] == str(tmp_path / "data/merged.json")
    assert found["discovery_split"] == str(tmp_path / "data/splits/discovery.json")
    assert (found["discovery_limit"], found["limit"]) == (5000, 3000)
    assert found["outputs"] == (str(tmp_path / "artifacts/llava/vqa"), "vqa")


def test_paths_start_beside_a_file_that_is_in_no_configs_folder(tmp_path: Path) -> None:
    found = read_options(LLAVA, tmp_path / "mine.yaml")
    assert found["image_dir"] == str(tmp_path / "data/original_images")


def test_steering(tmp_path: Path) -> None:
    file = tmp_path / "configs" / "x.yaml"
    found = read_options(LLAVA, file, "coco", steers=True)
    assert found["lr"] == 5e-4 and found["epochs"] == 2 and found["accumulate"] == 4
    assert found["split"] == str(tmp_path / "data/splits/test.json")
    assert (found["dev_limit"], found["limit"]) == (2000, 3000)
    other = read_options(LLAVA, file, "gqa", steers=True)
    assert other["data_file"] == str(tmp_path / "data/ood/gqa/questions.json")
    assert "split" not in other and "dev_split" not in other and "discovery_split" not in other


def changed(section: str, key: str, value: object) -> dict:
    data = yaml.safe_load(yaml.safe_dump(LLAVA))
    data[section][key] = value
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed("run", "top_k_head", 3), "unknown key run.top_k_head; did you mean 'top_k_heads'"),
        (changed("steering", "grid_amp", []), "unknown key steering.grid_amp; did you mean 'grid_amps'"),
        ({**LLAVA, "modle": {}}, "unknown section 'modle'; did you mean 'model'"),
        (changed("run", "max_new_tokens", 30), "run.max_new_tokens is 30; every stage here takes 24"),
        (changed("run", "ndcg_k", 10), "run.ndcg_k is 10"),
        (changed("model", "dtype", "int4"), "model.dtype is 'int4'; valid: auto"),
        (changed("data", "image_dir", 5), "data.image_dir is 5, which is no path"),
        (changed("data", "datasets", [1]), r"data.datasets is \[1\], and not keys with their values"),
        (changed("data", "datasets", {"coco": "x"}), "data.datasets.coco is 'x', and not keys"),
        ({**LLAVA, "run": 3}, "run is 3, and not keys with their values"),
    ],
)
def test_what_cannot_be_taken(data: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as found:
        read_options(data, tmp_path / "c.yaml")
    assert "c.yaml" in str(found.value)


def test_a_data_set_that_the_file_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.datasets has no 'textvqa'; it has: coco, gqa"):
        read_options(LLAVA, tmp_path / "c.yaml", "textvqa")
