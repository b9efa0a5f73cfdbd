from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.dataset_files import hones

from hones_lens.app.cli import main
from hones_lens.data.loading import load_examples

SMALL = ["--limit", "8", "--controls", "2"]


def test_help_answers_without_loading_torch():
    code = (
        "import sys, hones_lens.app.cli as c\ntry: c.main(['--help'])\n"
        "except SystemExit: pass\nprint('torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip().endswith("False")
    for command in ("demo", "localize", "mask", "evaluate", "check", "models", "report", "train-tiny"):
        assert command in said


def test_wrong_usage_exits_with_2():
    for argv in (["nope"], ["demo", "--task", "chess"], ["report"], []):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2


WRONG_VALUES = {
    ("steer", "--lr", "0.1,nan"): "nan is not a finite number",
    ("evaluate", "--json", "folder"): "folder is a folder, not a file",
    ("evaluate", "--json", "file/result.json"): "file is a file, not a folder",
    ("localize", "--out", "file"): "file is a file, not a folder",
    ("patch", "--out", "file/run"): "file is a file, not a folder",
    ("report", "run", "--out", "folder"): "folder is a folder, not a file",
    ("explore", "--out", "folder"): "folder is a folder, not a file",
    ("overlap", "run", "--out", "file"): "file is a file, not a folder",
}


@pytest.mark.parametrize("argv", WRONG_VALUES)
def test_values_that_can_t_be_right_are_refused_before_anything_runs(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert re.search(WRONG_VALUES[argv], capsys.readouterr().err)


def test_a_folder_that_can_t_be_written_to_is_refused_before_anything_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    for argv in (["mask", "--out", str(tmp_path / "run")], ["evaluate", "--json", str(tmp_path / "x.json")]):
        with pytest.raises(SystemExit):
            main(argv)
        assert f"{tmp_path} can't be written to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["evaluate", "--dataset", "coco", "--data-file", "x.json", "--limit", "2"], "x.json"),
        (["steer", "--out", "no-run"], "no-run/neurons.json is not there"),
        (["localize", "--stage", "neurons", "--limit", "4", "--out", "o"], "no heads.json yet"),
        (["report", "no-such-run", "--out", "x.html"], "no-such-run is not a run folder"),
    ],
)
def test_failures_are_one_line_and_exit_with_1(argv, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert says in error and error.startswith("hones: ") and error.count("\n") == 1


def test_an_example_of_both_splits_is_refused_before_anything_runs(tmp_path, capsys):
    hones(tmp_path / "data")
    ids = [r["image_id"] for r in json.loads((tmp_path / "data" / "unified.json").read_text())["data"]]
    for name, some in (("a", ids[:6]), ("b", ids[5:12])):
        (tmp_path / f"{name}.json").write_text(json.dumps(some))
    files = [
        "--dataset",
        str(tmp_path / "data" / "unified.json"),
        "--image-dir",
        str(tmp_path / "data" / "images"),
    ]
    splits = ["--discovery-split", str(tmp_path / "a.json"), "--split", str(tmp_path / "b.json")]
    assert main(["localize", *files, *splits, "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "1 vqa examples, the first " in said and "are both in " in said
    assert not (tmp_path / "run").exists()


def test_debug_shows_the_error_itself():
    with pytest.raises(ValueError, match="unknown model"):
        main(["evaluate", "--model", "nope", "--debug"])


def test_models_lists_shipped_and_hub_models(capsys, tmp_path):
    assert main(["models", "--json", str(tmp_path / "m.json")]) == 0
    said = capsys.readouterr().out
    assert "tiny-llava" in said and "llava-hf/llava-1.5-7b-hf" in said
    names = [entry["name"] for entry in json.loads((tmp_path / "m.json").read_text())]
    assert "llava-1.5-7b" in names


def test_config_file_gives_options_and_the_command_line_wins(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text("task: ocr\nlimit: 3\n")
    out = tmp_path / "e.json"
    assert main(["evaluate", "--config", str(config), "--limit", "2", "--json", str(out)]) == 0
    (evaluation,) = json.loads(out.read_text())
    assert evaluation["task"] == "ocr" and len(evaluation["scores"]) == 2
    config.write_text("taks: ocr\n")
    assert main(["evaluate", "--config", str(config)]) == 2
    assert "unknown key 'taks'; did you mean 'task'?" in capsys.readouterr().err
    config.write_text("task: chess\n")
    assert main(["evaluate", "--config", str(config)]) == 2
    assert "task is 'chess'; valid: vqa" in capsys.readouterr().err


def test_plan_says_what_would_be_done_and_does_nothing(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["demo", "--out", str(out), "--plan", *SMALL]) == 0
    said = capsys.readouterr().out
    assert "32 arms × 8 examples = 256 rows" in said and "FLOP" in said
    assert "GB of weights" in said and "s on one" in said
    assert not out.exists()


def test_what_was_traded_is_a_setting_and_is_told(tmp_path, capsys):
    argv = ["localize", "--out", str(tmp_path / "run"), "--limit", "6", "--prefilter", "5", "--race", "0.5"]
    assert main([*argv, "--memory-budget", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "the best 5 of 32 heads by attribution patching" in said and "right up to 0.5" in said
    assert main([*argv[:-1], "0.1"]) == 1
    assert "race: 0.5 there, 0.1 now" in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.parametrize("task", ["vqa", "ocr", "caption", "retrieval"])
def test_demo_runs_resumes_and_reports(task, tmp_path, capsys):
    size = ["--limit", "2" if task == "retrieval" else "8", "--controls", "2"]
    argv = ["demo", "--task", task, "--out", str(tmp_path / "run"), "--json", str(tmp_path / "r.json"), *size]
    assert main(argv) == 0
    said = capsys.readouterr().out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Report:" in said and "<html" in page
    found = json.loads((tmp_path / "r.json").read_text())
    assert len(found["heads"]["scores"]) == 4 and len(found["masking"]["results"]) == 5
    before = (tmp_path / "run" / "masking.json").read_bytes()
    assert main(argv) == 0
    assert (tmp_path / "run" / "masking.json").read_bytes() == before
    assert main([*argv, "--seed", "1"]) == 1
    assert "seed: 3407 there, 1 now" in capsys.readouterr().err
    page = tmp_path / "run" / "report.html"
    page.unlink()
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").stat().st_size > 10_000 and not page.exists()
    assert main(["report", str(tmp_path / "run")]) == 0 and page.stat().st_size > 10_000


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_numbers_of_an_unbroken_one(tmp_path):
    command = ["localize", "--stage", "heads", "--limit", "6", "--discovery-limit", "36"]  # two batches
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    program = [sys.executable, "-m", "hones_lens.app.cli", *command, "--out", str(broken)]
    process = subprocess.Popen(program, env=env, stderr=subprocess.DEVNULL)
    journal = broken / "heads.journal.jsonl"
    while not journal.exists() or not journal.read_bytes():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "heads.json").exists()
    for out in (broken, whole):
        assert main([*command, "--out", str(out)]) == 0
    for name in ("heads.json", "heads-held-out.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_check_passes_on_the_shipped_model_and_on_a_saved_one(tmp_path, capsys):
    from hones_lens.app.tiny import tiny_llava

    assert main(["check", "tiny-llava"]) == 0
    assert "FAIL" not in capsys.readouterr().out
    processor = tiny_llava.build_processor()
    tiny_llava.build_model(processor).save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    assert main(["check", str(tmp_path / "m"), "--json", str(tmp_path / "c.json")]) == 0
    assert len(json.loads((tmp_path / "c.json").read_text())) == 6


@pytest.mark.exhaustive
def test_stages_one_after_the_other_then_steering_and_overlap(tmp_path, capsys):
    limit = ["--limit", "6"]
    runs = [str(tmp_path / task) for task in ("vqa", "ocr")]
    for task, run in zip(("vqa", "ocr"), runs, strict=True):
        assert main(["localize", "--task", task, "--stage", "heads", "--out", run, *limit]) == 0
        assert main(["localize", "--task", task, "--stage", "neurons", "--out", run, *limit]) == 0
    rows = json.loads((tmp_path / "vqa" / "hones" / "neurons_top1pct.json").read_text())
    assert len(rows) == 15 and set(rows[0]) >= {"layer", "neuron", "score"}
    kept = {file.name for file in (tmp_path / "vqa").iterdir()}
    assert {"examples.json", "flow.json", "promoted.json", "example-1-logit-lens.json"} <= kept
    before = (tmp_path / "vqa" / "example-0.png").stat().st_mtime_ns
    assert main(["localize", "--task", "vqa", "--out", runs[0], *limit]) == 0
    assert (tmp_path / "vqa" / "example-0.png").stat().st_mtime_ns == before, "what is there is not made anew"
    held_out = json.loads((tmp_path / "vqa" / "heads-held-out.json").read_text())
    assert len(held_out["example_ids"]) == 6 and len(held_out["random"]) == 5
    shared = ["overlap", *runs, "--out", str(tmp_path / "shared")]
    assert main([*shared, "--json", str(tmp_path / "overlap.json")]) == 0
    (pair,) = json.loads((tmp_path / "overlap.json").read_text())["overlap"]["shared"]
    assert pair["tasks"] == ["vqa", "ocr"] and 0 <= pair["count"] <= 15
    capsys.readouterr()
    few = ["--methods", "fixed_amp,HONES", "--lr", "0.01", "--epochs", "1", "--patience", "1", *limit]
    assert main(["steer", "--out", runs[0], *few]) == 0
    said = capsys.readouterr().out
    assert "Fixed-Amp" in said and "Grid-Search" not in said
    folder = tmp_path / "vqa" / "steering" / "shapes"
    assert json.loads((folder / "settings.json").read_text())["settings"]["patience"] == 1
    learned = json.loads((folder / "steering.json").read_text())["rows"][-1]["scales"]
    assert "dev_metric" in learned["history"][0], "dev is watched"
    scales = json.loads((folder / "neuron_scales.json").read_text())
    assert {(r["layer"], r["neuron"]) for r in scales} == {(r["layer"], r["neuron"]) for r in rows}
    bank = str(tmp_path / "vqa" / "hones" / "neurons_top1pct.json")
    other = ["steer", "--out", str(tmp_path / "bank"), "--neurons", bank, "--methods", "fixed_amp", *limit]
    assert main(other) == 0
    assert main([*other[:-1], "5"]) == 1
    assert "other settings" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_a_configuration_of_hones_runs_as_it_is(tmp_path, capsys):
    """Paths start above configs/, split files are honoured, and tasks do not share an output folder."""
    hones(tmp_path / "data")
    ids = [r["image_id"] for r in json.loads((tmp_path / "data" / "unified.json").read_text())["data"]]
    (tmp_path / "configs").mkdir()
    splits = {"discovery": {"image_ids": ids[:6]}, "test": ids[6:10], "development": ids[10:16]}
    for name, entries in splits.items():
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(entries))
    config = tmp_path / "configs" / "llava_hones.yaml"
    config.write_text(
        """
model: {name: llava, model_id: tiny-llava, dtype: auto, device_map: auto}
data:
  data_file: data/unified.json
  image_dir: data/images
  discovery_split: data/discovery.json
  test_split: data/test.json
  dev_split: data/development.json
  discovery_limit: 5
  eval_limit: 3
  seed: 3407
run: {task: vqa, output_dir: artifacts/llava/vqa, top_k_heads: 7, top_neuron_ratio: 0.02, max_new_tokens: 24}
"""
    )
    for task in ("vqa", "ocr"):
        assert main(["localize", "--config", str(config), "--task", task]) == 0, capsys.readouterr().err
        folder = tmp_path / "artifacts" / "llava" / task
        heads = json.loads((folder / "heads.json").read_text())
        assert heads["top_k"] == 7 and heads["task"] == task
        files = {"data_file": tmp_path / "data" / "unified.json", "image_dir": tmp_path / "data" / "images"}
        every = load_examples("coco", task, "all", **files)
        allowed = {e.id for e in every if e.facts["image_id"] in set(map(str, ids[:6]))}
        assert len(allowed) == 6 and len(set(heads["example_ids"])) == 5
        assert set(heads["example_ids"]) <= allowed
        assert len(json.loads((folder / "hones" / "neurons_top1pct.json").read_text())) == 31


@pytest.mark.exhaustive  # the stages are tested in runs/test_reproduce.py
def test_reproduce_writes_all_tables_and_goes_on_where_it_stopped(tmp_path, capsys):
    argv = [
        "reproduce",
        "--tasks",
        "vqa,ocr",
        "--limit",
        "4",
        "--controls",
        "2",
        "--out",
        str(tmp_path / "r"),
    ]
    argv += ["--ratios", "0.02"]
    assert main(argv) == 0, capsys.readouterr().err
    said = (tmp_path / "r" / "tables.md").read_text()
    for title in (
        "Masking 2 %",
        "Steering: learned on shapes, measured on shapes-shifted",
        "share",
        "one size",
        "Logit lens of vqa",
    ):
        assert title in said
    for method in ("hones", "activation_entropy", "matched random", "Grid-Search", "HONES without KL"):
        assert f"| {method} |" in said
    kept = (tmp_path / "r" / "vqa" / "masking.json").read_bytes()
    assert main(argv) == 0
    assert (tmp_path / "r" / "tables.md").read_text() == said
    assert (tmp_path / "r" / "vqa" / "masking.json").read_bytes() == kept
    assert main([*argv[:-1], "0.03"]) == 1


def test_one_example_is_enough_for_heads_and_too_few_for_masking(tmp_path, capsys):
    one = ["--limit", "1", "--out", str(tmp_path / "run")]
    assert main(["mask", *one]) == 1
    assert "intervals, and they need two examples, but 'test' has one" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["localize", "--stage", "heads", *one]) == 0
    assert (tmp_path / "run" / "heads.json").exists()
    assert "intervals need two held-out examples" in (tmp_path / "run" / "log.txt").read_text()
