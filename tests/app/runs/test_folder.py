from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from threading import Timer

import pytest
import torch
from filelock import FileLock
from helpers.hf_task_loops import fresh_pair

from hones_lens.app.report.run_folder import read_run
from hones_lens.app.report.run_settings import sealed
from hones_lens.app.runs.folder import Journal, Opening, Run
from hones_lens.app.runs.identity import code_hash, examples_hash, weights_hash
from hones_lens.app.tiny import tiny_llava
from hones_lens.data.loading import load_examples
from hones_lens.hones.attribution.head_scores import HeadScores
from hones_lens.hones.attribution.heads import localize_heads
from hones_lens.model.hooked_vlm import HookedVLM
from hones_lens.results import write_json
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


def test_other_versions_are_refused(tmp_path):
    run = Run(tmp_path / "a", {"model": "m"})
    saved = json.loads(run.path("settings.json").read_text())
    saved["environment"]["torch"] = "1.0"
    run.path("settings.json").write_text(json.dumps(sealed(saved)))
    with pytest.raises(ValueError, match=r"torch: '1\.0' there"):
        Run(tmp_path / "a", {"model": "m"})


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="not a run folder"):
        Run(tmp_path, {})
    with pytest.raises(ValueError, match="not a run folder"):
        read_run(tmp_path)


def some_scores(score: float = 0.25) -> HeadScores:
    return HeadScores(
        task="vqa",
        metric_name="accuracy",
        intervention="other heads' mean",
        model_name="m",
        scores=torch.tensor([[score, 0.5]], dtype=torch.float64),
        drops=torch.zeros(1, 2, 0, dtype=torch.float64),
        baseline=1.0,
        base_scores=torch.zeros(0, dtype=torch.float64),
        example_ids=(),
        kinds=(),
        top_k=1,
    )


def test_a_stage_is_computed_once_and_then_read(tmp_path):
    scores = some_scores()
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
    assert (
        2 * cells <= len(calls) and "heads/0" in Journal(file) and len(Journal(file)) == 3 + 1
    )  # and how many there are


def test_hashes_tell_models_and_examples_apart():
    first, second = untrained(0), untrained(1)
    assert weights_hash(first) == weights_hash(untrained(0)) != weights_hash(second)
    task = load_task("vqa")
    a = load_examples("shapes", "vqa", "dev", 3)
    assert examples_hash(task, a) == examples_hash(task, load_examples("shapes", "vqa", "dev", 3))
    assert examples_hash(task, a) != examples_hash(task, load_examples("shapes", "vqa", "dev", 3, seed=1))


def change_config(path, **changes):
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | changes)))


def test_settings_that_no_begun_stage_reads_may_change(tmp_path):
    decided = {"heads": ("top_k",), "masking": ("controls",)}

    def opened(top_k, controls):
        return Run(tmp_path / "a", {"model": "m", "top_k": top_k, "controls": controls}, decided)

    opened(0, 20)
    run = opened(3, 20)  # nothing was computed with 0
    run.stage("heads", HeadScores, some_scores)
    assert read_run(opened(3, 4).folder)[0]["controls"] == 4
    with pytest.raises(
        ValueError, match=r"top_k: 3 there, 5 now, which decides the stage heads, already begun"
    ):
        opened(5, 4)
    run.journal("masking")["a"] = 1.0
    with pytest.raises(ValueError, match=r"controls: 4 there, 5 now, which decides the stage masking"):
        opened(3, 5)


def test_a_folder_of_an_earlier_version_is_read_but_not_continued(tmp_path):
    folder = Run(tmp_path / "a", {"model": "m"}).folder
    saved = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({k: saved[k] for k in ("settings", "environment")}))
    assert read_run(folder)[0] == {"model": "m"}
    with pytest.raises(ValueError, match=r"made by another version of hones-lens.*choose another --out"):
        Run(folder, {"model": "m"})


def test_other_code_is_refused_unless_allowed_and_then_recorded(tmp_path):
    folder = Run(tmp_path / "a", {"model": "m"}).folder
    change_config(folder / "settings.json", code="0" * 24)
    before = (folder / "settings.json").read_bytes()
    with pytest.raises(
        ValueError, match=r"code of hones-lens is not the one that began .*--allow-code-change"
    ):
        Run(folder, {"model": "m"})
    assert (folder / "settings.json").read_bytes() == before
    with pytest.warns(UserWarning, match="results of both are in it"):
        run = Run(folder, {"model": "m"}, opening=Opening(allow_code_change=True))
    assert f"{'0' * 24} before" in run.path("log.txt").read_text()
    assert Run(folder, {"model": "m"}).resumed, "said once"
    saved = json.loads((folder / "settings.json").read_text())
    assert saved["earlier_code"] == ["0" * 24] and saved["code"] == code_hash()


