"""How much racing saves: on the drops of a shipped model, and on a simulation of a large one from them."""

from __future__ import annotations

import numpy as np

import hones_lens as hl
from hones_lens import HookedVLM, localize_heads
from hones_lens.results.racing import Racing, replay


def share_measured(values: np.ndarray, k: int, racing: Racing, layers: np.ndarray) -> tuple[float, bool]:
    """Row-layers with racing over those without, and whether the winners are right up to epsilon."""
    found = replay(values, k, racing)
    cost = (np.array(found.examples) * layers).sum() / (values.shape[1] * layers.sum())
    kth = np.sort(values.mean(1))[-k]
    return float(cost), all(values[i].mean() >= kth - racing.epsilon for i in found.winners)


def test_racing(benchmark, note) -> None:
    model = HookedVLM.from_pretrained("tiny-llava")
    examples = hl.load_examples("shapes", "vqa", "discovery", 512)
    drops = localize_heads(model, "vqa", examples, progress=False).drops.flatten(0, 1).numpy()
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    layers = np.repeat(np.arange(n_layers, 0, -1), n_heads)
    cost, right = share_measured(drops, 5, Racing(), layers)
    note(
        f"racing, tiny-llava, vqa, 5 of 32 heads, 512 examples, ε 0.01, δ 0.05: {1 / cost:.2f}× fewer "
        f"row-layers; right: {right}"
    )

    # 1,024 heads: the 32, and 992 drawn from those of them that do least; 5,000 examples drawn from the 512.
    rng = np.random.default_rng(0)
    least = np.argsort(drops.mean(1))[:24]
    which = np.concatenate((np.arange(len(drops)), rng.choice(least, 1024 - len(drops))))
    values = np.stack([drops[i, rng.integers(0, 512, 5000)] for i in which])
    all_layers = np.repeat(np.arange(32, 0, -1), 32)[rng.permutation(1024)]
    racing = Racing(round_size=128)
    result = benchmark.pedantic(lambda: share_measured(values, 5, racing, all_layers), rounds=1)
    note(
        f"racing, simulated 1,024 heads × 5,000 examples, ε 0.01, δ 0.05: {1 / result[0]:.2f}× fewer "
        f"row-layers (bar ≥ 3×); right: {result[1]}"
    )
