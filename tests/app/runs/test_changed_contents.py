"""A checkpoint, annotations or pictures changed in place: a finished run folder refuses them by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.dataset_files import hones
from PIL import Image
from safetensors.torch import load_file, save_file

from hones_lens.app.cli import main
from hones_lens.app.runs.folder import Run
from hones_lens.app.runs.identity import model_identity
from hones_lens.model.config import checkpoint_path
from hones_lens.model.loading import load_model


class Reached(Exception):
    """The run folder was opened."""


def told(argv: list[str]) -> str:
    """Why a command refuses to go on in a folder; empty if it goes on."""
    try:
        main([*argv, "--debug"])
    except Reached:
        return ""
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{argv} is done")


@pytest.fixture(autouse=True)
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*args: Any, **options: Any) -> None:
        raise Reached

    monkeypatch.setattr(Run, "stage", reached)


def edit(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Change what a JSON file of a folder holds."""

    def apply(folder: Path) -> None:
        path = folder / file
        data = json.loads(path.read_text(encoding="utf-8"))
        change(data)
        path.write_text(json.dumps(data), encoding="utf-8")

    return apply


def weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.2.mlp.down_proj.weight"))
    tensors[name][5, 7] *= 1.01
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text("{{ '\n' }}" + file.read_text(encoding="utf-8"), encoding="utf-8")


def swap_two_words(data: dict[str, Any]) -> None:
    words = data["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]


# What is changed, and the part of the model's identity that says so.
CHECKPOINT: dict[str, tuple[Callable[[Path], None], str]] = {
    "one weight": (weights, "weights"),
    "rope_theta": (
        edit("config.json", lambda c: c["text_config"]["rope_parameters"].update(rope_theta=9e3)),
        "config",
    ),
    "the norm's epsilon": (
        edit("config.json", lambda c: c["text_config"].update(rms_norm_eps=1e-5)),
        "config",
    ),
    "the layer that is read of the vision tower": (
        edit("config.json", lambda c: c.update(vision_feature_layer=-1)),
        "config",
    ),
    "two tokens": (edit("tokenizer.json", swap_two_words), "tokenizer"),
    "the chat template": (template, "chat_template"),
    "the pictures' deviation": (
        edit("processor_config.json", lambda c: c["image_processor"].update(image_std=[0.5, 0.5, 0.5])),
        "processor",
    ),
    "the pictures' resampling": (
        edit("processor_config.json", lambda c: c["image_processor"].update(resample=0)),
        "processor",
    ),
    "a repetition penalty": (
        edit("generation_config.json", lambda c: c.update(repetition_penalty=1.3)),
        "generation_config",
    ),
    "the token that ends answers": (
        edit("generation_config.json", lambda c: c.update(eos_token_id=[2, 9])),
        "generation_config",
    ),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    shutil.copytree(checkpoint_path("tiny-llava"), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.exhaustive
def test_a_checkpoint_that_is_changed_in_place_is_refused_by_its_part(
    checkpoint: Path, tmp_path: Path
) -> None:
    command = ["localize", "--model", str(checkpoint), "--limit", "2", "--out", str(tmp_path / "run")]
    assert told(command) == ""
    for what, (change, part) in CHECKPOINT.items():
        kept = {file: file.read_bytes() for file in checkpoint.iterdir()}
        change(checkpoint)
        said = told(command)
        assert "holds a run with other settings" in said and re.search(rf"\b{part}: '\w+' there", said), what
        for file, content in kept.items():
            file.write_bytes(content)
    assert told(command) == "", "the checkpoint is what it was"


def test_the_state_that_a_tokenizer_was_saved_in_changes_no_token_and_no_identity(checkpoint: Path) -> None:
    plain = load_model(str(checkpoint))
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    fixed = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None}
    fixed |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    edit("tokenizer.json", lambda t: t.update(truncation=cut, padding=fixed))(checkpoint)
    saved, used = load_model(str(checkpoint)), load_model(str(checkpoint))
    used.tokenizer.backend_tokenizer.enable_truncation(4)
    used.tokenizer.backend_tokenizer.enable_padding(length=50)
    assert used.tokenizer.backend_tokenizer.truncation["max_length"] == 4
    assert model_identity(used) == model_identity(saved) == model_identity(plain)
    image, text = Image.new("RGB", (112, 112)), "what colour is the large circle on the left, and what else?"
    ids = plain.prepare(image, text).input_ids
    for model in (saved, used):
        assert model.to_tokens(text).tolist() == plain.to_tokens(text).tolist()
        assert model.prepare(image, text).input_ids.tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("name", "value"), [("split_special_tokens", True), ("model_max_length", 9), ("padding_side", "left")]
)
def test_settings_of_a_tokenizer_outside_of_its_rules_count(name: str, value: Any) -> None:
    model = load_model("tiny-llava")
    before = model_identity(model)
    setattr(model.tokenizer, name, value)
    after = model_identity(model)
    assert {part for part in before if before[part] != after[part]} == {"tokenizer"}


def test_labels_and_pictures_that_are_changed_in_place_are_refused(tmp_path: Path) -> None:
    data = hones(tmp_path / "data")
    unified, pictures = tmp_path / "data" / "unified.json", sorted(data.image_dir.iterdir())
    files = ["--dataset", str(unified), "--image-dir", str(data.image_dir)]

    def command(task: str) -> list[str]:
        return ["localize", *files, "--task", task, "--limit", "6", "--out", str(tmp_path / task)]

    def turn(saved: dict[str, Any]) -> None:
        """Another order of the references, the same ones."""
        for record in saved["data"]:
            record["vqa"]["all_answers"].reverse()
            record["captions"].reverse()

    def picture(saved: dict[str, Any]) -> None:
        for file in pictures:
            with Image.open(file) as image:
                image.rotate(180).save(file, quality=95)

    for change in (turn, picture):
        kept = {file: file.read_bytes() for file in (unified, *pictures)}
        for task in ("vqa", "caption"):
            assert told(command(task)) == ""
        edit("unified.json", change)(unified.parent)
        for task in ("vqa", "caption"):
            said = told(command(task))
            assert "other settings" in said and "discovery: " in said and "test: " in said, (task, change)
        for file, content in kept.items():
            file.write_bytes(content)