def test_what_is_read_from_measurements_may_change_until_it_is_read(tmp_path):
    decided = {"heads": ("race",), "heads.json": ("top_k",), "neurons": ("ratio",)}

    def opened(**changes):
        return Run(tmp_path / "a", {"top_k": 1, "race": None, "ratio": 0.1, **changes}, decided)

    opened().journal("heads")["a"] = 1.0
    run = opened(top_k=3)
    with pytest.raises(
        ValueError, match=r"race: None there, 0.1 now, which decides the stage heads, already"
    ):
        opened(top_k=3, race=0.1)
    run.stage("heads", HeadScores, some_scores)
    assert opened(top_k=3, ratio=0.2).resumed
    with pytest.raises(
        ValueError, match=r"top_k: 3 there, 2 now, which decides the stage heads, already begun"
    ):
        opened(top_k=2, ratio=0.2)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"nonsense", b"\xff\x00", b'{"settings": {}, "environment": 1}']
)
def test_damaged_settings_are_named(tmp_path, content):
    folder = Run(tmp_path / "a", {"model": "m"}).folder
    (folder / "settings.json").write_bytes(content)
    for opened in (lambda: Run(folder, {"model": "m"}), lambda: read_run(folder)):
        with pytest.raises(ValueError, match=r"settings\.json is damaged"):
            opened()


def test_a_first_write_that_was_killed_does_not_spoil_the_folder(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    for name in ("lock", "lock.json", "settings.json.17-0a1b2c3d.part"):
        (folder / name).write_text("{")
    assert not Run(folder, {"model": "m"}).resumed


def damage(file, how):
    content = file.read_bytes()
    if how == "a folder":
        file.unlink()
        file.mkdir()
    else:
        changed = {
            "cut": content[:-20],
            "empty": b"",
            "binary": b"\x00\xff" * 50,
            "edited": content.replace(b"0.25", b"0.75"),
            "NaN": content.replace(b"0.25", b"NaN"),
        }[how]
        assert changed != content
        file.write_bytes(changed)


@pytest.mark.parametrize("how", ["cut", "empty", "binary", "edited", "NaN", "a folder", "swapped"])
def test_a_result_that_is_not_what_was_written_is_refused_by_name(tmp_path, how):
    runs = [Run(tmp_path / name, {"model": name}) for name in "ab"]
    for run, score in zip(runs, (0.25, 0.125), strict=True):
        run.stage("heads", HeadScores, lambda score=score: some_scores(score))
    file = runs[0].path("heads.json")
    if how == "swapped":
        file.write_bytes(runs[1].path("heads.json").read_bytes())
    else:
        damage(file, how)
    with pytest.raises(ValueError, match=r"a/heads\.json was changed or damaged"):
        runs[0].stage("heads", HeadScores, some_scores)


def test_a_result_that_was_deleted_is_computed_again(tmp_path):
    run = Run(tmp_path / "a", {"model": "m"})
    run.stage("heads", HeadScores, some_scores)
    run.path("heads.json").unlink()
    assert run.stage("heads", HeadScores, lambda: some_scores(0.125)).scores[0, 0] == 0.125


def test_marks_of_another_run_are_refused(tmp_path):
    first, second = (Run(tmp_path / name, {"model": "m"}) for name in "ab")
    first.stage("heads", HeadScores, some_scores)
    for name in ("heads.json", "stages.json"):
        second.path(name).write_bytes(first.path(name).read_bytes())
    with pytest.raises(ValueError, match=r"b/stages\.json is damaged or of another run"):
        second.stage("heads", HeadScores, some_scores)


def test_a_result_without_the_mark_that_is_written_last_is_computed_again(tmp_path):
    run = Run(tmp_path / "a", {"model": "m"})
    run.stage("heads", HeadScores, some_scores)
    run.path("stages.json").unlink()
    run.path("heads.json").write_text("{")  # killed here
    assert run.stage("heads", HeadScores, some_scores).scores[0, 0] == 0.25


@pytest.mark.parametrize("how", ["edited", "NaN", "binary", "old", "another run", "another stage"])
def test_a_damaged_line_of_a_journal_is_named(tmp_path, how):
    file = tmp_path / "heads.journal.jsonl"
    journal = Journal(file, "run")
    journal["heads/0"], journal["heads/1"] = [0.5], [0.25]
    lines, run = file.read_bytes().splitlines(keepends=True), "run"
    if how == "another stage":
        (tmp_path / "masking.journal.jsonl").write_bytes(file.read_bytes())
        file = tmp_path / "masking.journal.jsonl"
    elif how == "another run":
        run = "other"
    else:
        second = {
            "edited": lines[1].replace(b"0.25", b"0.75"),
            "NaN": lines[1].replace(b"0.25", b"NaN"),
            "binary": b"\x00\xff\n",
            "old": b'["heads/1", [0.25]]\n',
        }[how]
        file.write_bytes(lines[0] + second)
    line = 1 if how.startswith("another") else 2
    with pytest.raises(
        ValueError, match=rf"{file.name}, line {line}, is damaged, or of another run or stage"
    ):
        Journal(file, run)


HOLDER = """
import json, os, pathlib, sys
from filelock import FileLock
lock = FileLock("lock")
lock.acquire()
pathlib.Path("lock.json").write_text(json.dumps({"pid": os.getpid(), "host": "here", "since": "noon"}))
print(1, flush=True)
sys.stdin.read()
"""


def test_two_processes_do_not_work_in_one_folder(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    command, pipes = [sys.executable, "-c", HOLDER], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=folder, **pipes) as holder:
        assert holder.stdout.read(1) == b"1"
        with pytest.raises(
            ValueError, match=rf"in use by another process \(pid {holder.pid} on here since noon"
        ):
            Run(folder, {"model": "m"})
        holder.kill()
    run = Run(folder, {"model": "m"})  # the lock of a dead process is free
    assert json.loads(run.path("lock.json").read_text())["pid"] == os.getpid()
    again = Run(folder, {"model": "m"})  # and one process may open its folder twice
    del run, again
    FileLock(folder / "lock").acquire(timeout=0).lock.release()


def test_a_process_may_wait_for_another_one_and_says_for_which(tmp_path, capsys):
    folder = tmp_path / "a"
    folder.mkdir()
    command, pipes = [sys.executable, "-c", HOLDER], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=folder, **pipes) as holder:
        assert holder.stdout.read(1) == b"1"
        Timer(0.3, holder.stdin.close).start()
        Run(folder, {"model": "m"}, opening=Opening(wait=True))
        assert holder.wait() == 0
    said = capsys.readouterr().err
    assert f"in use by another process (pid {holder.pid} on here since noon); waiting" in said


