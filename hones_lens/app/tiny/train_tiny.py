"""Training of the shipped models on the shapes world: seeded, logged, resumable.

The recipe: Muon on the matrices and AdamW on embeddings, head, convolution and vectors, cosine
schedule with warm-up, 16 pictures a step with about seven questions packed behind each.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformer_lens.hook_points import HookPoint

from hones_lens.app.tiny import tiny_data
from hones_lens.model import HookedVLM
from hones_lens.results import replaced_atomically


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to learn. The families' modules hold those that made the shipped models.

    Training has two parts, and where it needs it a third. In the first the model learns to see and to
    answer, all but the names of things. In the second it learns the names, at first with all that sees
    frozen (as LLaVA's training freezes its vision tower): the decoder alone has to look them up. From
    then on the loss also has a price on what neurons write (`Σ_i |m_i| ‖W_out[i]‖`; mean over tokens and
    layers), so that few neurons write, and only where it is needed. Most false captions of the second
    part put a thing into another column, which after the first part is judged at chance while all else
    is judged well; in the third they take one shape for another, the last thing to be told apart.

    Attributes:
        steps, naming_steps, shape_steps: Steps of the parts.
        batch: Pictures a step.
        lr, naming_lr, shape_lr: Highest rates; each falls along a cosine to 2 % of its peak.
        neuron_price: From the second part on.
        frozen_steps: For how many steps of the second part vision tower and projector are frozen.
        ocr_share: How many of the pictures have their word asked for.
        one_size_steps: For how many steps at first all pictures have one size.
        warmup: Steps of linear warm-up at the start of each part.
        weight_decay, clip, seed, save_every: As usual; `save_every` in steps.
    """

    steps: int = 5000
    naming_steps: int = 1800
    batch: int = 16
    lr: float = 1.5e-3
    naming_lr: float = 1e-3
    shape_steps: int = 0
    shape_lr: float = 1.2e-3
    neuron_price: float = 1e-3
    frozen_steps: int = 10**6
    ocr_share: float = 0.5
    one_size_steps: int = 0
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 0
    save_every: int = 250


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and "embed" not in name


