"""`hones patch`: its sources of pairs, its run folder, and what it refuses."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import hones_lens as hl
from hones_lens.analysis.patching import pair_answers, runner
from hones_lens.analysis.patching.activation import patch_activations
from hones_lens.analysis.patching.pairs import counterfactual
from hones_lens.analysis.patching.sites import SITES
from hones_lens.app.cli import main
from hones_lens.app.commands import patch as command
from hones_lens.app.runs import patch as patch_run
from hones_lens.interventions.corruptions import blur, region
from hones_lens.interventions.token_groups import Box
from hones_lens.model.loading import load_hf_model
from hones_lens.results.labelled import Labelled

FAST = ["--limit", "3"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_names_that_the_parser_knows_are_those_of_the_library() -> None:
    assert tuple(SITES) == command.SITES and command.CORRUPTIONS == patch_run.CORRUPTIONS


def test_it_patches_counterfactual_pairs_and_resumes(folder: Path, capsys) -> None:
    argv = [
        "patch",
        "--kind",
        "color",
        "--what",
        "z",
        "--by",
        "all",
        "--out",
        "run",
        "--json",
        "r.json",
        *FAST,
    ]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "share of logit_diff restored, z" in said and "Run: run" in said
    assert {p.name for p in (folder / "run").iterdir()} >= {
        "settings.json",
        "patch.json",
        "patch.png",
        "patch.svg",
    }
    model = hl.HookedVLM.from_pretrained("tiny-llava")
    pairs = counterfactual(model, hl.counterfactual_pairs("vqa", "color", limit=3), "vqa")
    expected = patch_activations(model, pairs, "z", "all", progress=False)
    result = Labelled.load(folder / "run" / "patch.json")
    assert result.axes == ("layer", "head") and result.n == 3
    assert torch.allclose(result.values, expected.values) and result.notes == expected.notes
    assert json.loads((folder / "r.json").read_text())["values"] == result.values.tolist()
    with Image.open(folder / "run" / "patch.png") as image:
        assert np.asarray(image.convert("L")).min() < 128
    before = (folder / "run" / "patch.json").read_bytes()
    assert main(argv) == 0 and (folder / "run" / "patch.json").read_bytes() == before
    assert "resumed" in (folder / "run" / "log.txt").read_text()
    for changed, says in (
        (["--direction", "noise"], "'direction': 'noise'"),
        (["--seed", "1"], "seed: 3407 there, 1 now"),
        (["--limit", "2"], "limit: 3 there, 2 now"),
    ):
        assert main([*argv, *changed]) == 1
        assert says in capsys.readouterr().err


@pytest.mark.exhaustive
def test_a_run_that_was_killed_goes_on_from_its_last_batch(folder: Path, monkeypatch) -> None:
    argv = ["patch", "--batch-size", "2", "--layers", "1,2", *FAST]
    assert main([*argv, "--out", "whole"]) == 0
    real = patch_run.patch_activations

    def killed(model, pairs, **options):
        real(model, pairs[:2], **options)  # the first batch
        raise KeyboardInterrupt

    monkeypatch.setattr(patch_run, "patch_activations", killed)
    assert main([*argv, "--out", "killed"]) == 130 and not (folder / "killed" / "patch.json").exists()
    journal = folder / "killed" / "patch.journal.jsonl"
    first = journal.read_text()
    assert first.count("\n") == 2  # how many batches there are, and the first
    monkeypatch.setattr(patch_run, "patch_activations", real)
    assert main([*argv, "--out", "killed"]) == 0
    assert journal.read_text().startswith(first) and journal.read_text().count("\n") == 4
    files = [(folder / name / "patch.json").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]


def test_a_picture_of_ones_own_with_a_corruption_in_a_box(folder: Path, capsys) -> None:
    image = hl.load_examples("shapes", "vqa", "dev", 1)[0].image  # a yellow triangle
    image.save("mine.png")
    argv = ["patch", "--image", "mine.png", "--prompt", "what color is the triangle?", "--answer", "yellow"]
    argv += ["--foil", "blue", "--corrupt", "blur", "--strength", "6", "--corrupt-box", "0,0,56,112"]
    argv += ["--groups", "image,last", "--box", "0,0,40,40", "--raw"]
    assert main([*argv, "--out", "run"]) == 0
    assert "change of logit_diff" in capsys.readouterr().out
    result = Labelled.load("run/patch.json")
    assert result.names("group") == ("image", "last", "box 0,0 – 40,40") and result.n == 1
    model = hl.HookedVLM.from_pretrained("tiny-llava")
    asked = "Question: what color is the triangle?\nAnswer the question with a short phrase."
    clean = model.prepare("mine.png", asked)
    corrupted = region(blur(6), Box(0, 0, 56, 112))(model, clean)
    yellow, blue = (model.continuation(asked, word)[0] for word in ("yellow", "blue"))
    with torch.no_grad():
        ends = [model(inputs)[0, -1] for inputs in (clean, corrupted)]
    gap = float((ends[0][yellow] - ends[0][blue]) - (ends[1][yellow] - ends[1][blue]))
    image_0 = float(result.select(layer=0, group="image").values)
    assert image_0 == pytest.approx(gap, abs=1e-4), "all that differs is in the image's tokens"


def own_pair() -> list[str]:
    """Options of a pair of one's own: a yellow triangle, and the same in red."""
    (pair,) = hl.counterfactual_pairs("vqa", "color", limit=1)
    assert pair.answers == ("yellow", "red")
    pair.clean.image.save("yellow.png")
    pair.corrupted.image.save("red.png")
    return ["--image", "yellow.png", "--prompt", pair.clean.question, "--answer", "yellow", "--layers", "0"]


