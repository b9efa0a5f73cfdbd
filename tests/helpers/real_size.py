"""Random checkpoints of known models through every stage, as commands: seconds, peak memory, sizes of files.

The labels are the model's own answers, so that a random model is right, and has something to lose: some heads
write so much that an answer depends on each. Every token ends an answer, since what counts is the stages.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

import hones_lens as hl
from hones_lens.app.cli import main
from hones_lens.hones import attribute_neurons

NAMES = {"llava": "llava-1.5-7b", "qwen": "qwen2.5-vl-7b"}
SIDE = {"llava": 336, "qwen": 896}  # pixels of a picture: 576 and 1,024 image tokens
QUESTION = "what color is the circle?"
# The last two layers: their forks are cheap, so that every stage takes seconds.
LAYERS = {"llava": (30, 31), "qwen": (26, 27)}
RANKINGS = ("direct", "gradient_times_activation", "random")
_TIMES = 1024  # what the planted heads write is so much larger
# Freed arrays stay with the process. Otherwise each new one is zeroed page by page, in a third of all time.
_KEEP_MEMORY = {f"MALLOC_{name}_": str(2**32) for name in ("MMAP_THRESHOLD", "TRIM_THRESHOLD")}
# Imported once, by the process that those of the stages are forked from.
_IMPORTED = ["helpers.real_size", "hones_lens.app.runs.stages", "hones_lens.app.report.report"]
_IMPORTED += ["hones_lens.app.explorer.explore", "hones_lens.app.runs.patch", "hones_lens.app.runs.views"]
_IMPORTED += [f"transformers.models.{name}.modeling_{name}" for name in ("llava", "clip", "qwen2_5_vl")]


@dataclass(frozen=True)
class Usage:
    """What a stage took: seconds by the clock and of the processor, peak memory in GB, MB written."""

    stage: str
    seconds: float
    cpu_seconds: float
    peak_gb: float
    written_mb: float
    said: str

    def row(self) -> str:
        """A line of a Markdown table."""
        numbers = f"{self.seconds:.0f} | {self.cpu_seconds:.0f} | {self.peak_gb:.2f} | {self.written_mb:.1f}"
        return f"| {self.stage} | {numbers} |"


HEADER = (
    "| stage | seconds | of the processor | peak memory, GB | files written, MB |\n"
    "| --- | ---: | ---: | ---: | ---: |"
)


def run(
    stage: str, folder: Path, function: Callable[..., int | None], *arguments: Any, threads: int = 1
) -> Usage:
    """Run a function in a process of its own; what it writes is what `folder` grows by.

    Raises:
        RuntimeError: It failed; with what it said last.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    with patch.dict(os.environ, _KEEP_MEMORY):
        forkserver.ensure_running()
    before, said = _bytes(folder), folder.with_name(f"{folder.name}.said")
    receiver, sender = context.Pipe(duplex=False)
    started = time.perf_counter()
    process = context.Process(target=_measured, args=(sender, said, threads, function, arguments))
    process.start()
    process.join()
    seconds, text = time.perf_counter() - started, said.read_text(encoding="utf-8")
    said.unlink()
    if process.exitcode:
        raise RuntimeError(f"{stage} ended with {process.exitcode}: {text[-2000:]}")
    cpu_seconds, peak_gb = receiver.recv()
    return Usage(stage, seconds, cpu_seconds, peak_gb, (_bytes(folder) - before) / 1e6, text)


def _measured(
    sender: Any, said: Path, threads: int, function: Callable[..., int | None], arguments: Sequence[Any]
) -> None:
    with open(said, "w", encoding="utf-8") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    torch.set_num_threads(threads)
    status = function(*arguments)
    used = resource.getrusage(resource.RUSAGE_SELF)
    sender.send((used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9))
    sys.exit(status or 0)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def hones(stage: str, folder: Path, *argv: str, threads: int = 1) -> Usage:
    """Run `hones` with these arguments."""
    return run(stage, folder, main, list(argv), threads=threads)