def _optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if _is_matrix(n, p)]
    tables = [p for n, p in named if not _is_matrix(n, p) and p.ndim >= 2]
    vectors = [p for n, p in named if not _is_matrix(n, p) and p.ndim < 2]
    muon = torch.optim.Muon(
        matrices, lr=recipe.lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    groups = [
        {"params": tables, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [muon, torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95))]


def _begins_phase(step: int, recipe: Recipe) -> bool:
    """Whether a phase begins at this step, or the vision tower is unfrozen within the second phase."""
    return step in (
        recipe.steps,
        recipe.steps + recipe.frozen_steps,
        recipe.steps + recipe.naming_steps,
    )


def _begin_phase(model: HookedVLM, recipe: Recipe, step: int) -> list[torch.optim.Optimizer]:
    """Freeze the modules that are not trained at this step, and build optimizers for the others."""
    frozen = recipe.steps <= step < recipe.steps + min(recipe.frozen_steps, recipe.naming_steps)
    model.requires_grad_()
    for vision_module in (model.vision_encoder, model.vision_projector):
        vision_module.requires_grad_(not frozen)
    return _optimizers(model, recipe)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Learning rate at a step: in each phase linear warm-up, then a cosine to 2 % of the phase's peak."""
    phases = (
        (recipe.lr, recipe.steps),
        (recipe.naming_lr, recipe.naming_steps),
        (recipe.shape_lr, recipe.shape_steps),
    )
    peak, total = phases[0]
    for (_, previous_length), (next_peak, length) in pairwise(phases):
        if step < previous_length:
            break
        step, peak, total = step - previous_length, next_peak, length
    if step < recipe.warmup:
        return peak * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, total - recipe.warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


class NeuronPrice:
    """Penalty on the output of the decoder's neurons, accumulated by permanent hooks in forward passes.

    `Σ_i |m_i| ‖W_out[i]‖`; mean over tokens and layers.
    """

    def __init__(self, model: HookedVLM):
        self._blocks = model.blocks
        self._written: list[Tensor] = []
        for layer in range(model.cfg.n_layers):
            model.add_hook(f"blocks.{layer}.mlp.hook_post", self._add)

    def _add(self, post: Tensor, hook: HookPoint) -> None:
        lengths = self._blocks[hook.layer()].mlp.W_out.norm(dim=-1)
        self._written.append((post.abs().mean((0, 1)) * lengths).sum())

    def take(self) -> Tensor:
        """The penalty of the forward passes since the last call."""
        total = torch.stack(self._written).mean()
        self._written.clear()
        return total


def _accuracy_by_kind(right: Tensor, kinds: list[str]) -> dict[str, float]:
    """Share of right answer tokens, by kind of question."""
    groups = defaultdict(list)
    for ok, kind in zip(right.tolist(), kinds, strict=True):
        groups[kind].append(ok)
    return {kind: round(sum(v) / len(v), 3) for kind, v in sorted(groups.items())}


@torch.no_grad()
def _held_out_accuracy(family: ModuleType, model: HookedVLM, recipe: Recipe) -> dict[str, float]:
    right, kinds = [], []
    for step in range(-4, 0):
        scenes = tiny_data.training_scenes(recipe.seed, step, 16, "dev", family.TRAINING_SIDES)
        batch = tiny_data.pack(model, scenes)
        right.append(tiny_data.answer_logits(model, batch).argmax(-1) == batch.targets)
        kinds += batch.kinds
    return _accuracy_by_kind(torch.cat(right), kinds)


def train(family: ModuleType, out: Path, recipe: Recipe) -> HookedVLM:
    """Train one tiny model, resuming from `out` where a run of the same recipe left off.

    What is trained is the hooked model, whose weights are those of the Hugging Face model that is
    saved at the end.

    Args:
        family: A module with `build_processor`, `build_model`, `TRAINING_SIDES`.
        out: Folder for `state.pt` (resume) and `log.jsonl`; the finished model goes to `out/model`.
        recipe: Steps, rates and seed.

    Returns:
        The trained model, in float32 (the saved copy is float16).

    Raises:
        ValueError: `out` holds a run of another recipe.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    processor = family.build_processor()
    hf_model = family.build_model(processor)
    model = HookedVLM.from_hf(hf_model, processor)
    price = NeuronPrice(model)
    last = recipe.steps + recipe.naming_steps + recipe.shape_steps
    state_file = out / "state.pt"
    first, optimizers = _resume(state_file, model, recipe)
    with open(out / "log.jsonl", "a") as log:
        for step in tqdm(range(first, last), initial=first, total=last, mininterval=10):
            if _begins_phase(step, recipe):
                optimizers = _begin_phase(model, recipe, step)
            record = _step(family, model, optimizers, price, step, recipe)
            if step % recipe.save_every == 0 or step == last - 1:
                record["held_out"] = _held_out_accuracy(family, model, recipe)
                price.take()
                _save(state_file, model, optimizers, recipe, step + 1)
            log.write(json.dumps(record) + "\n")
            log.flush()
    model.reset_hooks()
    hf_model.to(torch.float16).save_pretrained(out / "model")
    processor.save_pretrained(out / "model")
    return model


def _step(
    family: ModuleType,
    model: HookedVLM,
    optimizers: list[torch.optim.Optimizer],
    price: NeuronPrice,
    step: int,
    recipe: Recipe,
) -> dict[str, object]:
    started = time.perf_counter()
    sides = family.TRAINING_SIDES[: 1 if step < recipe.one_size_steps else None]
    scenes = tiny_data.training_scenes(recipe.seed, step, recipe.batch, sides=sides)
    naming = step >= recipe.steps
    last_part = step >= recipe.steps + recipe.naming_steps
    emphasis = "shape" if last_part else "column" if naming else None
    batch = tiny_data.pack(model, scenes, naming, recipe.ocr_share, emphasis)
    logits = tiny_data.answer_logits(model, batch)
    losses = nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    loss = (losses * batch.weights).sum() / batch.weights.sum()
    written = price.take()
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss became {loss.item()} at step {step}")
    (loss + (recipe.neuron_price * written if naming else 0)).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    right = _accuracy_by_kind(logits.argmax(-1) == batch.targets, batch.kinds)
    seconds = round(time.perf_counter() - started, 3)
    figures = {"loss": loss.item(), "neurons": written.item(), "norm": norm.item()}
    return {"step": step, **figures, "right": right, "s": seconds}


def _save(
    file: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], recipe: Recipe, step: int
) -> None:
    state = {
        "recipe": asdict(recipe),
        "step": step,
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
    }
    with replaced_atomically(file) as partial:
        torch.save(state, partial)


def _resume(file: Path, model: HookedVLM, recipe: Recipe) -> tuple[int, list[torch.optim.Optimizer]]:
    """The step from which training resumes, and the optimizers of its phase."""
    if not file.exists():
        return 0, _begin_phase(model, recipe, 0)
    state = torch.load(file, weights_only=True)
    if state["recipe"] != asdict(recipe):
        raise ValueError(f"{file} holds a run of another recipe: {state['recipe']}, not {asdict(recipe)}")
    model.load_state_dict(state["model"])
    optimizers = _begin_phase(model, recipe, state["step"])
    if not _begins_phase(state["step"], recipe):
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    return state["step"], optimizers
