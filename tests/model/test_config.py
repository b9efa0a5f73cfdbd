"""Settings of known models, and the refusal of config values that would be ignored."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from hones_lens import checkpoint_path
from hones_lens.model import config
from hones_lens.model.config import all_settings, find_settings, read_settings, require, settings_folder
from hones_lens.model.families import FAMILIES, load_family

GOOD = "name: a\nfamily: llava\nhub_id: x/a\ntop_k: 3\nratio: 0.5\n"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        file = tmp_path / "a.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write


def test_a_good_file(write) -> None:
    settings = read_settings(write(GOOD + "aliases: [b, c]\n"))
    assert (settings.name, settings.family, settings.hub_id) == ("a", "llava", "x/a")
    assert (settings.top_k, settings.ratio, settings.aliases) == (3, 0.5, ("b", "c"))
    assert settings.checkpoint is None and settings.revision is None


def test_models_of_the_hub_are_pinned_to_a_commit() -> None:
    """Those whose commit is known; it must not be lost again."""
    unpinned = {
        "llava-onevision-qwen2-0.5b",
        "llava-v1.6-mistral-7b",
        "smolvlm-256m",
        "smolvlm2-500m",
        "qwen2-vl-7b",
    }
    hub = [s for s in all_settings().values() if s.hub_id and s.name not in unpinned]
    assert len(hub) == 9
    for settings in hub:
        assert re.fullmatch(r"[0-9a-f]{40}", settings.revision or ""), settings.name


def test_an_unknown_key_names_the_nearest(write) -> None:
    with pytest.raises(ValueError, match=r"a\.yaml: unknown key 'top_n'; did you mean 'top_k'\?"):
        read_settings(write(GOOD + "top_n: 3\n"))
    with pytest.raises(ValueError, match=r"unknown key 'zzzz'; valid: name, family, top_k"):
        read_settings(write(GOOD + "zzzz: 3\n"))


@pytest.mark.parametrize("key", ["name", "family", "top_k", "ratio"])
def test_a_missing_key(write, key: str) -> None:
    text = "".join(line + "\n" for line in GOOD.splitlines() if not line.startswith(key))
    with pytest.raises(ValueError, match=rf"a\.yaml: key '{key}' is missing"):
        read_settings(write(text))


@pytest.mark.parametrize("text", [GOOD + "checkpoint: a\n", GOOD.replace("hub_id: x/a\n", "")])
def test_one_source_and_no_more(write, text: str) -> None:
    with pytest.raises(ValueError, match="exactly one of 'hub_id' and 'checkpoint'"):
        read_settings(write(text))


FILES = sorted(settings_folder().glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_loads(file: Path) -> None:
    settings = read_settings(file)
    assert settings.name == file.stem
    assert settings.family in FAMILIES
    assert settings.top_k >= 1 and 0 < settings.ratio <= 1
    assert settings.paper, "where the numbers are from"
    if settings.checkpoint is not None:
        assert (checkpoint_path(settings.checkpoint) / "model.safetensors").is_file()
    for name in (settings.name, *settings.aliases, *([settings.hub_id] if settings.hub_id else [])):
        assert find_settings(name) == settings


def test_the_names_of_the_contract() -> None:
    assert {"tiny-llava", "llava-1.5-7b", "llava-1.5-13b"} <= set(all_settings())
    llava = find_settings("llava")
    assert llava is not None and llava.hub_id == "llava-hf/llava-1.5-7b-hf"
    assert (llava.top_k, llava.ratio) == (30, 0.01)
    tiny = find_settings("tiny-llava")
    assert tiny is not None and tiny.checkpoint == "tiny-llava"
    assert find_settings("lava") is None


def test_no_name_stands_for_two_models() -> None:
    names = [name for s in all_settings().values() for name in (s.name, *s.aliases)]
    assert len(names) == len(set(names))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder of the test's own."""
    folder = tmp_path / "site" / "hones_lens"
    folder.mkdir(parents=True)
    monkeypatch.setattr(config, "PACKAGE", folder)
    return folder


def test_checkpoint_path(package: Path) -> None:
    for name in ("tiny-b", "tiny-a"):
        (package / "checkpoints" / name).mkdir(parents=True)
        (package / "checkpoints" / name / "config.json").write_text("{}")
    (package / "checkpoints" / "empty").mkdir()
    assert checkpoint_path("tiny-a") == package / "checkpoints" / "tiny-a"
    for wrong in ("tiny-c", "empty"):
        message = f"no checkpoint '{wrong}' ships with hones_lens; shipped: tiny-a, tiny-b$"
        with pytest.raises(ValueError, match=message):
            checkpoint_path(wrong)


def test_settings_are_found_inside_or_beside_the_package(package: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model_configs/ is neither in .* nor beside it"):
        settings_folder()
    beside = package.parent / "model_configs"
    beside.mkdir()
    assert settings_folder() == beside
    inside = package / "model_configs"
    inside.mkdir()
    assert settings_folder() == inside


def test_require() -> None:
    known = SimpleNamespace(bias=False, kind="a")
    require("text_config", known, {"bias": (False,), "kind": ("a", "b"), "absent": (None,)})
    with pytest.raises(ValueError, match=r"text_config\.kind='a' is not handled; handled: 'b', None"):
        require("text_config", known, {"bias": (False,), "kind": ("b", None)})
    with pytest.raises(ValueError, match=r"text_config\.absent=None is not handled; handled: 1"):
        require("text_config", known, {"absent": (1,)})


def test_families() -> None:
    assert load_family("llava").family == "llava"
    with pytest.raises(ValueError, match=r"unknown model family 'mistral3'; valid: .*llava"):
        load_family("mistral3")


def test_sizes_and_bounds_of_pictures_belong_together(tmp_path):
    file = tmp_path / "m.yaml"
    file.write_text(
        "name: m\nfamily: llava\ntop_k: 3\nratio: 0.01\nhub_id: a/b\nimages: {side: 336}\n", encoding="utf-8"
    )
    with pytest.raises(ValueError, match=r"m\.yaml: 'config' and 'images' are given together"):
        read_settings(file)
