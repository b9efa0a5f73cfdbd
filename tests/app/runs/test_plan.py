from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hones_lens.analysis import patch_activations
from hones_lens.app import DataChoice, Machines, plan
from hones_lens.app.cli import main
from hones_lens.app.runs.patch import PairsChoice
from hones_lens.app.runs.plan_patching import plan_patching
from hones_lens.data import load_examples
from hones_lens.hones import localize_heads
from hones_lens.model import HookedVLM, checkpoint_path, loading, model_without_weights
from hones_lens.tasks import load_task


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


@pytest.mark.slow
@pytest.mark.usefixtures("no_weights")
def test_a_plan_in_python_is_that_of_the_command(capsys):
    argv = ["mask", "--model", "llava", "--limit", "2", "--gpu", "a100", "--gpus", "2", "--controls", "3"]
    said = planned(capsys, *argv, "--layers", "10-12", "--memory-budget", "2")["said"]
    data, machines = DataChoice(n_discovery=2, n_held_out=2), Machines.of_gpus("a100", 2)
    stages = ("heads", "held out", "neurons", "masking")
    lines = plan("llava", "vqa", data, stages, machines, controls=3, layers="10-12", memory_budget=2)
    assert said == "\n".join(lines) + "\n"
    assert plan("llava", load_task("vqa"), data, stages)[0].endswith(
        "h100, 40% of its 989 dense bf16 TFLOP/s assumed"
    )
    with pytest.raises(ValueError, match="did you mean 'masking'"):
        plan("llava", "vqa", data, ["maskng"])


def test_a_plan_is_also_written_to_a_file(capsys, tmp_path):
    file = tmp_path / "plan.json"
    said = planned(capsys, "localize", "--model", "llava", "--limit", "1", "--json", str(file))["said"]
    assert json.loads(file.read_text())["plan"] == said.splitlines()


@pytest.mark.slow
@pytest.mark.usefixtures("no_weights")
def test_a_patching_is_planned_without_weights(capsys, tmp_path):
    base = ["patch", "--model", "llava", "--what", "z", "--by", "all", "--limit", "5"]
    whole = planned(capsys, *base)
    assert whole["patch"][0] == 1024 * 5 and "14.10 GB of weights" in whole["said"]
    one_pass = 2 * 6.6e9 * (576 + 30)  # over the prompt a patch costs the layers above it: half of that
    assert 0.9 < whole["patch"][1] / (1024 * 5 * one_pass / 2) < 1.3
    two = planned(capsys, *base, "--layers", "3,4", "--gpu", "a100", "--gpus", "2")
    assert two["patch"][0] == 64 * 5 and "on 2 that share the examples" in two["said"]
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    own = [
        "--image",
        str(tmp_path / "x.png"),
        "--prompt",
        "is it red?",
        "--answer",
        "yes",
        "--corrupt",
        "blur",
    ]
    assert planned(capsys, *base[:-2], *own)["patch"][0] == 1024
    assert planned(capsys, *base, "--corrupt", "blur", "--dataset", "shapes-varied")["patch"][0] == 1024 * 5
    assert main([*base, "--layers", "32", "--plan"]) == 2 and "--layers: layer 32" in capsys.readouterr().err


SLOW = pytest.mark.slow


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "what", "metric", "most"),
    [
        ("tiny-llava", "z", "logit_diff", 2.5),
        pytest.param("tiny-qwen2.5-vl", "z", "logit_diff", 2.5, marks=SLOW),
        pytest.param("tiny-llava", "resid_pre", "log_prob", 2.5, marks=SLOW),
        pytest.param("tiny-llava", "resid_mid", "logit_diff", 2.5, marks=SLOW),
        pytest.param("tiny-llava", "vision_z", "logit_diff", 1.5, marks=SLOW),
        pytest.param("tiny-llava", "mlp_out", "task", 20, marks=SLOW),  # answers are short here
    ],
)
def test_a_plan_of_a_patching_is_an_upper_bound_of_what_runs(name, what, metric, most):
    options = {"what": what, "by": "all", "groups": None, "metric": metric}
    model, choice = HookedVLM.from_pretrained(name), PairsChoice(limit=2, kind="color")
    (line,) = [x for x in plan_patching(model, choice, options, Machines("", 1.0)) if "FLOP" in x]
    flop = float(re.findall(r"([\d.e+]+) FLOP", line)[0])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        patch_activations(model, choice.load(model), progress=False, **options)
    assert counter.get_total_flops() < flop < most * counter.get_total_flops()


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
def test_a_plan_is_an_upper_bound_of_what_runs(task, capsys):
    argv = ["localize", "--model", "tiny-llava", "--task", task, "--limit", "1", "--heads", "L0H1,L1H0,L3H2"]
    flop = planned(capsys, *argv, "--top-k", "1", "--throughput", "1", "--stage", "heads")["heads"][1]
    model, examples = HookedVLM.from_pretrained("tiny-llava"), load_examples("shapes", task, "discovery", 1)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        localize_heads(model, task, examples, 1, heads="L0H1,L1H0,L3H2", progress=False)
    assert counter.get_total_flops() < flop < 2 * counter.get_total_flops()
