"""A damaged file of a checkpoint, whatever the damage, is one line that names the file or the checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hones_lens.app.cli import main
from hones_lens.model.config import checkpoint_path


def _write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def _cut(name: str, keep: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return damage


def _edit(name: str, **fields: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**data, **fields}))

    return damage


def _as_bin(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04junk")


def _index(places: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    return damage


def _deleted(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


LLAVA, QWEN = "tiny-llava", "tiny-qwen2.5-vl"
DAMAGES: dict[tuple[str, str], tuple[Callable[[Path], None], str]] = {
    (LLAVA, "config empty"): (_write("config.json", ""), "config.json is damaged: it is not JSON"),
    (LLAVA, "config cut"): (_cut("config.json", 0.5), "config.json is damaged: it is not JSON"),
    (LLAVA, "config a list"): (_write("config.json", "[1]"), "config.json is damaged: it holds a list"),
    (LLAVA, "config not UTF-8"): (_write("config.json", b"\xff\xfe{"), "config.json is damaged"),
    (LLAVA, "config too deep"): (_write("config.json", "[" * 100_000), "config.json is damaged"),
    (LLAVA, "config of no family"): (_edit("config.json", model_type="nope"), "nope"),
    (LLAVA, "config of odd values"): (_edit("config.json", text_config=[1]), "checkpoint"),
    (LLAVA, "config without image"): (_edit("config.json", vision_config=None), "checkpoint|weight"),
    (LLAVA, "config of another width"): (
        _edit("config.json", text_config={"model_type": "llama", "hidden_size": "wide"}),
        "checkpoint",
    ),
    (LLAVA, "config deleted"): (_deleted("config.json"), "has no config.json"),
    (LLAVA, "generation config"): (
        _write("generation_config.json", "{"),
        "generation_config.json is damaged",
    ),
    (LLAVA, "tokenizer empty"): (_write("tokenizer.json", ""), "tokenizer.json is damaged"),
    (LLAVA, "tokenizer cut"): (_cut("tokenizer.json", 0.7), "tokenizer.json is damaged"),
    (LLAVA, "tokenizer of another shape"): (_write("tokenizer.json", '{"model": 3}'), "tokenizer"),
    (LLAVA, "tokenizer deleted"): (_deleted("tokenizer.json"), "tokenizer"),
    (LLAVA, "processor empty"): (_write("processor_config.json", ""), "processor_config.json is damaged"),
    (LLAVA, "processor a number"): (_write("processor_config.json", "3"), "processor_config.json is damaged"),
    (QWEN, "pictures cut"): (_cut("preprocessor_config.json", 0.5), "preprocessor_config.json is damaged"),
    (QWEN, "pictures of odd sizes"): (
        _edit("preprocessor_config.json", patch_size="big"),
        "the picture processor of checkpoint",
    ),
    (LLAVA, "weights empty"): (_write("model.safetensors", b""), "model.safetensors is damaged"),
    (LLAVA, "weights cut"): (_cut("model.safetensors", 0.9), "model.safetensors is damaged"),
    (LLAVA, "weights without header"): (_cut("model.safetensors", 1e-5), "model.safetensors is damaged"),
    (LLAVA, "weights of zeros"): (_write("model.safetensors", bytes(4096)), "model.safetensors is damaged"),
    (LLAVA, "weights of junk"): (_write("model.safetensors", b"\xff" * 4096), "model.safetensors is damaged"),
    (LLAVA, "weights pickled"): (_as_bin, "checkpoint|pytorch_model.bin"),
    (LLAVA, "weights deleted"): (_deleted("model.safetensors"), "has no weights"),
    (LLAVA, "index nowhere"): (_index({"a": "gone.safetensors"}), "gone.safetensors"),
    (LLAVA, "index of a list"): (_index(["a"]), "index.json is damaged: it has no weight_map"),
    (LLAVA, "index of numbers"): (_index({"a": 1}), "index.json is damaged: it has no weight_map"),
    (LLAVA, "template cut"): (_write("chat_template.jinja", "{% for m in messages %}"), "chat template"),
    (LLAVA, "template that loops"): (
        _write("chat_template.jinja", "{% for i in range(10**9) %}a{% endfor %}"),
        "chat template .*OverflowError",
    ),
    (LLAVA, "template that calls itself"): (
        _write("chat_template.jinja", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        "chat template .*RecursionError",
    ),
    (LLAVA, "template that divides by 0"): (
        _write("chat_template.jinja", "{{ 1 / 0 }}"),
        "chat template .*ZeroDivisionError",
    ),
    (LLAVA, "template not UTF-8"): (_write("chat_template.jinja", b"\xff\xfe"), "checkpoint|template"),
}


# Where each kind of file is read; the others once.
_OFTEN = (
    "config cut",
    "tokenizer cut",
    "weights empty",
    "weights cut",
    "index nowhere",
    "template that loops",
)


@pytest.mark.parametrize(
    ("model", "damage"),
    [pytest.param(*key, marks=() if key[1] in _OFTEN else pytest.mark.exhaustive) for key in DAMAGES],
)
def test_a_damaged_checkpoint_is_one_line_that_names_it(model, damage, tmp_path, capsys):
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint_path(model), folder)
    spoil, says = DAMAGES[model, damage]
    spoil(folder)
    code = main(["evaluate", "--model", str(folder), "--limit", "2", "--task", "vqa", "--device", "cpu"])
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("hones: ")]
    assert code == (2 if damage == "config deleted" else 1)  # a folder that is no model is wrong usage
    assert len(lines) == 1 and "Traceback" not in said
    assert "a fault inside the program" not in lines[0]
    assert re.search(says, lines[0]), lines[0]