@pytest.mark.exhaustive
def test_two_pictures_of_ones_own_and_a_swapped_word(folder: Path) -> None:
    own = ["patch", *own_pair()]
    assert main([*own, "--corrupted-image", "red.png", "--foil", "red", "--out", "a"]) == 0
    image = Labelled.load("a/patch.json").select(layer=0)
    assert image.select(group="image").item() == pytest.approx(1, abs=1e-4)
    assert image.select(group="question").item() == 0
    swapped = ["--corrupted-prompt", "what shape is the triangle?", "--metric", "kl", "--by", "position"]
    swapped += ["--out", "b"]
    assert main([*own, *swapped]) == 0
    result = Labelled.load("b/patch.json")
    (word,) = [name for name in result.names("position") if "→" in name]
    assert result.select(layer=0, position=word).item() == pytest.approx(1, abs=1e-4)
    assert float(result.values.abs().sum()) == pytest.approx(1, abs=1e-4), "another position carries it too"


@pytest.mark.exhaustive
@pytest.mark.parametrize("corrupt", patch_run.CORRUPTIONS)
def test_examples_under_each_corruption(corrupt: str, folder: Path) -> None:
    argv = ["patch", "--corrupt", corrupt, "--layers", "0", "--what", "resid_pre", "--out", "run", *FAST]
    assert main(argv) == 0
    result = Labelled.load("run/patch.json")
    assert "log_prob" in result.what and result.n == 3
    assert result.select(layer=0, group="image").item() == pytest.approx(1, abs=1e-4)
    assert result.select(layer=0, group="question").item() == 0


def test_qwen_and_sets_of_heads(folder: Path) -> None:
    argv = [
        "patch",
        "--model",
        "tiny-qwen2.5-vl",
        "--what",
        "z",
        "--by",
        "all",
        "--units",
        "1.3,2.0",
        "--out",
        "r",
    ]
    assert main([*argv, *FAST]) == 0
    assert Labelled.load("r/patch.json").names("head") == ("L1.3", "L2.0")


