"""Rank correlation of attribution patching with measured effects, on the shipped models and the four tasks.

Run it from the repository: `python tests/benchmarks/report_attribution_patching.py`. It prints a table in
Markdown: Spearman's correlation over components of the mean change of the logit difference, with 95 %
intervals by the jackknife over pairs.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from hones_lens import HookedVLM, counterfactual_pairs
from hones_lens.analysis.patching.agreement import Agreement, atp_against_measured
from hones_lens.analysis.patching.gradient import attribute_patching
from hones_lens.analysis.patching.pairs import PatchPairs, counterfactual

MODELS = ("tiny-llava", "tiny-qwen2.5-vl")
TASKS = ("vqa", "ocr", "caption", "retrieval")
COLUMNS = (
    "heads (z)",
    "queries, AtP",
    "queries, AtP*",
    "keys, AtP",
    "keys, AtP*",
    "random neurons",
    "top neurons",
)


def agreements(
    model: HookedVLM, pairs: PatchPairs, direction: str, n_random: int, n_top: int
) -> Iterator[Agreement]:
    """In the order of the columns."""
    options = {"direction": direction, "progress": False}
    yield atp_against_measured(model, pairs, "z", **options)
    for what in ("q", "k"):
        for method in ("atp", "atp*"):
            yield atp_against_measured(model, pairs, what, method=method, **options)
    neurons = [(layer, i) for layer in range(model.cfg.n_layers) for i in range(model.cfg.d_mlp)]
    drawn = sorted(random.Random(0).sample(neurons, n_random))
    size = attribute_patching(model, pairs, "neurons", raw=True, draws=0, **options).values.abs()
    top = sorted(neurons, key=lambda neuron: -float(size[neuron]))[:n_top]
    both = atp_against_measured(
        model, pairs, "neurons", components=list(dict.fromkeys([*drawn, *top])), **options
    )
    yield both.of(drawn)
    yield both.of(top)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--direction", default="noise", choices=["noise", "denoise"])
    parser.add_argument("--random", type=int, default=200, help="neurons drawn from all")
    parser.add_argument("--top", type=int, default=50, help="neurons with the largest estimates")
    given = parser.parse_args()
    print(f"| model | task | {' | '.join(COLUMNS)} | s |")
    print("| --- " * (len(COLUMNS) + 3) + "|")
    for name in MODELS:
        model = HookedVLM.from_pretrained(name)
        for task in TASKS:
            started = time.perf_counter()
            pairs = counterfactual(model, counterfactual_pairs(task, split="dev", limit=given.pairs), task)
            found = agreements(model, pairs, given.direction, given.random, given.top)
            cells = [
                f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]" for r in (both.spearman() for both in found)
            ]
            spent = time.perf_counter() - started
            print(f"| {name} | {task} | {' | '.join(cells)} | {spent:.0f} |", flush=True)


if __name__ == "__main__":
    main()