def plant(checkpoint: Path, heads: Sequence[tuple[int, int]]) -> None:
    """Let heads write much more, and let every token end an answer, in a checkpoint's own files."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    text = config["text_config"]
    width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            keys = list(opened.keys())
        for layer, head in heads:
            for key in (key for key in keys if key.endswith(f".layers.{layer}.self_attn.o_proj.weight")):
                if "vision" not in key:
                    with _in_place(file, key) as weight:
                        weight[:, head * width : (head + 1) * width] *= _TIMES
    special = json.loads((checkpoint / "generation_config.json").read_text(encoding="utf-8"))
    special["eos_token_id"] = list(range(text["vocab_size"]))
    (checkpoint / "generation_config.json").write_text(json.dumps(special), encoding="utf-8")


@contextlib.contextmanager
def _in_place(file: Path, key: str) -> Iterator[torch.Tensor]:
    """A weight in bfloat16, whose edits go to the file."""
    with open(file, "r+b") as opened, mmap.mmap(opened.fileno(), 0) as content:
        size = int.from_bytes(content[:8], "little")
        entry = json.loads(content[8 : 8 + size])[key]
        first, last = (8 + size + offset for offset in entry["data_offsets"])
        yield (
            weight := torch.frombuffer(bytearray(content[first:last]), dtype=torch.bfloat16).view(
                entry["shape"]
            )
        )
        content[first:last] = weight.view(torch.uint8).numpy().tobytes()


def write_data(
    folder: Path, checkpoint: Path, kind: str, dtype: str, threads: int = 1, count: int = 3
) -> Usage:
    """Three pictures of noise, one to select on, two to judge on, labelled with the model's own answers.

    Beyond the first `count` the labels are those of the first.
    """
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        pixels = rng.integers(0, 256, (SIDE[kind], SIDE[kind], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "splits.json").write_text(json.dumps({"discovery": ["a.png"], "test": ["b.png", "c.png"]}))
    stage = f"answers of {count} pictures" if count > 1 else "the answer of a picture"
    return run(stage, folder, _label, checkpoint, folder, dtype, count, threads=threads)


def _label(checkpoint: Path, folder: Path, dtype: str, count: int) -> None:
    started = time.perf_counter()
    model = hl.HookedVLM.from_pretrained(str(checkpoint), device="cpu", dtype=getattr(torch, dtype))
    loaded = time.perf_counter()
    prompt = f"Question: {QUESTION}\nAnswer the question with a short phrase."
    inputs = [model.prepare([folder / f"{name}.png"], [prompt]) for name in "abc"[:count]]
    answers = [str(answer) for each in inputs for answer in model.generate(each, 24)]
    answered = time.perf_counter()
    answers += answers[:1] * (3 - count)
    rows = [
        json.dumps({"image": f"{name}.png", "question": QUESTION, "answer": answer})
        for name, answer in zip("abc", answers, strict=True)
    ]
    (folder / "own.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(int(inputs[0].image_mask.sum()), "image tokens;", rows)
    print(f"loaded in {loaded - started:.0f} s, answered in {answered - loaded:.0f} s")


def data_options(data: Path) -> list[str]:
    """The options that select these examples."""
    splits = [f"--{name}={data}/splits.json:{split}" for name, split in _SPLITS]
    return ["--dataset", "own", "--data-file", str(data / "own.jsonl"), "--image-dir", str(data), *splits]


_SPLITS = (("discovery-split", "discovery"), ("split", "test"))


def planted(kind: str) -> list[tuple[int, int]]:
    """The heads of which every answer depends."""
    below, top = LAYERS[kind]
    return [(below, 0), (top, 1), (top, 2)]


def true_counts(kind: str, folder: Path) -> Iterator[Usage]:
    """A checkpoint with true counts and narrow widths through every stage; work is limited to two layers."""
    model, data, out = folder / "model", folder / "data", folder / "run"
    base = ["--model", str(model), "--dtype", "float32", "--device", "cpu"]
    layers = "-".join(map(str, LAYERS[kind]))
    yield hones("checkpoint", folder, "random-checkpoint", NAMES[kind], "--out", str(model))
    plant(model, planted(kind))
    yield write_data(data, model, kind, "float32")
    chosen = [*base, *data_options(data), "--limit", "2", "--layers", layers, "--top-k", "3"]
    chosen += ["--out", str(out)]
    yield hones("heads of two layers, held out", folder, "localize", "--stage", "heads", *chosen)
    yield hones("neurons, flow, lenses", folder, "localize", *chosen)
    yield hones("masking, 5 sizes", folder, "mask", "--controls", "1", *chosen)
    yield run("rankings", folder, _rank, model, data, layers)
    files = ["--dataset", "own", "--data-file", str(data / "own.jsonl"), "--image-dir", str(data)]
    patching = ["--split", "all", "--limit", "1", "--corrupt", "blank", "--what", "z", "--force"]
    top = LAYERS[kind][1]
    patching += ["--heads", f"L{top}H0,L{top}H1,L{top}H2", "--out", str(folder / "patch")]
    yield hones("patching of three heads", folder, "patch", *base, *files, *patching)
    pages = [str(out), str(folder / "patch"), "--out", str(folder / "report.html")]
    yield hones("report", folder, "report", *pages)
    page = ["--image", str(data / "a.png"), "--prompt", QUESTION, "--run", str(out)]
    page += ["--out", str(folder / "explorer.html"), "--max-size", "2"]
    yield hones("explorer's page", folder, "explore", *base, *page)


def _rank(checkpoint: Path, data: Path, layers: str) -> None:
    model = hl.HookedVLM.from_pretrained(str(checkpoint), device="cpu")
    examples = hl.load_examples("own", "vqa", "all", 1, data_file=data / "own.jsonl", image_dir=data)
    for method in RANKINGS:
        scores = attribute_neurons(model, "vqa", examples, method=method, layers=layers, progress=False)
        print(method, tuple(scores.scores.shape), len(scores._repr_html_()))


def true_size(folder: Path) -> Iterator[Usage]:
    """LLaVA-1.5-7B in bfloat16, its weights random: 14 GB in `folder`, two heads on one example."""
    model, data, out, threads = (
        folder / "model",
        folder / "data",
        folder / "run",
        len(os.sched_getaffinity(0)),
    )
    base = ["--dtype", "bfloat16", "--device", "cpu"]
    random = ["random-checkpoint", NAMES["llava"], "--scale", "true", "--out", str(model)]
    yield hones("checkpoint", folder, *random, threads=threads)
    plant(model, [(31, 0)])
    yield write_data(data, model, "llava", "bfloat16", threads, count=1)
    chosen = ["--model", str(model), *base, *data_options(data), "--limit", "1", "--heads", "L31H0,L31H1"]
    chosen += ["--out", str(out)]
    yield hones("two heads", folder, "localize", "--stage", "heads", *chosen, threads=threads)
    yield hones("neurons, flow, lenses", folder, "localize", *chosen, threads=threads)
    yield hones("resumed", folder, "localize", *chosen, threads=threads)
    yield hones("check --quick", folder, "check", "--quick", str(model), *base, threads=threads)
