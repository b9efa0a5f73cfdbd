"""The data that an explorer's page draws, as JSON: a fixed scene, and sections that depend on the state."""

from __future__ import annotations

import base64
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hones_lens.analysis import promoted_tokens, vocabulary_logits
from hones_lens.app.explorer import compute
from hones_lens.app.explorer.compute import Activations
from hones_lens.app.explorer.state import Edit, LayerIndex, State
from hones_lens.hones import HeadScores
from hones_lens.model import HookedVLM, Pictures, leading_blanks, open_images, token_names
from hones_lens.results import largest, round_floats
from hones_lens.viz import image_uri

SECTIONS = ("answer", "map", "attention", "head", "neuron", "lens")
TOKENS, NEURONS, HEADS, CANDIDATES, DIRECTIONS = 6, 10, 6, 5, 3  # how many of each are listed
_DIGITS = 6


class ExplorerViews:
    """The scene and the sections of an explorer of one prompt.

    Several threads may share an instance: a lock lets one of them run the model at a time.

    Args:
        model: The model.
        pictures: The prompt's picture, a list of pictures, or None.
        prompt: The user's text.
        heads: Scores for the map of heads; default: each head's direct effect on the answer's logit.
        max_new_tokens: Longest answer.

    Raises:
        FileNotFoundError, ValueError: As `HookedVLM.prepare`; ValueError also for scores of another shape.
    """

    def __init__(
        self,
        model: HookedVLM,
        pictures: Pictures,
        prompt: str,
        heads: HeadScores | None = None,
        max_new_tokens: int = 12,
    ):
        shape = (model.cfg.n_layers, model.cfg.n_heads)
        if heads is not None and tuple(heads.scores.shape) != shape:
            raise ValueError(f"head scores {tuple(heads.scores.shape)} for a model of {shape} heads")
        self.pictures = open_images(pictures)
        self.model, self.heads, self.max_new_tokens = model, heads, max_new_tokens
        inputs = model.prepare([self.pictures] if self.pictures else [None], [prompt])
        self.answered = compute.answer_prompt(model, inputs, max_new_tokens)
        self._passes: dict[tuple[Any, ...], Activations] = {}
        said = model.tokenizer.decode(self.answered.answer, skip_special_tokens=True).strip()
        self._texts: dict[tuple[Edit, ...], str] = {(): said}
        self._norms = compute.neuron_output_norms(model)
        self._lock = threading.Lock()  # hooks are set on the shared model
        self.base = self.activations((), self.answered.last_prompt_position).log_probs

    # -- cached computations ----------------------------------------------------------------------

    def activations(self, edits: tuple[Edit, ...], token: int) -> Activations:
        """Activations under the edits, with attention from a token; the latest result is cached."""
        key = (edits, token)
        with self._lock:
            if key not in self._passes:
                self._passes = {key: compute.run_with_edits(self.model, self.answered, edits, token)}
            return self._passes[key]

    def text(self, edits: tuple[Edit, ...]) -> str:
        """The model's answer under the edits."""
        with self._lock:
            if edits not in self._texts:
                with self.model.hooks([edit.hook for edit in edits]):
                    answers = self.model.generate(self.answered.prompt, self.max_new_tokens)
                (self._texts[edits],) = map(str, answers)
            return self._texts[edits]

    def start(self) -> State:
        """The initial state: the head of highest score and the neuron it feeds most.

        At the end of the prompt, or of the white space that the answer begins with.
        """
        token = self.answered.last_prompt_position + leading_blanks(self.model, self.answered.answer.tolist())
        head = self.ranked_heads(State(token, token, (0, 0), (0, 0)))[0]
        state = State(token, token, head, (0, 0))
        layer, index = self.fed_neurons(state)[0][:2]
        return State(token, token, head, (layer, index))

    def ranked_heads(self, state: State) -> list[LayerIndex]:
        """All heads, those with the highest values on the state's map first; those without a value last."""
        values = self._map_scores(state).double().nan_to_num(-torch.inf)
        width = values.shape[1]
        order = values.flatten().argsort(descending=True, stable=True).tolist()
        return [(i // width, i % width) for i in order]

    @property
    def attention_bytes(self) -> int:
        """What the attention of all heads from one token takes in a page, about."""
        return self.model.cfg.n_layers * self.model.cfg.n_heads * self.answered.n_tokens * 4 // 3

    def fed_neurons(self, state: State) -> list[list[Any]]:
        """Neurons that the state's head feeds most, as (layer, index, Δm_i, Δm_i ‖W_out[i]‖).

        Δm_i is the part of the activation that is due to the head. Ordered by `|Δm_i| ‖W_out[i]‖`.
        """
        activations = self.activations(state.edits, state.token)
        change = compute.fed_neurons(self.model, activations, state.head, state.token)
        written = change * self._norms
        if (scale := activations.mlp_scale) is not None:
            written = written / scale[:, state.token, None].float()
        order = largest(written.abs().flatten(), NEURONS)
        width = change.shape[1]
        neurons = [(i // width, i % width) for i in order]
        return [[*neuron, change[neuron].item(), written[neuron].item()] for neuron in neurons]

    # -- the scene ---------------------------------------------------------------------------------

    def scene(self) -> dict[str, Any]:
        """Pictures, grids, tokens and sizes of the model, which do not depend on the state."""
        cfg, answered, inputs = self.model.cfg, self.answered, self.answered.sequence
        ids = inputs.input_ids[0].tolist()
        image = inputs.image_mask[0].tolist()
        return {
            "model": cfg.model_name,
            "layers": cfg.n_layers,
            "heads": cfg.n_heads,
            "neurons": cfg.d_mlp,
            "images": self._images(),
            "tokens": [self._token_cell(t, is_image) for t, is_image in zip(ids, image, strict=True)],
            "first": answered.last_prompt_position,
            "answer": [self._token_cell(t, False) for t in answered.answer.tolist()],
            "text": self.text(()),
            "scores": None if self.heads is None else f"{self.heads.task}: drop of {self.heads.metric_name}",
        }

    def _images(self) -> list[dict[str, Any]]:
        inputs, images = self.answered.prompt, []
        for i, (rows, columns) in enumerate(inputs.grids[0]):
            picture = self.pictures[inputs.picture_of(0, i)]
            cells: list[int] = inputs.cell_positions(0, i).flatten().tolist()
            left, top, right, bottom = inputs.regions[0][i]
            width, height = picture.size
            images.append(
                {
                    "src": image_uri(picture, 448),
                    "width": width,
                    "height": height,
                    "region": [left / width, top / height, right / width, bottom / height],
                    "rows": rows,
                    "columns": columns,
                    "start": int(inputs.image_positions(0, i)[0]),
                    "cells": [None if position < 0 else position for position in cells],
                }
            )
        return images

    def _token_cell(self, token_id: int, is_image: bool) -> dict[str, Any]:
        if is_image:
            return {"image": True}
        return {"text": self.readable(token_id), "raw": self.vocabulary_entry(token_id), "id": token_id}

    def vocabulary_entry(self, token_id: int) -> str:
        """A token's string in the vocabulary, for tooltips."""
        return self.model.tokenizer.convert_ids_to_tokens(token_id) or self.readable(token_id)

    def readable(self, token_id: int) -> str:
        """A token as it reads in text, white space as visible signs."""
        return token_names(self.model, [token_id])[0]

    def position_name(self, position: int) -> str:
        """Description of a position: its token, or the row and column of its patch."""
        inputs = self.answered.sequence
        if not bool(inputs.image_mask[0, position]):
            return f"“{self.readable(int(inputs.input_ids[0, position]))}”"
        for image in self._images():
            if position in image["cells"]:
                patch = image["cells"].index(position)
                return f"patch ({patch // image['columns']}, {patch % image['columns']})"
        return "an image token outside of the grid"

    # -- the sections ------------------------------------------------------------------------------

    def section(self, name: str, state: State) -> dict[str, Any]:
        """Data of one of SECTIONS, for the model under the state's edits.

        Raises:
            ValueError: The state does not fit the model or the prompt.
        """
        state.check(self.model.cfg, self.answered.n_tokens)
        with torch.no_grad():
            return getattr(self, f"_{name}")(state)

    def _answer(self, state: State) -> dict[str, Any]:
        """The answer under the edits, the unedited answer's probabilities, and the top candidates."""
        log_probs, step = (
            self.activations(state.edits, state.token).log_probs,
            self.answered.answer_index(state.token),
        )
        ids = self.answered.answer
        answer_probs = [
            values.gather(1, ids[:, None])[:, 0].exp().tolist() for values in (log_probs, self.base)
        ]
        candidates = log_probs[step].topk(min(CANDIDATES, log_probs.shape[1])).indices.tolist()
        clean_best = int(self.base[step].argmax())
        candidates = candidates if clean_best in candidates else [*candidates[:-1], clean_best]
        return {
            "text": self.text(state.edits),
            "step": step,
            "p": answer_probs[0],
            "was": answer_probs[1],
            "likely": [
                [
                    self.readable(t),
                    log_probs[step, t].exp().item(),
                    self.base[step, t].exp().item(),
                    self.vocabulary_entry(t),
                ]
                for t in candidates
            ],
        }

    def _map(self, state: State) -> dict[str, Any]:
        """Scores of all heads, and the neurons with the largest direct effect on the answer's logit."""
        token, direction = self._target(state)
        direct = compute.direct_neurons(
            self.model, self.activations(state.edits, state.token), direction, token
        )
        order = largest(direct.flatten(), NEURONS)
        width = direct.shape[1]
        rows = [[i // width, i % width, direct[i // width, i % width].item()] for i in order]
        return {
            "scores": _rounded(self._map_values(state)),
            "neurons": _rounded(rows),
            "step": self.answered.answer_index(state.token),
        }

    def _target(self, state: State) -> tuple[int, Tensor]:
        """The position that predicts the answer's token, and that token's direction."""
        step = self.answered.answer_index(state.token)
        return self.answered.last_prompt_position + step, compute.logit_direction(
            self.model, int(self.answered.answer[step])
        )

    def _map_values(self, state: State) -> list[list[float | None]]:
        """The map of heads; None where a head was not measured."""
        return [[None if v != v else v for v in row] for row in self._map_scores(state).tolist()]

    @torch.no_grad()
    def _map_scores(self, state: State) -> Tensor:
        if self.heads is not None:
            return self.heads.scores
        token, direction = self._target(state)
        return compute.direct_heads(
            self.model, self.activations(state.edits, state.token), direction, token
        ).cpu()

    def _attention(self, state: State) -> dict[str, Any]:
        """Attention of all heads from the token, as bytes: 255 is each head's largest weight."""
        pattern = self.activations(state.edits, state.token).pattern.float().cpu()
        largest = pattern.amax(-1)
        packed = (pattern / largest.clamp(min=1e-12)[..., None] * 255).round().to(torch.uint8)
        return {
            "keys": pattern.shape[-1],
            "largest": _rounded(largest.tolist()),
            "bytes": base64.b64encode(np.ascontiguousarray(packed.numpy()).tobytes()).decode(),
        }

    def _head(self, state: State) -> dict[str, Any]:
        """A head at the token: its attention, the tokens it raises and lowers, and the neurons it feeds."""
        activations, (layer, head) = self.activations(state.edits, state.token), state.head
        writes = compute.head_writes(self.model, activations, state.head, state.token)
        logit_effects = vocabulary_logits(self.model, writes) / compute.final_scale(
            self.model, activations.resid[-1, state.token]
        )
        sizes, directions = compute.ov_directions(self.model, state.head, DIRECTIONS)
        projections = directions @ writes
        directions = directions * torch.where(projections < 0, -1.0, 1.0)[:, None]
        direction_logits = vocabulary_logits(self.model, directions)
        return {
            "place": list(state.head),
            "attention": _rounded(activations.pattern[layer, head].float().tolist()),
            "norm": _rounded(writes.norm().item()),
            "up": self._extreme_tokens(logit_effects),
            "down": self._extreme_tokens(logit_effects, largest=False),
            "directions": [
                {
                    "size": _rounded(size),
                    "along": _rounded(abs(projection)),
                    "up": self._extreme_tokens(logits),
                }
                for size, projection, logits in zip(
                    sizes.tolist(), projections.tolist(), direction_logits, strict=True
                )
            ],
            "feeds": _rounded(self.fed_neurons(state)),
        }

    def _neuron(self, state: State) -> dict[str, Any]:
        """A neuron: its activations, and at the token what it raises and lowers and which heads feed it."""
        activations, (layer, index) = self.activations(state.edits, state.token), state.neuron
        feeding = compute.feeding_heads(self.model, activations, state.neuron, state.token)
        order = largest(feeding.abs().flatten(), HEADS)
        heads: list[LayerIndex] = [(i // feeding.shape[1], i % feeding.shape[1]) for i in order]
        target_position, direction = self._target(state)
        output_row = compute.added(
            self.model,
            activations,
            layer,
            "mlp",
            target_position,
            self.model.blocks[layer].mlp.W_out[index].detach(),
        )
        direct = activations.post[layer, target_position, index].float() * (output_row @ direction)
        activation, k = activations.post[layer, state.token, index, None], self._n_tokens
        up, down = (
            promoted_tokens(self.model, [state.neuron], activation, k, largest=largest)
            for largest in (True, False)
        )
        return {
            "place": list(state.neuron),
            "activation": _rounded(activations.post[layer, :, index].float().tolist()),
            "direct": _rounded(
                (direct / compute.final_scale(self.model, activations.resid[-1, target_position])).item()
            ),
            "sign": _rounded(up.signs[0].item()),
            "up": self._token_values(up.logits[0], up.ids[0]),
            "down": self._token_values(down.logits[0], down.ids[0]),
            "fed": _rounded([[*head, feeding[head].item()] for head in heads if head[0] <= layer]),
        }

    def _lens(self, state: State) -> dict[str, Any]:
        """Top tokens of the logit lens of a position, at the input of block 0 and after every block."""
        probabilities = compute.lens(self.model, self.activations(state.edits, state.token), state.lens)
        values, ids = probabilities.topk(3)
        rows = [
            [[self.readable(t), _rounded(p), self.vocabulary_entry(t)] for p, t in zip(*row, strict=True)]
            for row in zip(values.tolist(), ids.tolist(), strict=True)
        ]
        return {"position": state.lens, "rows": rows}

    @property
    def _n_tokens(self) -> int:
        return min(TOKENS, self.model.cfg.d_vocab)

    def _extreme_tokens(self, values: Tensor, largest: bool = True) -> list[list[Any]]:
        """The tokens of the largest or smallest values, as in `_token_values`."""
        top = values.topk(self._n_tokens, largest=largest)
        return self._token_values(top.values, top.indices)

    def _token_values(self, values: Tensor, ids: Tensor) -> list[list[Any]]:
        """A row for each token: its text, its value, and its string in the vocabulary."""
        return [
            [self.readable(t), _rounded(v), self.vocabulary_entry(t)]
            for v, t in zip(values.tolist(), ids.tolist(), strict=True)
        ]


def _rounded(value: Any) -> Any:
    return round_floats(value, _DIGITS)


def section_inputs(name: str, state: State) -> tuple[Any, ...]:
    """The parts of the state that a section depends on; a section is recomputed only when they change."""
    selections = {
        "answer": (),
        "map": (),
        "attention": (),
        "head": (state.head,),
        "neuron": (state.neuron,),
        "lens": (state.lens,),
    }
    return (state.edits, state.token if name != "lens" else None, *selections[name])
