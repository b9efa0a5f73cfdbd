"""What an explorer's page draws, as JSON: a scene that stays, and sections that follow from the state."""

from __future__ import annotations

import base64
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hones_lens.analysis import promoted_tokens, vocabulary_logits
from hones_lens.app.explorer import compute
from hones_lens.app.explorer.compute import Pass
from hones_lens.app.explorer.state import Edit, Place, State
from hones_lens.hones import HeadScores
from hones_lens.model import HookedVLM, Picture, open_image
from hones_lens.results import round_floats
from hones_lens.viz import image_uri

SECTIONS = ("answer", "map", "attention", "head", "neuron", "lens")
TOKENS, NEURONS, HEADS, CANDIDATES, DIRECTIONS = 6, 10, 6, 5, 3  # how many of each are listed
_DIGITS = 6


class Views:
    """The sections of an explorer of one prompt. Threads may share it: the model runs for one at a time.

    Args:
        model: The model.
        pictures: Those of the prompt: one, a list, or None.
        prompt: What the user says.
        heads: Scores for the map of heads; default: each head's direct effect on the answer's logit.
        max_new_tokens: Longest answer.

    Raises:
        FileNotFoundError, ValueError: As `HookedVLM.prepare`; or scores of another model's shape.
    """

    def __init__(
        self,
        model: HookedVLM,
        pictures: Picture | Sequence[Picture] | None,
        prompt: str,
        heads: HeadScores | None = None,
        max_new_tokens: int = 12,
    ):
        shape = (model.cfg.n_layers, model.cfg.n_heads)
        if heads is not None and tuple(heads.scores.shape) != shape:
            raise ValueError(f"head scores {tuple(heads.scores.shape)} for a model of {shape} heads")
        one = isinstance(pictures, (Image.Image, str)) or not isinstance(pictures, Sequence)
        given = [] if pictures is None else [pictures] if one else list(pictures)  # type: ignore[arg-type]
        self.pictures = [open_image(picture) for picture in given]  # type: ignore[arg-type]
        self.model, self.heads, self.max_new_tokens = model, heads, max_new_tokens
        inputs = model.prepare([self.pictures] if self.pictures else [None], [prompt])
        self.said = compute.say(model, inputs, max_new_tokens)
        self._passes: dict[tuple[Any, ...], Pass] = {}
        self._texts: dict[tuple[Edit, ...], str] = {}
        self._norms = compute.row_norms(model)
        self._alone = threading.Lock()  # hooks are the model's
        self.base = self.ran((), self.said.first).log_probs

    # -- what is computed once, or kept ------------------------------------------------------------

    def ran(self, edits: tuple[Edit, ...], token: int) -> Pass:
        """The pass under edits, looking from a token; the last one is kept."""
        key = (edits, token)
        with self._alone:
            if key not in self._passes:
                self._passes = {key: compute.run(self.model, self.said, edits, token)}
            return self._passes[key]

    def text(self, edits: tuple[Edit, ...]) -> str:
        """What the model says under edits."""
        with self._alone:
            if edits not in self._texts:
                with self.model.hooks([edit.hook for edit in edits]):
                    said = self.model.generate(self.said.prompt, self.max_new_tokens)
                (self._texts[edits],) = map(str, said)
            return self._texts[edits]

    def start(self) -> State:
        """The head that matters most, the neuron that it feeds most, looked at from the prompt's end."""
        token = self.said.first
        scores = torch.tensor(self._map_values(State(token, token, (0, 0), (0, 0))), dtype=torch.float64)
        best = int(scores.nan_to_num(-torch.inf).argmax())
        head = (best // scores.shape[1], best % scores.shape[1])
        state = State(token, token, head, (0, 0))
        layer, index = self.fed(state)[0][:2]
        return State(token, token, head, (layer, index))

    def fed(self, state: State) -> list[list[Any]]:
        """Neurons that the state's head feeds: (layer, index, change of activation, of what is written).

        Ordered by the length of what they write because of the head: `|Δm_i| ‖W_out[i]‖`.
        """
        change = compute.fed_neurons(self.model, self.ran(state.edits, state.token), state.head, state.token)
        written = change * self._norms
        order = written.abs().flatten().argsort(descending=True, stable=True)[:NEURONS].tolist()
        width = change.shape[1]
        places = [(i // width, i % width) for i in order]
        return [[*place, change[place].item(), written[place].item()] for place in places]

    # -- the scene ---------------------------------------------------------------------------------

    def scene(self) -> dict[str, Any]:
        """Picture, grid, tokens and sizes: what no click changes."""
        cfg, said, inputs = self.model.cfg, self.said, self.said.sequence
        ids = inputs.input_ids[0].tolist()
        image = inputs.image_mask[0].tolist()
        return {
            "model": cfg.model_name,
            "layers": cfg.n_layers,
            "heads": cfg.n_heads,
            "neurons": cfg.d_mlp,
            "images": self._images(),
            "tokens": [self._cell(t, is_image) for t, is_image in zip(ids, image, strict=True)],
            "first": said.first,
            "answer": [self._cell(t, False) for t in said.answer.tolist()],
            "text": self.text(()),
            "scores": None if self.heads is None else f"{self.heads.task}: drop of {self.heads.metric_name}",
        }

    def _images(self) -> list[dict[str, Any]]:
        inputs, found = self.said.prompt, []
        places = inputs.image_mask[0].nonzero()[:, 0].tolist()
        for i, picture in enumerate(self.pictures):
            rows, columns = inputs.grids[0][i]
            mine, places = places[: (n := rows * columns + inputs.leading_tokens)], places[n:]
            left, top, right, bottom = inputs.regions[0][i]
            width, height = picture.size
            found.append(
                {
                    "src": image_uri(picture, 448),
                    "width": width,
                    "height": height,
                    "region": [left / width, top / height, right / width, bottom / height],
                    "rows": rows,
                    "columns": columns,
                    "first": mine[inputs.leading_tokens],
                    "leading": inputs.leading_tokens,
                }
            )
        return found

    def _cell(self, token_id: int, is_image: bool) -> dict[str, Any]:
        if is_image:
            return {"image": True}
        return {"text": self.readable(token_id), "raw": self.raw(token_id), "id": token_id}

    def raw(self, token_id: int) -> str:
        """A token as the vocabulary has it, for tooltips."""
        return self.model.tokenizer.convert_ids_to_tokens(token_id) or f"#{token_id}"

    def readable(self, token_id: int) -> str:
        """A token as text; white space by its signs, half a letter as the vocabulary has it."""
        text = self.model.tokenizer.decode([token_id])
        if "\ufffd" in text:
            return self.raw(token_id)
        return text.strip() or text.replace("\n", "↵").replace(" ", "␣").replace("\t", "⇥") or "␣"

    def position_name(self, position: int) -> str:
        """A position in words: its token, or which patch it is."""
        inputs = self.said.sequence
        if not bool(inputs.image_mask[0, position]):
            return f"“{self.readable(int(inputs.input_ids[0, position]))}”"
        for image in self._images():
            at = position - image["first"]
            if 0 <= at < image["rows"] * image["columns"]:
                return f"patch ({at // image['columns']}, {at % image['columns']})"
        return "an image token outside of the grid"

    # -- the sections ------------------------------------------------------------------------------

    def section(self, name: str, state: State) -> dict[str, Any]:
        """One of SECTIONS, of the model as the state edits it.

        Raises:
            ValueError: A state that does not fit.
        """
        state.check(self.model.cfg, self.said.n_tokens)
        with torch.no_grad():
            return getattr(self, f"_{name}")(state)

    def _answer(self, state: State) -> dict[str, Any]:
        """The answer under the edits, probabilities of the unedited answer's tokens, and the likeliest."""
        now, step = self.ran(state.edits, state.token).log_probs, self.said.step(state.token)
        ids = self.said.answer
        chosen = [log_probs.gather(1, ids[:, None])[:, 0].exp().tolist() for log_probs in (now, self.base)]
        likely = now[step].topk(min(CANDIDATES, now.shape[1])).indices.tolist()
        most = int(self.base[step].argmax())
        likely = likely if most in likely else [*likely[:-1], most]
        return {
            "text": self.text(state.edits),
            "step": step,
            "p": chosen[0],
            "was": chosen[1],
            "likely": [
                [self.readable(t), now[step, t].exp().item(), self.base[step, t].exp().item(), self.raw(t)]
                for t in likely
            ],
        }

    def _map(self, state: State) -> dict[str, Any]:
        """Scores of all heads, and the neurons that add most to the answer's logit."""
        token, direction = self._aim(state)
        direct = compute.direct_neurons(self.model, self.ran(state.edits, state.token), direction, token)
        order = direct.flatten().argsort(descending=True, stable=True)[:NEURONS].tolist()
        width = direct.shape[1]
        rows = [[i // width, i % width, direct[i // width, i % width].item()] for i in order]
        return {
            "scores": _rounded(self._map_values(state)),
            "neurons": _rounded(rows),
            "step": self.said.step(state.token),
        }

    def _aim(self, state: State) -> tuple[int, Tensor]:
        """The position that predicts the answer's token, and that token's direction."""
        step = self.said.step(state.token)
        return self.said.first + step, compute.direction_of(self.model, int(self.said.answer[step]))

    def _map_values(self, state: State) -> list[list[float | None]]:
        if self.heads is not None:
            values = self.heads.scores.tolist()
            return [[None if v != v else v for v in row] for row in values]
        token, direction = self._aim(state)
        ran = self.ran(state.edits, state.token)
        with torch.no_grad():
            return compute.direct_heads(self.model, ran, direction, token).tolist()

    def _attention(self, state: State) -> dict[str, Any]:
        """Attention of all heads from the token: bytes, 255 for each head's largest weight."""
        pattern = self.ran(state.edits, state.token).pattern.float().cpu()
        largest = pattern.amax(-1)
        packed = (pattern / largest.clamp(min=1e-12)[..., None] * 255).round().to(torch.uint8)
        return {
            "keys": pattern.shape[-1],
            "largest": _rounded(largest.tolist()),
            "bytes": base64.b64encode(np.ascontiguousarray(packed.numpy()).tobytes()).decode(),
        }

    def _head(self, state: State) -> dict[str, Any]:
        """What a head looks at, writes and feeds, at the token."""
        ran, (layer, head) = self.ran(state.edits, state.token), state.head
        writes = compute.head_writes(self.model, ran, state.head, state.token)
        effect = vocabulary_logits(self.model, writes) / compute.final_scale(
            self.model, ran.resid[-1, state.token]
        )
        sizes, directions = compute.ov_directions(self.model, state.head, DIRECTIONS)
        along = directions @ writes
        directions = directions * torch.where(along < 0, -1.0, 1.0)[:, None]
        read = vocabulary_logits(self.model, directions)
        return {
            "place": list(state.head),
            "attention": _rounded(ran.pattern[layer, head].float().tolist()),
            "norm": _rounded(writes.norm().item()),
            "up": self._listed(effect),
            "down": self._listed(effect, largest=False),
            "directions": [
                {"size": _rounded(size), "along": _rounded(abs(a)), "up": self._listed(row)}
                for size, a, row in zip(sizes.tolist(), along.tolist(), read, strict=True)
            ],
            "feeds": _rounded(self.fed(state)),
        }

    def _neuron(self, state: State) -> dict[str, Any]:
        """Where a neuron is active, what it writes as active at the token, and which heads feed it there."""
        ran, (layer, index) = self.ran(state.edits, state.token), state.neuron
        row = self.model.blocks[layer].mlp.W_out[index].detach()
        feeding = compute.feeding_heads(self.model, ran, state.neuron, state.token)
        order = feeding.abs().flatten().argsort(descending=True, stable=True)[:HEADS].tolist()
        places: list[Place] = [(i // feeding.shape[1], i % feeding.shape[1]) for i in order]
        aim, direction = self._aim(state)
        direct = ran.post[layer, aim, index].float() * (row.float() @ direction)
        here, k = ran.post[layer, state.token, index, None], self._listed_tokens
        up, down = (
            promoted_tokens(self.model, [state.neuron], here, k, largest=largest) for largest in (True, False)
        )
        return {
            "place": list(state.neuron),
            "activation": _rounded(ran.post[layer, :, index].float().tolist()),
            "direct": _rounded((direct / compute.final_scale(self.model, ran.resid[-1, aim])).item()),
            "sign": _rounded(up.signs[0].item()),
            "up": self._named(up.logits[0], up.ids[0]),
            "down": self._named(down.logits[0], down.ids[0]),
            "fed": _rounded([[*place, feeding[place].item()] for place in places if place[0] <= layer]),
        }

    def _lens(self, state: State) -> dict[str, Any]:
        """The likeliest tokens of a position at the entry of block 0 and after every block."""
        probabilities = compute.lens(self.model, self.ran(state.edits, state.token), state.lens)
        values, ids = probabilities.topk(3)
        rows = [
            [[self.readable(t), _rounded(p), self.raw(t)] for p, t in zip(*row, strict=True)]
            for row in zip(values.tolist(), ids.tolist(), strict=True)
        ]
        return {"position": state.lens, "rows": rows}

    @property
    def _listed_tokens(self) -> int:
        return min(TOKENS, self.model.cfg.d_vocab)

    def _listed(self, values: Tensor, largest: bool = True) -> list[list[Any]]:
        """The tokens of the largest or smallest values: text, value, as the vocabulary has it."""
        top = values.topk(self._listed_tokens, largest=largest)
        return self._named(top.values, top.indices)

    def _named(self, values: Tensor, ids: Tensor) -> list[list[Any]]:
        """Tokens with a value each: text, value, as the vocabulary has it."""
        return [
            [self.readable(t), _rounded(v), self.raw(t)]
            for v, t in zip(values.tolist(), ids.tolist(), strict=True)
        ]


def _rounded(value: Any) -> Any:
    return round_floats(value, _DIGITS)


def reads(name: str, state: State) -> tuple[Any, ...]:
    """What of the state a section depends on: it need not be made anew while that stays."""
    parts = {
        "answer": (),
        "map": (),
        "attention": (),
        "head": (state.head,),
        "neuron": (state.neuron,),
        "lens": (state.lens,),
    }
    return (state.edits, state.token if name != "lens" else None, *parts[name])