def test_a_disk_that_is_full_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_json(file, {"kind": "x"})

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(file, {"kind": "y"})
    assert json.loads(file.read_text()) == {"kind": "x"} and list(tmp_path.iterdir()) == [file]


def test_tensors_of_a_journal_go_when_the_stage_is_finished(tmp_path):
    run = Run(tmp_path / "a", {"model": "m", "top_k": 1}, {"heads": ("top_k",)})
    for stage in ("heads", "heads-held-out"):
        run.journal(stage).keep_tensors("k/0", 2, {"total": torch.ones(2)})
    with pytest.raises(
        ValueError, match="top_k: 1 there, 2 now, which decides the stage heads, already begun"
    ):
        Run(tmp_path / "a", {"model": "m", "top_k": 2}, {"heads": ("top_k",)})
    run.stage("heads", HeadScores, some_scores)
    assert [file.name for file in run.folder.glob("*.safetensors")] == [
        "heads-held-out.k-0.tensors.safetensors"
    ]


def test_a_journal_is_read_once_until_its_stage_is_done(tmp_path, monkeypatch):
    Run(tmp_path / "a", {"m": 1}).journal("others")["others/0"] = [1.0]
    reads = list[str]()
    read = Journal._read
    monkeypatch.setattr(Journal, "_read", lambda journal: (reads.append(journal.file.name), read(journal)))
    run = Run(tmp_path / "a", {"m": 1})
    for number in range(1, 4):
        run.journal("others")[f"others/{number}"] = [0.5]
    assert len(run.journal("others")) == 4 and reads == ["others.journal.jsonl"]
    run.files("others", lambda: [])
    assert len(run.journal("others")) == 4 and len(reads) == 2
    assert run.journal("heads") is not run.journal("others")
