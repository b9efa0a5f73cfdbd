"""The settings of learned steering."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hones_lens.hones.steering.questions import NEGATIVES


@dataclass(frozen=True)
class SteeringConfig:
    """How scales are learned; the defaults are HONES's, where it says them.

    At the paper's learning rate Adam moves no scale by more than about 5e-4 a step, so what it reaches
    depends on the number of steps: choose `lr` and `epochs` on dev (see `compare_steering`).

    Attributes:
        lr: AdamW's learning rate at the start (without weight decay: the L2 term is the penalty).
        epochs: How often every example is seen.
        accumulate: Examples a step.
        kl_weight: β, of KL(original ‖ steered) at the answer's positions.
        l2_weight: λ, of the mean of a².
        grad_norm: Longer gradients are cut to this norm.
        clamp: |a| stays at or below it.
        final_lr: Share of `lr` towards which it falls along a cosine.
        negatives: Wrong candidates an example of a ranking task (ours).
        seed: Of the order of examples, and of the wrong candidates.
    """

    lr: float = 5e-4
    epochs: int = 2
    accumulate: int = 4
    kl_weight: float = 0.05
    l2_weight: float = 1e-5
    grad_norm: float = 1.0
    clamp: float = 1.5
    final_lr: float = 0.1
    negatives: int = NEGATIVES
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lr", "grad_norm", "clamp"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, not {getattr(self, name)}")
        for name in ("epochs", "accumulate", "negatives"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("kl_weight", "l2_weight", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, not {getattr(self, name)}")
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"final_lr must lie between 0 and 1, not {self.final_lr}")

    def learning_rate(self, step: int, steps: int) -> float:
        """The rate of one step of so many: a cosine from `lr` towards `final_lr · lr`."""
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        return self.lr * (self.final_lr + (1 - self.final_lr) * cosine)
