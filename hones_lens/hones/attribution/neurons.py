"""Neurons by what they write towards the target, conditioned on critical heads (HONES eqs. H2, H3)."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hones_lens import engine
from hones_lens.data import Example
from hones_lens.interventions import Hook, choose_layers, neuron_hook, replace_with_other_heads_mean
from hones_lens.model import HookedVLM, find_settings, scale_hook, weighted
from hones_lens.results import Component
from hones_lens.tasks import Task

T = TypeVar("T")
Start = tuple[int, Tensor | None]
"""A layer, and the clean streams that enter it, [example pos d_model]; None: from the prompt."""
DEFAULT_RATIO = 0.01
_PARTS = 20  # of the examples, for standard errors
_HEADS_OF_A_UNIT = 4  # where others compute; each unit costs a clean pass more
_TABLE_BYTES = 2e9  # for the sums of heads, by part; of a 72B a head has 0.4 GB


def target_directions(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    *,
    normalize: bool = True,
    apply_ln: bool = False,
    foils: Sequence[str] | None = None,
) -> Float[Tensor, "example d_model"]:
    """Unit directions u_y of the examples' targets in the residual stream (HONES eq. H2).

    `u_y = Σ_k a_k W_U[:, y_k] / ‖·‖₂` over the target's tokens, encoded alone without special
    tokens; a_k is 1, or the smoothed IDF over these examples' references where the task says so.

    Args:
        model, task, examples: Whose targets.
        normalize: Divide by the norm.
        apply_ln: Ours: fold in the final norm's weight, so that dividing by its scale gives logits.
        foils: Ours: a wrong answer for each example, whose direction is subtracted.

    Raises:
        ValueError: A target without tokens, or another number of foils than examples.
    """
    if foils is not None and len(foils) != len(examples):
        raise ValueError(f"{len(foils)} foils for {len(examples)} examples")
    idf = _inverse_document_frequencies(model, examples) if task.idf else None
    rows = []
    for i, example in enumerate(examples):
        direction = _direction(model, task.target(example), idf, example.id)
        if foils is not None:
            direction = direction - _direction(model, foils[i], idf, example.id)
        if not bool(direction.any()):
            raise ValueError(f"the target and the foil of example {example.id!r} have the same tokens")
        rows.append(direction)
    directions = torch.stack(rows)
    if apply_ln:
        directions = directions * model.ln_final.weight.detach()
    return directions / directions.norm(dim=-1, keepdim=True) if normalize else directions


def _direction(model: HookedVLM, text: str, idf: dict[int, float] | None, name: str) -> Tensor:
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError(f"the target {text!r} of example {name!r} has no tokens")
    weights = torch.tensor([1.0 if idf is None else idf[i] for i in ids], device=model.cfg.device)
    return (weights[:, None] * model.W_U.T.detach()[ids].float()).sum(0)


def _inverse_document_frequencies(model: HookedVLM, examples: Sequence[Example]) -> dict[int, float]:
    """`ln((n + 1) / (df + 1)) + 1` over the examples' references; a token of none has df = 0."""
    references = [reference for example in examples for reference in example.references]
    seen: Counter[int] = Counter()
    for reference in references:
        seen.update(set(model.tokenizer(reference, add_special_tokens=False).input_ids))
    n = len(references)
    unseen = math.log(n + 1) + 1
    return defaultdict(
        lambda: unseen, {token: math.log((n + 1) / (df + 1)) + 1 for token, df in seen.items()}
    )