def test_plan_counts_and_times_and_does_nothing(folder: Path, capsys) -> None:
    assert main(["patch", "--what", "z", "--plan", "--out", "run", *FAST]) == 0
    said = capsys.readouterr().out
    assert "z by group, 3 pairs" in said and "96 patches × 3 pairs = 288 rows" in said
    assert "on this machine, as measured now" in said
    assert main(["patch", "--what", "mlp_out", "--plan", "--layers", "1", *FAST]) == 0
    assert "3 patches × 3 pairs = 9 rows" in capsys.readouterr().out
    assert not list(folder.iterdir())


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-qwen2.5-vl"])
def test_the_users_question_is_asked_in_the_form_of_the_task(name: str, folder: Path, capsys) -> None:
    """As Hugging Face's own model answers the task's prompt; `--raw-prompt` asks the text alone."""
    own = ["patch", "--model", name, *own_pair(), "--corrupted-image", "red.png", "--foil", "red"]
    hf_model, model = load_hf_model(name)[0], hl.HookedVLM.from_pretrained(name)
    question = "what color is the triangle?"
    form = f"Question: {question}\nAnswer the question with a short phrase."
    for text, options in ((form, ["--out", "a"]), (question, ["--raw-prompt", "--force", "--out", "b"])):
        assert main([*own, *options]) == 0
        said = capsys.readouterr().out
        assert f"prompt: {text!r}\n" in said
        for side, picture in (("clean", "yellow.png"), ("corrupted", "red.png")):
            inputs = model.prepare(picture, text).to_hf()
            tokens = hf_model.generate(**inputs, max_new_tokens=24, do_sample=False)
            new = tokens[0, inputs["input_ids"].shape[1] :]
            answer = model.tokenizer.decode(new, skip_special_tokens=True).strip()
            assert f"{side}: the model answers {answer!r}\n" in said
    whole = ["patch", "--model", name, *own_pair(), "--corrupted-image", "red.png", "--foil", "red"]
    whole[whole.index("--prompt") + 1] = form  # a text that has the form already is not wrapped again
    assert main([*whole, "--out", "c"]) == 0 and f"prompt: {form!r}\n" in capsys.readouterr().out
    assert (folder / "a" / "patch.json").read_bytes() == (folder / "c" / "patch.json").read_bytes()


@pytest.mark.exhaustive
def test_where_the_clean_run_does_not_prefer_the_answer_nothing_is_concluded(folder: Path, capsys) -> None:
    own = ["patch", *own_pair(), "--corrupted-image", "red.png", "--out", "run"]
    own[own.index("--answer") + 1] = "blue"
    assert main([*own, "--foil", "yellow"]) == 1
    said = capsys.readouterr()
    assert "clean: the model answers 'yellow'" in said.out
    assert "nothing can be concluded" in said.err and "--force" in said.err
    assert {file.name for file in (folder / "run").iterdir()} == {"lock", "lock.json"}
    assert main([*own]) == 1, "without a foil, the answer has to be the most likely one"
    with pytest.warns(UserWarning, match=r"right in 0 of 1 pairs.*\(0 % right\); nothing can be concluded"):
        assert main([*own, "--foil", "yellow", "--force"]) == 0
    assert main(["report", "run", "--out", "page.html"]) == 0
    page = (folder / "page.html").read_text()
    assert "inconclusive" in page and "Nothing can be concluded" in page
    assert "Largest share" not in page, "no share is the headline"
    assert main([*own, "--foil", "yellow", "--force"]) == 0
    assert main([*own, "--foil", "yellow"]) == 1
    assert (folder / "run" / "patch.json").exists(), "what was forced stays"


