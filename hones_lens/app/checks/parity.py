"""`hones check`: whether the hooked model computes what Hugging Face's does, on a given checkpoint."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from hones_lens.app.checks.live_hooks import hooks_without_effect, sample_of_hooks
from hones_lens.data import load_examples
from hones_lens.model import HookedVLM, VLMInputs
from hones_lens.tasks import load_task

# Largest difference of logits that rounding explains, as a share of the largest logit.
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-9, torch.bfloat16: 4e-2, torch.float16: 6e-3}


@dataclass(frozen=True)
class Check:
    """Result of one check: its name, whether it passed, and the measured figures as text."""

    name: str
    passed: bool
    figure: str


def check_model(hooked: HookedVLM, hf_model, max_new_tokens: int = 16, quick: bool = False) -> list[Check]:
    """Parity of logits and greedy tokens, live hooks, image geometry and peak memory.

    Args:
        hooked: The hooked model, made from `hf_model`.
        hf_model: The model of Hugging Face.
        max_new_tokens: Number of greedy tokens to compare for each prompt.
        quick: One prompt of three, at most four tokens, and hooks of each kind in the first, middle and last
            layer; stopping and starting in the middle.
    """
    examples = load_examples("shapes-varied", "vqa", "test", limit=1 if quick else 3)
    max_new_tokens = min(max_new_tokens, 4) if quick else max_new_tokens
    prompts = [load_task("vqa").prompts(example)[0] for example in examples]
    inputs = hooked.prepare([example.image for example in examples], prompts)
    return [
        _logits(hooked, hf_model, inputs),
        _greedy(hooked, hf_model, inputs, max_new_tokens),
        _layers(hooked, inputs, quick),
        _hooks(hooked, inputs[0], quick),
        _geometry(hooked),
        _memory(hooked),
    ]


@torch.no_grad()
def _logits(hooked: HookedVLM, hf_model, inputs: VLMInputs) -> Check:
    ours, theirs = hooked(inputs).float(), hf_model(**inputs.to_hf()).logits.float()
    not_padding = inputs.attention_mask.bool().to(ours.device)
    difference = float((ours - theirs)[not_padding].abs().max())
    largest = float(theirs[not_padding].abs().max())
    agreement = float((ours.argmax(-1) == theirs.argmax(-1))[not_padding].float().mean())
    passed = difference <= TOLERANCES[hooked.cfg.dtype] * max(1.0, largest)
    figure = (
        f"max |difference| {difference:.2e} (largest logit {largest:.1f}), same top token at {agreement:.1%}"
    )
    return Check("logits equal Hugging Face's", passed, figure)


@torch.no_grad()
def _greedy(hooked: HookedVLM, hf_model, inputs: VLMInputs, max_new_tokens: int) -> Check:
    """Compare greedy tokens, of each row up to the first that differs.

    From there on the two continue different texts. The row is wrong unless Hugging Face's own scores put our
    token as close to theirs as rounding may move a logit.
    """
    name = "greedy tokens equal Hugging Face's"
    try:
        hooked.decoding.check()
    except ValueError as error:
        return Check(name, False, str(error))
    ours = hooked.generate(inputs, max_new_tokens, return_type="tokens")
    assert isinstance(ours, Tensor)
    run = hf_model.generate(
        **inputs.to_hf(),
        **{"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens, "max_length": None},
        **{"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    )
    theirs = run.sequences[:, inputs.input_ids.shape[1] :]
    width, compared, ties, wrong = min(ours.shape[1], theirs.shape[1]), 0, 0, 0
    differs = ours[:, :width] != theirs[:, :width]
    for row in range(len(inputs)):
        step = int(differs[row].int().argmax()) if bool(differs[row].any()) else width
        compared += step
        if step < width:
            scores, largest = run.scores[step][row].float(), float(run.logits[step][row].abs().max())
            lead = float(scores.max() - scores[ours[row, step]])
            is_tie = lead <= TOLERANCES[hooked.cfg.dtype] * max(1.0, largest)
            ties, wrong = ties + is_tie, wrong + (not is_tie)
    figure = f"{compared} tokens in {len(inputs)} rows, decoding: {hooked.decoding}"
    if ties:
        figure += (
            f"; {ties} rows part at two tokens that Hugging Face's scores put closer than rounding, and are "
            "compared up to there"
        )
    if wrong:
        figure += f"; {wrong} rows differ"
    return Check(name, wrong == 0, figure)


@torch.no_grad()
def _layers(hooked: HookedVLM, inputs: VLMInputs, quick: bool) -> Check:
    full_logits = hooked(inputs)
    largest_difference, n_layers = 0.0, hooked.cfg.n_layers
    layers = [n_layers // 2] if quick else range(n_layers + 1)
    for layer in layers:
        resid = hooked(inputs, stop_at_layer=layer)
        largest_difference = max(
            largest_difference,
            float((hooked(resid, start_at_layer=layer, inputs=inputs) - full_logits).abs().max()),
        )
    return Check(
        f"stopping and starting at {f'layer {layers[0]}' if quick else 'every layer'}",
        largest_difference == 0,
        f"max |difference| {largest_difference:.1e}",
    )


def _hooks(hooked: HookedVLM, inputs: VLMInputs, quick: bool) -> Check:
    names = sample_of_hooks(list(hooked.hook_dict)) if quick else list(hooked.hook_dict)
    without_effect = hooks_without_effect(hooked, inputs, names)
    of_all = f" of {len(hooked.hook_dict)}" if quick else ""
    figure = f"{len(names)}{of_all} hooks edited, {len(without_effect)} without effect"
    return Check(
        "every hook is causal",
        not without_effect,
        figure + (f": {', '.join(without_effect[:5])}" if without_effect else ""),
    )


@torch.no_grad()
def _geometry(hooked: HookedVLM) -> Check:
    """Check that a mark on one patch of a blank picture changes the embedding of that patch most.

    In the first and the last grid of the picture, where it has several.
    """
    side = hooked.cfg.vision.image_size
    blank = Image.new("RGB", (side, side) if side else (140, 112), (114, 114, 114))
    grids = hooked.prepare(blank, "Look.").patch_grids[0]
    placed = [
        _mark_is_placed(hooked, blank, image, place)
        for image in sorted({0, len(grids) - 1})
        for place in _corners(*grids[image])
    ]
    sizes = " and ".join(dict.fromkeys(f"{rows} × {columns}" for rows, columns in grids))
    shape = f"grid of {sizes}" if len(grids) == 1 else f"{len(grids)} grids of {sizes}"
    figure = f"{shape}, {placed.count(False)} of {len(placed)} marks misplaced"
    return Check("patches lie where the picture has them", all(placed), figure)


def _mark_is_placed(hooked: HookedVLM, blank: Image.Image, image: int, place: tuple[int, int]) -> bool:
    """Whether a mark on a patch of one of the picture's grids changes the embedding of that patch most."""
    clean = hooked.prepare(blank, "Look.")
    (rows, columns), (row, column) = clean.patch_grids[0][image], place
    left, top, right, bottom = clean.regions[0][image]
    x_range = [round(left + (right - left) * c / columns) for c in (column, column + 1)]
    y_range = [round(top + (bottom - top) * r / rows) for r in (row, row + 1)]
    marked = blank.copy()
    marked.paste((255, 255, 255), (x_range[0], y_range[0], x_range[1], y_range[1]))
    inputs = hooked.prepare([blank, marked], ["Look.", "Look."])
    _, cache = hooked.run_with_cache(inputs, names_filter="vision_encoder.hook_embed", stop_at_layer=0)
    entries = inputs.tower_entries[0]
    before, of_blank, of_marked = (
        sum(entries[:image]),
        *cache["vision_encoder.hook_embed"].split(sum(entries)),
    )
    change = (of_marked.float() - of_blank.float()).norm(dim=-1)[before : before + entries[image]]
    change = change[:, -clean.tower_patches[0][before] :]
    places = clean.layout(0, image).patch_places((rows, columns)).to(change.device)
    return divmod(int(change.flatten()[places].argmax()), columns) == place


def _corners(rows: int, columns: int) -> Sequence[tuple[int, int]]:
    return [(0, 0), (0, columns - 1), (rows - 1, 0), (rows - 1, columns - 1), (rows // 2, columns // 3)]


def _memory(hooked: HookedVLM) -> Check:
    weight_bytes = sum(p.numel() * p.element_size() for p in hooked.parameters())
    if hooked.cfg.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(hooked.cfg.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figure = f"{peak / 2**30:.2f} GiB at the peak, of which weights {weight_bytes / 2**30:.2f} GiB"
    return Check("memory", True, figure)