def write_in(
    model: HookedVLM,
    batch: engine.Batch,
    directions: Float[Tensor, "example d_model"],
    hooks: Sequence[Hook] = (),
    apply_ln: bool = False,
    layers: Sequence[int] | None = None,
    start: Start = (0, None),
) -> Float[Tensor, "example layer d_mlp"]:
    """Each neuron's write-in towards the target at the last prompt position (HONES eq. H2).

    `c(l, i) = m_i · ⟨W_out[i], u_y⟩`, in float32; with `apply_ln` divided by the final norm's scale. Where a
    norm is behind the MLP, `γ ∘ W_out[i] / s` takes the place of `W_out[i]`, γ and s its weight and scale.
    Of some layers, by default of all. From a start none below it runs, and none of `layers` may lie there.
    """
    layers = range(model.cfg.n_layers) if layers is None else layers
    names, blocks = [neuron_hook(layer) for layer in layers], model.blocks
    scales = {layer: scale_hook(blocks[layer], layer, "mlp") for layer in layers}
    watch = [*names, *(name for name in scales.values() if name is not None)]
    watch += ["ln_final.hook_scale"] if apply_ln else []
    stop = None if apply_ln else max(layers) + 1

    def run(part: engine.Batch, numbers: Sequence[int]) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: Any) -> None:
            kept[hook.name] = x[:, -1].to(torch.float32, copy=True)  # a view would keep all positions

        with torch.no_grad(), model.hooks(fwd_hooks=[*hooks, *((name, keep) for name in watch)]):
            model(**_from(start, part, numbers), stop_at_layer=stop, logits_to_keep=1)
        return kept

    parts = _in_parts(model, batch, run)
    kept = {name: torch.cat([part[name] for part in parts]) for name in watch}
    written = []
    for layer, name in zip(layers, names, strict=True):
        block, scale = blocks[layer], scales[layer]
        towards = weighted(block, "mlp", directions.float()) @ block.mlp.W_out.detach().float().T
        written.append(kept[name] * towards if scale is None else kept[name] * towards / kept[scale])
    out = torch.stack(written, dim=1)
    return out / kept["ln_final.hook_scale"][:, :, None] if apply_ln else out