@pytest.mark.exhaustive
def test_unpatched_runs_are_not_run_again(folder: Path, monkeypatch) -> None:
    """Killed before each batch of pairs in turn, and before each answer that is generated."""
    counts, kills = Counter[str](), Counter[str]()

    def counted(module: Any, name: str) -> None:
        real = getattr(module, name)

        def run(*args: Any, **options: Any) -> Any:
            if killing and kills[name] < counts[name] + 1:
                kills[name] += 1
                raise KeyboardInterrupt
            counts[name] += 1
            return real(*args, **options)

        monkeypatch.setattr(module, name, run)

    killing = False
    for module in (pair_answers, runner):
        counted(module, "pair_batch")
    counted(hl.HookedVLM, "generate")
    argv = ["patch", "--limit", "3", "--batch-size", "2", "--what", "mlp_out", "--layers", "1", "--out"]
    assert main([*argv, "whole"]) == 0
    once, killing = Counter(counts), True
    assert once == {"pair_batch": 4, "generate": 2}
    counts.clear()
    while main([*argv, "run"]) == 130:
        pass
    assert counts == once == kills
    for name in ("patch.json", "answers.json"):
        assert (folder / "run" / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_tasks_that_ask_the_same_of_every_picture_need_no_prompt(folder: Path, capsys) -> None:
    example = hl.load_examples("shapes", "ocr", "dev", 1)[0]
    example.image.save("word.png")
    argv = ["patch", "--task", "ocr", "--image", "word.png", "--answer", example.text, "--corrupt", "blank"]
    assert main([*argv, "--layers", "0", "--out", "run"]) == 0
    said = capsys.readouterr().out
    assert f"clean: the model answers {example.text!r}" in said and "Transcribe the text" in said
    assert main([*argv, "--prompt", "what does it say?"]) == 2
    assert "has no place for 'what does it say?'" in capsys.readouterr().err


OWN = ["--image", "x.png", "--prompt", "is it red?", "--answer", "yes"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--image", "x.png"], "--image needs --prompt and --answer too"),
        (OWN, "--image needs --corrupt, or else --corrupted-image"),
        ([*OWN, "--corrupt", "blur", "--corrupted-image", "y.png"], "--image needs --corrupt, or else"),
        (["--answer", "yes"], "--answer goes with --image"),
        ([*OWN, "--corrupt", "blur"], "image 'x.png' does not exist"),
        (["--raw-prompt"], "--raw-prompt goes with --image"),
        (["--raw-prompt", "--image", "x", "--answer", "a"], "--image needs --prompt too"),
        (["--dataset", "coco"], "say how they are corrupted: --corrupt"),
        (["--corrupt", "blur", "--kind", "color"], "--kind is for counterfactual pairs"),
        (["--strength", "2"], "--strength has nothing to act on"),
        (["--corrupt", "blur", "--color", "red"], "--color has nothing to act on with --corrupt blur"),
        (["--corrupt-box", "0,0,9,9"], "--corrupt-box has nothing to act on"),
        (["--kind", "taste"], "no vqa pairs of kind 'taste'"),
        (["--groups", "nose"], "unknown token group 'nose'"),
        (["--box", "200,200,300,300"], "is outside of what the model sees"),
        (["--what", "z", "--units", "8"], "head 8 is not in 0"),
        (["--metric", "task", "--corrupt", "mean"], "--metric: task needs counterfactual pairs"),
        (["--by", "position"], "patch by group"),
    ],
)
def test_options_that_can_not_be_right_are_told_in_one_line(
    argv: list[str], says: str, folder: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("hones_lens.app.runs.baseline.unpatched_answers", None)
    few = [] if "--image" in argv else ["--limit", "2"]
    assert main(["patch", *argv, *few]) == 2
    error = capsys.readouterr().err
    assert says in error and error.strip().splitlines()[-1].startswith("hones: ")


def test_wrong_usage(folder: Path) -> None:
    for argv in (["--what", "x"], ["--box", "1,2,3"], ["--units", "some"], ["--direction", "up"]):
        with pytest.raises(SystemExit) as stop:
            main(["patch", *argv])
        assert stop.value.code == 2
