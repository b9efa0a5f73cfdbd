"""Peak memory of localization beside that of one forward pass at the same batch."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import torch
from helpers import random_llava
from transformers import LlavaForConditionalGeneration

import hones_lens as hl
from hones_lens import HookedVLM, engine
from hones_lens.tasks.registry import load_task

BATCH = 16


def _megabytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def peak(what: str) -> float:
    """What a forward pass, or localization, of 16 examples takes at most, in MB; in a process of its own."""
    text = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
    text |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    config = random_llava.make_config(text=text, vision={"image_size": 112, "patch_size": 7})
    torch.manual_seed(0)
    model = HookedVLM.from_hf(
        LlavaForConditionalGeneration(config).eval(), random_llava.processor_for(config)
    )
    task, examples = load_task("vqa"), hl.load_examples("shapes", "vqa", "discovery", BATCH)
    with torch.no_grad():
        (batch,) = engine.prompt_batches(model, task, examples, BATCH)
        model(batch.inputs[0])  # what any first pass sets up
        before = _megabytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        if what == "forward":
            model(batch.inputs)
        else:
            hl.localize_heads(model, task, examples, batch_size=BATCH, progress=False)
    return _megabytes("VmHWM") - before


def test_peak_memory(note) -> None:
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        forward, localize = pool.map(peak, ["forward", "localize"], chunksize=1)
    note(
        f"peak memory, random d 512 × 8, {BATCH} examples of VQA: one forward {forward:.0f} MB, localization "
        f"of all heads {localize:.0f} MB: {localize / forward:.2f}× (bar ≤ 1.5×)"
    )
