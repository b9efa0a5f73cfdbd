"""What does not fit is refused before a weight is read; `auto` is one device where that has room."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from helpers import random_llava, random_qwen
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from hones_lens import HookedVLM, checkpoint_path
from hones_lens.model import fitting, free_bytes, known_config
from hones_lens.model.fitting import Need
from hones_lens.model.saving import empty_hf_model

TINY = "tiny-llava"


def stored_bytes(folder: Path) -> int:
    return sum(w.nbytes for file in folder.glob("*.safetensors") for w in load_file(file).values())


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Free bytes by device; nothing is read from a checkpoint's weights."""
    found = {"cpu": 10**12}
    monkeypatch.setattr(fitting, "free_bytes", lambda device: found[device.type])
    return found


def refuse_to_read(*args: Any, **options: Any) -> None:
    raise AssertionError("weights are read")


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    free: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = 2 * stored_bytes(checkpoint_path(TINY))  # in float32; it is stored in 16 bits
    free["cpu"] = full * 3 // 4
    with monkeypatch.context() as patched:
        patched.setattr(AutoModelForImageTextToText, "from_pretrained", refuse_to_read)
        with pytest.raises(
            ValueError,
            match=rf"'tiny-llava' need {full / 1e6:,.1f} MB in float32, but this machine has .* free: "
            r"load them by --dtype bfloat16 .* or lay them over .* --device-map auto",
        ):
            HookedVLM.from_pretrained(TINY, "cpu")
        free["cpu"] = full // 3
        with pytest.raises(ValueError, match=r"in bfloat16, but .* free: lay them over .*--device-map auto"):
            HookedVLM.from_pretrained(TINY, "cpu", "bfloat16")
    free["cpu"] = full * 3 // 4
    assert HookedVLM.from_pretrained(TINY, "cpu", "bfloat16").cfg.dtype == torch.bfloat16


def test_a_gpu_that_is_too_small_is_named(free: dict[str, int]) -> None:
    need = Need("llava", empty_hf_model(known_config("llava")), "float16", "nowhere")
    assert need.bytes == 2 * 7_063_427_072  # as the Hub counts them
    free["cuda"] = 8 * 10**9
    with pytest.raises(
        ValueError, match=r"'llava' need 14\.1 GB in float16, but cuda:1 has 8\.0 GB free: lay"
    ):
        need.check(torch.device("cuda:1"))
    free["cuda"] = 15 * 10**9
    need.check(torch.device("cuda:1"))
    assert not need.fits(torch.device("cuda:1"))  # no room for activations
    free["cuda"] = 20 * 10**9
    assert need.fits(torch.device("cuda:1"))


@pytest.mark.parametrize("made", [random_llava, random_qwen])
def test_the_type_of_auto_is_the_checkpoints(made: Any, tmp_path: Path) -> None:
    made.make_hf(made.make_config()).bfloat16().save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    config = made.make_config()
    without = empty_hf_model(config)
    assert Need("x", without, "auto", str(tmp_path)).bytes == stored_bytes(tmp_path)
    save_file({name: weight.float() for name, weight in load_file(file).items()}, file)
    without.config.dtype = None
    assert Need("x", without, "auto", str(tmp_path)).bytes == stored_bytes(tmp_path)
    assert Need("x", without, "auto", "a/hub-id").dtype is None


def test_auto_is_one_device_where_that_has_room(
    free: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    maps: list[Any] = []
    load = AutoModelForImageTextToText.from_pretrained

    def watch(*args: Any, **options: Any) -> Any:
        maps.append(options["device_map"])
        return load(*args, **options)

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", watch)
    monkeypatch.setattr("hones_lens.model.dispatch.find_spec", lambda name: None)
    HookedVLM.from_pretrained(TINY, "auto")  # needs no accelerate
    free["cpu"] = stored_bytes(checkpoint_path(TINY))
    with pytest.raises(ImportError, match="accelerate"):
        HookedVLM.from_pretrained(TINY, "auto")
    monkeypatch.undo()
    monkeypatch.setattr(fitting, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", watch)
    HookedVLM.from_pretrained(TINY, device_map="auto")
    assert maps == [None, "auto"]


def test_free_bytes_count_the_files_that_the_system_keeps_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    cpu = torch.device("cpu")
    assert abs(free_bytes(cpu) - available) < 0.1 * psutil.virtual_memory().total
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=7, free=1))
    assert free_bytes(cpu) == 7