def _advanced(model: HookedVLM, batch: engine.Batch, start: Start, layer: int) -> Start:
    """The clean streams of a batch where they enter a layer, from where they enter one below."""

    def run(part: engine.Batch, numbers: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return model(**_from(start, part, numbers), stop_at_layer=layer)

    return layer, torch.cat(_in_parts(model, batch, run))


def _from(start: Start, part: engine.Batch, numbers: Sequence[int]) -> dict[str, Any]:
    """What the model is called with, for these rows of a batch, to run from a start."""
    layer, streams = start
    if streams is None:
        return {"model_input": part.inputs}
    return {"model_input": streams[list(numbers)], "start_at_layer": layer, "inputs": part.inputs}


def _in_parts(
    model: HookedVLM, batch: engine.Batch, run: Callable[[engine.Batch, Sequence[int]], T]
) -> list[T]:
    """What comes of parts of a batch that fit into memory; `run` takes a part and its examples' numbers."""
    budget = engine.Budget(model)
    most, numbers = budget.pass_rows(batch.inputs), range(len(batch.examples))
    parts = budget.in_parts(numbers, lambda rest: most, lambda part: run(batch.part(part), part))
    return [out for _, out in parts]


def default_ratio(model: HookedVLM) -> float:
    """The share of `model_configs/`, or 1 %."""
    settings = find_settings(model.cfg.model_name)
    return settings.ratio if settings else DEFAULT_RATIO


def head_conditioned_importance(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    heads: Sequence[Component],
    **options: Any,
) -> tuple[Float[Tensor, "layer d_mlp"], Float[Tensor, "layer d_mlp"] | None]:
    """Head-conditioned importance of every neuron (HONES eq. H3), and its standard error.

    `I(l,i) = Σ_h w_h [E c(l,i) − E c(l,i under I_h)]₊ / Σ_h w_h`, over heads with w_h > 0; the clamp
    comes after the mean over examples. A head of layer l changes neurons of layers ≥ l only.

    The standard error is that of a delete-a-group jackknife: the importance is worked out anew without each
    of up to 20 parts of the examples, clamp and all (Kott, J. Off. Stat. 17, 2001; w_h is taken as it is).

    Args:
        model, task, examples, heads: As for `write_in_drops_by_head`.
        options: Of `write_in_drops_by_head`.

    Returns:
        Both float64 on the CPU; no error where there is one example.

    Raises:
        ValueError: No head with w > 0: there is nothing to condition on.
    """
    drops = _Drops.of(model, task, examples, heads, **options)
    parts = min(_PARTS, len(examples))
    scores = torch.zeros(len(drops.layers), model.cfg.d_mlp, dtype=torch.float64)
    without = torch.zeros(parts, *scores.shape, dtype=torch.float64)  # the importance without each part
    for weight, sums, counts in drops.by_head(parts):
        total, n = sums.sum(0), counts.sum()
        scores += weight * (total / n).clamp(min=0)
        for part in range(parts if parts > 1 else 0):
            without[part] += weight * ((total - sums[part]) / (n - counts[part])).clamp(min=0)
        del sums  # or the table would stay while the next one is made
    weights = drops.weights.sum()
    scores /= weights
    if parts < 2:
        return drops.of_all_layers(scores), None
    mean, squares = torch.zeros_like(scores), torch.zeros_like(scores)
    for part in range(parts):
        deviation = without[part] / weights - scores
        mean, squares = mean + deviation / parts, squares + deviation.square()
    variance = (parts - 1) / parts * (squares - parts * mean.square())
    return drops.of_all_layers(scores), drops.of_all_layers(variance.clamp(min=0).sqrt())


def write_in_drops_by_head(
    model: HookedVLM,
    task: Task,
    examples: Sequence[Example],
    heads: Sequence[Component],
    **options: Any,
) -> tuple[Float[Tensor, " head"], Float[Tensor, "head layer d_mlp"]]:
    """The terms of HONES eq. H3 for each head with w_h > 0, in the order of the heads.

    Args:
        model, task, examples: What to attribute.
        heads: Critical heads with their w_h.
        options: `batch_size`, `progress`, `journal`; `normalize`, `apply_ln`, `foils` of `target_directions`.

    Returns:
        w_h, and `[E c(l,i) − E c(l,i under I_h)]₊`, float64 on the CPU.

    Raises:
        ValueError: No head with w > 0: there is nothing to condition on.
    """
    drops = _Drops.of(model, task, examples, heads, **options)
    means = [(sums.sum(0) / counts.sum()).clamp(min=0) for _, sums, counts in drops.by_head(parts=1)]
    return drops.weights, drops.of_all_layers(torch.stack(means))


@dataclass(frozen=True, eq=False)
class _Drops:
    """What heads that are replaced take from the write-ins of the examples.

    Attributes:
        model, task, examples: What to attribute.
        critical: The heads with w_h > 0.
        directions: Of the examples' targets.
        layers: Of the neurons.
        batch_size, progress, journal, apply_ln: As for `attribute_neurons`.
    """

    model: HookedVLM
    task: Task
    examples: Sequence[Example]
    critical: Sequence[Component]
    directions: Float[Tensor, "example d_model"]
    layers: Sequence[int]
    batch_size: int
    progress: bool
    apply_ln: bool
    journal: MutableMapping[str, Any] | None

    @classmethod
    def of(
        cls,
        model: HookedVLM,
        task: Task,
        examples: Sequence[Example],
        heads: Sequence[Component],
        *,
        batch_size: int = 16,
        progress: bool = True,
        journal: MutableMapping[str, Any] | None = None,
        layers: Sequence[int] | None = None,
        **target: Any,
    ) -> _Drops:
        """Of these heads, with options of `target_directions`; ValueError where none has w_h > 0."""
        critical = [head for head in heads if head.score > 0]
        if not critical:
            raise ValueError("no critical head has w > 0, so there is nothing to condition neurons on")
        directions = target_directions(model, task, examples, **target)
        chosen = choose_layers(layers, model.cfg.n_layers)
        run = (batch_size, progress, bool(target.get("apply_ln")), journal)
        return cls(model, task, examples, critical, directions, chosen, *run)

    def of_all_layers(
        self, values: Float[Tensor, "*lead chosen d_mlp"]
    ) -> Float[Tensor, "*lead layer d_mlp"]:
        """Values of the chosen layers, and zeros for the others."""
        whole = values.new_zeros(*values.shape[:-2], self.model.cfg.n_layers, values.shape[-1])
        whole[..., list(self.layers), :] = values
        return whole

    @property
    def weights(self) -> Float[Tensor, " head"]:
        """w_h, float64."""
        return torch.tensor([head.score for head in self.critical], dtype=torch.float64)

    def by_head(
        self, parts: int
    ) -> Iterator[tuple[float, Float[Tensor, "part layer d_mlp"], Float[Tensor, " part"]]]:
        """Each head's w_h, `Σ c(l,i) − c(l,i under I_h)` over each part of the examples, and their numbers.

        An example is in the part of its number modulo `parts`. As many heads share a pass over the examples
        as have tables of 2 GB together; each further pass costs a clean one more.
        """
        if isinstance(self.journal, engine.SharedJournal):
            yield from self._by_head_of_others(parts, self.journal)
            return
        head_bytes = parts * len(self.layers) * self.model.cfg.d_mlp * 8
        at_once = max(1, int(_TABLE_BYTES // head_bytes))
        portions = [self.critical[i : i + at_once] for i in range(0, len(self.critical), at_once)]
        total = len(self.examples) * (len(self.critical) + len(portions))
        with tqdm(total=total, desc=f"neurons · {self.task.name}", disable=not self.progress) as bar:
            for number, portion in enumerate(portions):
                sums, counts = self._summed(portion, parts, bar, f"neurons/{self.task.name}/{parts}/{number}")
                yield from ((head.score, sums[i], counts) for i, head in enumerate(portion))
                del sums

    def _by_head_of_others(
        self, parts: int, journal: engine.SharedJournal
    ) -> Iterator[tuple[float, Float[Tensor, "part layer d_mlp"], Float[Tensor, " part"]]]:
        """As `by_head`, where others compute: all examples for a few heads are a unit, to the same bits."""
        engine.check_shareable(self.model)
        n, size = len(self.examples), _HEADS_OF_A_UNIT
        portions = [self.critical[i : i + size] for i in range(0, len(self.critical), size)]
        units = [
            engine.Unit(
                f"neurons/{self.task.name}/{parts}/{number}",
                ("head", "part", "layer"),
                (len(portion), parts, len(self.layers)),
                _Portion(self, portion, parts),
                cells=n * len(portion),
            )
            for number, portion in enumerate(portions)
        ]
        counts = torch.bincount(torch.arange(n) % parts).double()
        total = n * len(self.critical)
        with tqdm(total=total, desc=f"neurons · {self.task.name}", disable=not self.progress) as bar:
            for portion, done in zip(portions, journal.compute(units, bar.update), strict=True):
                sums = torch.tensor(done.values)
                yield from ((head.score, sums[i], counts) for i, head in enumerate(portion))

    def _summed(
        self, heads: Sequence[Component], parts: int, bar: tqdm[Any], key: str
    ) -> tuple[Float[Tensor, "head part layer d_mlp"], Float[Tensor, " part"]]:
        model, before = self.model, bar.n
        shape = (len(heads), parts, len(self.layers), model.cfg.d_mlp)
        sums, counts = torch.zeros(shape, dtype=torch.float64), torch.zeros(parts, dtype=torch.float64)
        tensors = {"sums": sums, "counts": counts}
        resumed = engine.resumed_batches(self.examples, self.batch_size, tensors, self.journal, key)
        for start, chunk in resumed:
            (batch,) = engine.answer_batches(model, self.task, chunk, len(chunk), answers=False)
            stop = start + len(chunk)
            directions, part = self.directions[start:stop], torch.arange(start, stop) % parts
            counts.index_add_(0, part, torch.ones(len(part), dtype=torch.float64))
            for i, drops in self._of_batch(batch, directions, heads):
                sums[i, :, -drops.shape[1] :].index_add_(0, part, drops)
            bar.update(before + stop * (len(heads) + 1) - bar.n)
        return sums, counts

    def _of_batch(
        self, batch: engine.Batch, directions: Float[Tensor, "example d_model"], heads: Sequence[Component]
    ) -> Iterator[tuple[int, Float[Tensor, "example above d_mlp"]]]:
        """What each head takes from each example's write-ins, with its number among the heads.

        Only of the layers from its own on, the last of `layers`: it changes nothing below, and nothing below
        runs again. What is divided by the final norm's scale does change there, and runs from the beginning.
        """
        model, layers, start = self.model, self.layers, (0, None)
        changing = [i for i, head in enumerate(heads) if self.apply_ln or head.layer <= layers[-1]]
        clean: Tensor | None = None
        for i in sorted(changing, key=lambda i: heads[i].layer):
            head = heads[i]
            if not self.apply_ln and head.layer > start[0]:
                start = _advanced(model, batch, start, head.layer)
            layers = [layer for layer in layers if layer >= start[0]]
            given = (model, batch, directions)
            if clean is None:
                clean = write_in(*given, (), self.apply_ln, layers, start)
            hook = replace_with_other_heads_mean(head.layer, head.index)
            changed = write_in(*given, [hook], self.apply_ln, layers, start)
            yield i, (clean[:, -len(layers) :].double() - changed.double()).cpu()


class _Portion:
    """The sums of a few heads over all examples, for a process that has its own model."""

    def __init__(self, drops: _Drops, heads: Sequence[Component], parts: int):
        self._fields = {f.name: getattr(drops, f.name) for f in fields(drops) if f.name != "model"}
        self._fields |= {"critical": heads, "journal": None, "progress": False}
        self._fields["directions"] = drops.directions.cpu()
        self._parts = parts

    def __call__(self, model: HookedVLM) -> engine.Done:
        drops = _Drops(
            model, **self._fields | {"directions": self._fields["directions"].to(model.cfg.device)}
        )
        with tqdm(disable=True) as bar:
            sums, _ = drops._summed(drops.critical, self._parts, bar, "")
        return engine.Done(sums.numpy())
