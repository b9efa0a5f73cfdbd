from __future__ import annotations

import json

import pytest
import torch
from helpers.hf_task_loops import fresh_pair

from hones_lens.app.report.run_folder import read_run
from hones_lens.app.runs.folder import Journal, Run, _evenly_spaced, examples_hash, weights_hash
from hones_lens.app.tiny import tiny_llava
from hones_lens.data.loading import load_examples
from hones_lens.hones.attribution.head_scores import HeadScores
from hones_lens.hones.attribution.heads import localize_heads
from hones_lens.model.hooked_vlm import HookedVLM
from hones_lens.tasks.registry import load_task


def untrained(seed: int = 0) -> HookedVLM:
    """tiny-llava before training, with weights large enough for interventions to show."""
    torch.manual_seed(seed)
    processor = tiny_llava.build_processor()
    model = tiny_llava.build_model(processor).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    return HookedVLM.from_hf(model, processor)


def test_settings_and_versions_are_written(tmp_path):
    Run(tmp_path / "a", {"model": "m", "top_k": None})
    settings, environment = read_run(tmp_path / "a")
    assert settings == {"model": "m", "top_k": None}
    assert {"python", "torch", "transformers", "hones-lens"} <= set(environment)
    assert "started" in (tmp_path / "a" / "log.txt").read_text()


def test_same_settings_resume_and_others_are_refused_by_name(tmp_path):
    Run(tmp_path / "a", {"model": "m", "seed": 1})
    assert Run(tmp_path / "a", {"model": "m", "seed": 1}).resumed
    with pytest.raises(ValueError, match=r"seed: 1 there, 2 now"):
        Run(tmp_path / "a", {"model": "m", "seed": 2})


def test_a_run_decodes_in_one_way(tmp_path):
    """A folder from before decoding was recorded holds plain greedy answers."""
    Run(tmp_path / "a", {"model": "m"})
    assert Run(tmp_path / "a", {"model": "m", "decoding": "greedy"}).resumed
    with pytest.raises(ValueError, match=r"decoding: 'greedy' there, 'greedy, repetition_penalty=1\.1' now"):
        Run(tmp_path / "a", {"model": "m", "decoding": "greedy, repetition_penalty=1.1"})


def test_other_versions_are_refused(tmp_path):
    run = Run(tmp_path / "a", {"model": "m"})
    saved = json.loads(run.path("settings.json").read_text())
    saved["environment"]["torch"] = "1.0"
    run.path("settings.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"torch: '1\.0' there"):
        Run(tmp_path / "a", {"model": "m"})


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="not a run folder"):
        Run(tmp_path, {})
    with pytest.raises(ValueError, match="not a run folder"):
        read_run(tmp_path)


def test_a_stage_is_computed_once_and_then_read(tmp_path):
    scores = HeadScores(
        task="vqa",
        metric_name="accuracy",
        intervention="other heads' mean",
        model_name="m",
        scores=torch.tensor([[0.25, 0.5]], dtype=torch.float64),
        drops=torch.zeros(1, 2, 0, dtype=torch.float64),
        baseline=1.0,
        base_scores=torch.zeros(0, dtype=torch.float64),
        example_ids=(),
        kinds=(),
        top_k=1,
    )
    run, calls = Run(tmp_path / "a", {"model": "m"}), []

    def compute():
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("the first time fails")
        return scores

    with pytest.raises(ValueError, match="the first time fails"):
        run.stage("heads", HeadScores, compute)
    assert not run.path("heads.json").exists(), "what failed leaves nothing behind"
    for _ in range(3):
        found = run.stage("heads", HeadScores, compute)
        assert found.scores.tolist() == [[0.25, 0.5]] and found.top_k == 1
    assert len(calls) == 2
    assert run.path("log.txt").read_text().count("heads: done") == 1


def test_a_line_cut_short_is_dropped_and_written_again(tmp_path):
    file = tmp_path / "j.jsonl"
    first = Journal(file)
    first["a"], first["b"] = [1.5], [2.25]
    file.write_bytes(file.read_bytes()[:-4])
    again = Journal(file)
    assert dict(again) == {"a": [1.5]}
    again["b"] = [3.0]
    assert dict(Journal(file)) == {"a": [1.5], "b": [3.0]}


def test_a_broken_sweep_goes_on_with_the_same_numbers(tmp_path):
    model, examples = fresh_pair()[1], load_examples("shapes", "ocr", "dev", 3)
    options = {"batch_size": 1, "progress": False}
    whole = localize_heads(model, "ocr", examples, 2, **options)
    file = tmp_path / "heads.jsonl"
    localize_heads(model, "ocr", examples[:2], 2, journal=Journal(file), **options)
    file.write_bytes(file.read_bytes()[:-10])  # killed while the second batch was written
    calls = []
    model.hook_embed.add_hook(lambda x, hook: calls.append(len(x)))
    resumed = localize_heads(model, "ocr", examples, 2, journal=Journal(file), **options)
    model.reset_hooks()
    assert (resumed.drops == whole.drops).all() and (resumed.scores == whole.scores).all()
    cells = model.cfg.n_layers * model.cfg.n_heads + 1
    assert 2 * cells <= len(calls) and "heads/0" in Journal(file) and len(Journal(file)) == 3


@pytest.mark.parametrize("n", [1, 2, 700, 1024, 1025, 12_288, 32_064 * 4096])
def test_samples_of_a_hash_are_evenly_spaced(n):
    picked = _evenly_spaced(n).tolist()
    count = min(1024, n)
    exact = [k * (n - 1) / max(1, count - 1) for k in range(count)]
    assert len(picked) == count and picked[0] == 0 and picked[-1] == n - 1
    assert all(abs(i - at) <= 1 + n * 2**-23 for i, at in zip(picked, exact, strict=True))


def test_hashes_tell_models_and_examples_apart():
    first, second = untrained(0), untrained(1)
    assert weights_hash(first) == weights_hash(untrained(0)) != weights_hash(second)
    task = load_task("vqa")
    a = load_examples("shapes", "vqa", "dev", 3)
    assert examples_hash(task, a) == examples_hash(task, load_examples("shapes", "vqa", "dev", 3))
    assert examples_hash(task, a) != examples_hash(task, load_examples("shapes", "vqa", "dev", 3, seed=1))
