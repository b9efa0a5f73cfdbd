from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hones_lens.app.cli import main
from hones_lens.data import load_examples
from hones_lens.hones import localize_heads
from hones_lens.model import HookedVLM, checkpoint_path, loading, model_without_weights


@pytest.fixture
def no_weights(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a plan reads no weights")

    monkeypatch.setattr(loading, "load_hf_model", refuse)


def planned(capsys, *argv: str) -> dict[str, Any]:
    """Rows and FLOP of each stage that a plan prints."""
    assert main([*argv, "--plan"]) == 0
    said = capsys.readouterr().out
    found = re.findall(r"^  ([a-z ]+): .* = ([\d,]+) rows, ([\de.+]+) FLOP", said, re.MULTILINE)
    return {name: (int(rows.replace(",", "")), float(flop)) for name, rows, flop in found} | {"said": said}


@pytest.mark.usefixtures("no_weights")
def test_a_known_model_is_planned_without_its_weights(capsys):
    base = ["localize", "--model", "llava", "--task", "vqa", "--limit", "2"]
    whole = planned(capsys, *base)
    assert whole["heads"][0] == 1024 * 2 and "14.10 GB of weights" in whole["said"]
    # Over the prompt a head's row costs all layers above it: half of a forward pass of 7 billion weights.
    one_pass = 2 * 6.6e9 * (576 + 60)
    assert 0.9 < whole["heads"][1] / (2048 * one_pass / 2) < 1.4
    some = planned(capsys, *base, "--layers", "10-12", "--gpu", "a100", "--gpus", "4")
    assert some["heads"][0] == 96 * 2 and some["neurons"][0] == whole["neurons"][0]
    assert some["neurons"][1] == pytest.approx(whole["neurons"][1] * 13 / 32, rel=0.1)
    assert "a100, 40% of its 312" in some["said"] and "on 4 that share the examples" in some["said"]


@pytest.mark.usefixtures("no_weights")
def test_time_is_operations_by_throughput(capsys):
    argv = ["localize", "--model", "qwen", "--task", "retrieval", "--limit", "1", "--stage", "heads"]
    found = planned(capsys, *argv, "--throughput", ".05", "--gpus", "2")
    hours = (found["heads"][1] + found["held out"][1]) / 5e10 / 3600
    one, two = (float(h) for h in re.findall(r"([\d.]+) h on", found["said"]))
    assert one == pytest.approx(hours, rel=0.05) and two == pytest.approx(hours / 2, rel=0.05)


@pytest.mark.usefixtures("no_weights")
def test_a_folder_is_planned_without_its_weights(capsys):
    folder = str(checkpoint_path("tiny-qwen2.5-vl"))
    argv = ["mask", "--model", folder, "--limit", "1", "--gpu", "h200", "--mfu", "0.5"]
    assert "50% of its 989" in planned(capsys, *argv)["said"]
    assert all(p.is_meta for p in model_without_weights(folder).parameters())


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--gpu", "h1000"], 2, "h100"),
        (["--model", "llava-1.5-7"], 2, "did you mean 'llava-1.5-7b'"),
        (["--model", "org/unknown"], 1, "unknown model 'org/unknown'"),
    ],
)
def test_what_is_not_known_is_refused(options, code, message, capsys):
    assert main(["localize", "--model", "llava", "--limit", "1", "--plan", *options]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--gpus=0", "--mfu=1.5", "--mfu=0", "--throughput=-1", "--throughput=nan"]
)
def test_numbers_out_of_range_are_wrong_usage(option):
    with pytest.raises(SystemExit) as stop:
        main(["localize", "--plan", option])
    assert stop.value.code == 2


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_a_plan_is_an_upper_bound_of_what_runs(task, capsys):
    argv = ["localize", "--model", "tiny-llava", "--task", task, "--limit", "1", "--heads", "L0H1,L1H0,L3H2"]
    flop = planned(capsys, *argv, "--top-k", "1", "--throughput", "1", "--stage", "heads")["heads"][1]
    model, examples = HookedVLM.from_pretrained("tiny-llava"), load_examples("shapes", task, "discovery", 1)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        localize_heads(model, task, examples, 1, heads="L0H1,L1H0,L3H2", progress=False)
    assert counter.get_total_flops() < flop < 2 * counter.get_total_flops()
