"""A SmolVLM that is trained here, in minutes, and explained from the shell: more than random weights."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from helpers import trained_smolvlm
from transformers import SmolVLMForConditionalGeneration

import hones_lens as hl
from hones_lens.app.cli import main
from hones_lens.app.tiny.train_tiny import train
from hones_lens.hones import HeadScores, HeldOutHeads, NeuronScores
from hones_lens.hones.masking_result import load_masking


@pytest.mark.by_hand
def test_a_small_model_learns_and_its_heads_and_neurons_are_found(tmp_path: Path) -> None:
    train(trained_smolvlm, tmp_path / "training", trained_smolvlm.RECIPE)
    folder, run = tmp_path / "training" / "model", tmp_path / "run"
    model = hl.HookedVLM.from_pretrained(str(folder), dtype=torch.float32)
    it_has_learned_to_look(model)
    answers_are_those_of_hugging_face(model, folder)
    chosen = ["--model", str(folder), "--dtype", "float32", "--task", "vqa", "--limit", "96", "--top-k", "2"]
    assert main(["check", "--quick", str(folder)]) == 0
    assert main(["localize", *chosen, "--out", str(run)]) == 0
    assert main(["mask", *chosen, "--out", str(run), "--controls", "19"]) == 0
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<svg") > 5
    heads, held_out = HeadScores.load(run / "heads.json"), HeldOutHeads.load(run / "heads-held-out.json")
    assert float(heads.scores.max()) > 0.05 and held_out.mean_drop.low > 0, "no answer depends on the heads"
    assert NeuronScores.load(run / "neurons.json").count() > 0
    largest = max(load_masking(run / "masking.json"), key=lambda result: result.n_neurons)
    drops = [largest.baseline - control.metric for control in largest.controls]
    assert largest.baseline - largest.masked > statistics.fmean(drops), "random neurons cost as much"


def it_has_learned_to_look(model: hl.HookedVLM) -> None:
    """Its answers to the pictures of other questions are much worse."""
    task, examples = hl.load_task("vqa"), hl.load_examples("shapes", "vqa", "test", 200)
    prompts = [task.prompts(example)[0] for example in examples]

    def accuracy(pictures: list) -> float:
        answers = model.generate(model.prepare(pictures, prompts), max_new_tokens=12)
        return statistics.fmean(task.score(*given) for given in zip(answers, examples, strict=True))

    pictures = [example.image for example in examples]
    seen, unseen = accuracy(pictures), accuracy([*pictures[7:], *pictures[:7]])
    print(f"accuracy {seen:.3f}, of other pictures {unseen:.3f}")
    assert seen > unseen + 0.15


def answers_are_those_of_hugging_face(model: hl.HookedVLM, folder: Path) -> None:
    task = hl.load_task("vqa")
    hf = SmolVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    for example in hl.load_examples("shapes", "vqa", "test", 12):
        inputs = model.prepare([example.image], task.prompts(example))
        with torch.no_grad():
            tokens = hf.generate(**inputs.to_hf(), max_new_tokens=12, do_sample=False)
        new = tokens[0, inputs.input_ids.shape[1] :]
        expected = model.tokenizer.decode(new, skip_special_tokens=True).strip()
        assert model.generate(inputs, max_new_tokens=12) == [expected]
