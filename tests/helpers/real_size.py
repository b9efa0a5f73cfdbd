"""Random checkpoints of known models through every stage, as commands: seconds, peak memory, sizes of files.

The labels are the model's own answers, so that a random model is right, and has something to lose.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = {"llava": 336, "qwen": 896}  # pixels of a picture: 576 and 1,024 image tokens
QUESTION = "what color is the circle?"
# The last two layers: their forks are cheap, so that every stage takes seconds.
LAYERS = {"llava": "30-31", "qwen": "26-27"}


NAMES = {"llava": "llava-1.5-7b", "qwen": "qwen2.5-vl-7b"}


@dataclass(frozen=True)
class Usage:
    """What a command took: seconds by the clock and of the processor, peak memory in GB, MB written."""

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


def run(stage: str, argv: Sequence[str], folder: Path) -> Usage:
    """Run a command of Python in a process of its own; what it writes is what `folder` grows by.

    Raises:
        RuntimeError: It failed; with what it said last.
    """
    before, started = _bytes(folder), time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, *argv], stdout=said, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    if process.returncode:
        raise RuntimeError(f"{stage} ended with {process.returncode}: {text[-2000:]}")
    seconds, written = time.perf_counter() - started, (_bytes(folder) - before) / 1e6
    cpu_seconds = used.ru_utime + used.ru_stime
    return Usage(stage, seconds, cpu_seconds, used.ru_maxrss * 1024 / 1e9, written, text)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def hones(stage: str, folder: Path, *argv: str) -> Usage:
    """Run `hones` with these arguments."""
    return run(stage, ["-m", "hones_lens.app.cli", *argv], folder)


def write_data(folder: Path, checkpoint: Path, kind: str, dtype: str) -> Usage:
    """Three pictures of noise, one to select on, two to judge on, labelled with the model's own answers."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        pixels = rng.integers(0, 256, (SIDE[kind], SIDE[kind], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "splits.json").write_text(json.dumps({"discovery": ["a.png"], "test": ["b.png", "c.png"]}))
    return run("answers of 3 pictures", ["-c", _LABEL, str(checkpoint), str(folder), dtype, QUESTION], folder)


_LABEL = """
import json, sys
from pathlib import Path
import torch
import hones_lens as hl
checkpoint, folder, dtype, question = sys.argv[1:]
model = hl.HookedVLM.from_pretrained(checkpoint, device="cpu", dtype=getattr(torch, dtype))
prompt = f"Question: {question}\\nAnswer the question with a short phrase."
rows = []
for name in ("a.png", "b.png", "c.png"):
    inputs = model.prepare([Path(folder) / name], [prompt])
    (answer,) = model.generate(inputs, 24)
    rows.append(json.dumps({"image": name, "question": question, "answer": answer}))
(Path(folder) / "own.jsonl").write_text("\\n".join(rows) + "\\n", encoding="utf-8")
print(int(inputs.image_mask.sum()), "image tokens;", rows)
"""


def data_options(data: Path) -> list[str]:
    """The options that select these examples."""
    splits = [f"--{name}={data}/splits.json:{split}" for name, split in _SPLITS]
    return ["--dataset", "own", "--data-file", str(data / "own.jsonl"), "--image-dir", str(data), *splits]


_SPLITS = (("discovery-split", "discovery"), ("split", "test"))


def true_counts(kind: str, folder: Path) -> Iterator[Usage]:
    """A checkpoint with true counts and narrow widths through every stage; work is limited to two layers."""
    model, data, out = folder / "model", folder / "data", folder / "run"
    base = ["--model", str(model), "--dtype", "float32", "--device", "cpu"]
    yield hones("checkpoint", folder, "random-checkpoint", NAMES[kind], "--out", str(model))
    yield write_data(data, model, kind, "float32")
    chosen = [*base, *data_options(data), "--limit", "2", "--layers", LAYERS[kind], "--top-k", "3"]
    chosen += ["--out", str(out)]
    yield hones("heads of two layers", folder, "localize", "--stage", "heads", *chosen)
    yield hones("neurons, flow, lenses", folder, "localize", *chosen)
    yield hones("masking, 5 sizes", folder, "mask", "--controls", "1", *chosen)
    yield run("rankings", ["-c", _RANK, str(model), str(data), *LAYERS[kind].split("-")], folder)
    files = ["--dataset", "own", "--data-file", str(data / "own.jsonl"), "--image-dir", str(data)]
    patch = ["--split", "all", "--limit", "1", "--corrupt", "blank", "--what", "z", "--force"]
    patch += ["--layers", LAYERS[kind].split("-")[1], "--out", str(folder / "patch")]
    yield hones("patching of a layer's heads", folder, "patch", *base, *files, *patch)
    pages = [str(out), str(folder / "patch"), "--out", str(folder / "report.html")]
    yield hones("report", folder, "report", *pages)
    page = ["--image", str(data / "a.png"), "--prompt", QUESTION, "--run", str(out)]
    page += ["--out", str(folder / "explorer.html"), "--max-size", "2"]
    yield hones("explorer's page", folder, "explore", *base, *page)


_RANK = """
import sys
from pathlib import Path
import hones_lens as hl
from hones_lens.hones import attribute_neurons
checkpoint, data, first, last = sys.argv[1:]
model = hl.HookedVLM.from_pretrained(checkpoint, device="cpu")
examples = hl.load_examples("own", "vqa", "all", 1, data_file=f"{data}/own.jsonl", image_dir=data)
for method in ("activation_probability", "mean_activation", "direct", "gradient_times_activation", "random"):
    options = {"method": method, "layers": f"{first}-{last}", "progress": False}
    scores = attribute_neurons(model, "vqa", examples, **options)
    print(method, tuple(scores.scores.shape), len(scores._repr_html_()))
"""


def true_size(folder: Path) -> Iterator[Usage]:
    """LLaVA-1.5-7B in bfloat16, its weights random: 14 GB in `folder`, two heads on one example."""
    model, data, out = folder / "model", folder / "data", folder / "run"
    base = ["--dtype", "bfloat16", "--device", "cpu"]
    yield hones(
        "checkpoint", folder, "random-checkpoint", NAMES["llava"], "--scale", "true", "--out", str(model)
    )
    yield write_data(data, model, "llava", "bfloat16")
    chosen = ["--model", str(model), *base, *data_options(data), "--limit", "1", "--heads", "L31H0,L31H1"]
    chosen += ["--out", str(out)]
    yield hones("two heads", folder, "localize", "--stage", "heads", *chosen)
    yield hones("neurons, flow, lenses", folder, "localize", *chosen)
    yield hones("resumed", folder, "localize", *chosen)
    yield hones("check --quick", folder, "check", "--quick", str(model), *base)
