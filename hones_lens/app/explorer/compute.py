"""The numbers behind an explorer: one pass of the model under the edits, and what follows from it.

Everything is of the model *as edited*. Two conventions hold throughout:

- A vector in the residual stream is read as tokens by `vocabulary_logits`. Divided by the final norm's scale
  at the position, what the heads, neurons and the embedding write adds up to the centred logits.
- What a head *feeds* a neuron is direct: `m_i(x) − m_i(x − γ₂ ∘ w / s)`, where x enters the neuron's FFN, w
  is what the head writes at that position, and γ₂, s are weight and scale of the norm before the FFN, the
  scale held. Paths through other heads and neurons are left out, and so is an edit of the neuron itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hones_lens.app.explorer.state import Edit, Place
from hones_lens.interventions import Hook
from hones_lens.model import HookedVLM, VLMInputs


@dataclass(frozen=True, eq=False)
class Said:
    """A prompt with the model's own answer to it, when nothing is changed.

    Attributes:
        prompt: Of one row.
        answer: New tokens [n_answer], the end of the sequence included if it was reached.
        sequence: The prompt, and the answer but its last token: every position predicts what comes next.
    """

    prompt: VLMInputs
    answer: Tensor
    sequence: VLMInputs

    @property
    def n_tokens(self) -> int:
        """Of the sequence."""
        return self.sequence.input_ids.shape[1]

    @property
    def first(self) -> int:
        """The last position of the prompt, which predicts the first token of the answer."""
        return self.n_tokens - len(self.answer)

    def step(self, token: int) -> int:
        """Which token of the answer is looked at from a position: the one predicted there, or the first."""
        return max(0, token - self.first)


@dataclass(frozen=True, eq=False)
class Pass:
    """Activations of one run over the sequence.

    Attributes:
        log_probs: Of the answer's tokens, after the prompt and those before them, [n_answer d_vocab].
        pattern: Attention of every head from one position, [layer head key].
        gate, linear: `mlp.hook_pre` and `mlp.hook_pre_linear` at that position, [layer d_mlp].
        z: Of the heads, [layer pos head d_head].
        post: The neurons, [layer pos d_mlp].
        resid: The stream that enters block 0, and that leaves each block, [layer + 1 pos d_model].
        scale: Of the norm before the FFN, [layer pos].
    """

    log_probs: Tensor
    pattern: Tensor
    gate: Tensor
    linear: Tensor
    z: Tensor
    post: Tensor
    resid: Tensor
    scale: Tensor


@torch.no_grad()
def say(model: HookedVLM, prompt: VLMInputs, max_new_tokens: int) -> Said:
    """Let the model answer.

    Raises:
        ValueError: Not one row.
    """
    prompt = model.with_image_embeds(model.as_inputs(prompt))
    if len(prompt) != 1:
        raise ValueError(f"an explorer shows one prompt, not {len(prompt)}")
    answer = model.generate(prompt, max_new_tokens, return_type="tokens")
    assert isinstance(answer, Tensor)
    return Said(prompt, answer[0], prompt.extended(answer[:, :-1]))


@torch.no_grad()
def run(model: HookedVLM, said: Said, edits: tuple[Edit, ...], token: int) -> Pass:
    """Run the sequence with edits, looking from one position."""
    kept: dict[str, list[Tensor]] = {}

    def keep(name: str, part: Any = slice(None)) -> Any:
        def read(x: Tensor, hook: HookPoint) -> None:
            kept.setdefault(name, []).append(x.detach()[0][part].clone())

        return read

    readers: list[Hook] = [("blocks.0.hook_resid_pre", keep("resid"))]
    for layer in range(model.cfg.n_layers):
        block = f"blocks.{layer}"
        readers += [
            (f"{block}.attn.hook_pattern", keep("pattern", (slice(None), token))),
            (f"{block}.attn.hook_z", keep("z")),
            (f"{block}.ln2.hook_scale", keep("scale", (slice(None), 0))),
            (f"{block}.mlp.hook_pre", keep("gate", token)),
            (f"{block}.mlp.hook_pre_linear", keep("linear", token)),
            (f"{block}.mlp.hook_post", keep("post")),
            (f"{block}.hook_resid_post", keep("resid")),
        ]
    hooks: Any = [*(edit.hook for edit in edits), *readers]  # the readers see what the edits leave
    logits = model.run_with_hooks(said.sequence, fwd_hooks=hooks, logits_to_keep=len(said.answer))
    stacked = {name: torch.stack(parts) for name, parts in kept.items()}
    return Pass(log_probs=logits[0].float().log_softmax(-1), **stacked)


# -- reading vectors as tokens ---------------------------------------------------------------------


def final_scale(model: HookedVLM, resid: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead"]:
    """What the final norm divides by, for a stream that leaves the last block."""
    return (resid.float().pow(2).mean(-1) + model.ln_final.eps).sqrt()


def direction_of(model: HookedVLM, token_id: int) -> Float[Tensor, " d_model"]:
    """The direction whose dot product with a vector is the token's entry of `vocabulary_logits`."""
    mean = model.W_U.detach().mean(1, dtype=torch.float32) * model.ln_final.weight.detach().float()
    return model.tokens_to_residual_directions(token_id).detach().float() - mean


def head_writes(model: HookedVLM, ran: Pass, place: Place, token: int) -> Float[Tensor, " d_model"]:
    """What a head adds to the residual stream at a position: `z W_O`."""
    layer, head = place
    return (ran.z[layer, token, head] @ model.blocks[layer].attn.W_O[head].detach()).float()


def direct_heads(
    model: HookedVLM, ran: Pass, direction: Float[Tensor, " d_model"], token: int
) -> Float[Tensor, "layer head"]:
    """What each head adds to a token's centred logit at a position: `⟨z W_O, direction⟩ / scale`."""
    found = [
        (ran.z[layer, token].float() * (block.attn.W_O.detach().float() @ direction)).sum(-1)
        for layer, block in enumerate(model.blocks)
    ]
    return torch.stack(found) / final_scale(model, ran.resid[-1, token])


def direct_neurons(
    model: HookedVLM, ran: Pass, direction: Float[Tensor, " d_model"], token: int
) -> Float[Tensor, "layer d_mlp"]:
    """What each neuron adds to a token's centred logit at a position: `m_i ⟨W_out[i], direction⟩ / scale`."""
    found = [
        ran.post[layer, token].float() * (block.mlp.W_out.detach() @ direction.to(model.cfg.dtype)).float()
        for layer, block in enumerate(model.blocks)
    ]
    return torch.stack(found) / final_scale(model, ran.resid[-1, token])


def lens(model: HookedVLM, ran: Pass, position: int) -> Float[Tensor, "layer d_vocab"]:
    """Probabilities of a position's stream, read through the final norm at block 0's entry and each exit."""
    with torch.no_grad():
        return model.unembed(model.ln_final(ran.resid[:, position])).float().softmax(-1)


def ov_directions(
    model: HookedVLM, place: Place, count: int
) -> tuple[Float[Tensor, " count"], Float[Tensor, "count d_model"]]:
    """Largest singular values of `diag(γ₁) W_V W_O`, and the directions that they write in.

    γ₁ is the weight of the norm before the attention. The product has rank d_head, so only small matrices
    are decomposed.
    """
    layer, head = place
    attn, norm = model.blocks[layer].attn, model.blocks[layer].ln1
    group = head // (attn.n_heads // attn.n_key_value_heads)
    reads = norm.weight.detach().float()[:, None] * attn.W_V[group].detach().float()
    rows, mixed = torch.linalg.qr(attn.W_O[head].detach().float().T)
    _, sizes, right = torch.linalg.svd(torch.linalg.qr(reads)[1] @ mixed.T)
    return sizes[:count], right[:count] @ rows.T


# -- who feeds whom --------------------------------------------------------------------------------


def fed_neurons(model: HookedVLM, ran: Pass, head: Place, token: int) -> Float[Tensor, "layer d_mlp"]:
    """What a head feeds every neuron at a position, in the neuron's own activation; 0 below the head."""
    writes = head_writes(model, ran, head, token)
    found = torch.zeros(model.cfg.n_layers, model.cfg.d_mlp, device=writes.device)
    for layer in range(head[0], model.cfg.n_layers):
        mlp = model.blocks[layer].mlp
        x = _into_ffn(model, ran, layer, token, writes)
        found[layer] = _lost(mlp, ran, layer, x @ mlp.W_gate.detach(), x @ mlp.W_in.detach())
    return found


def feeding_heads(model: HookedVLM, ran: Pass, neuron: Place, token: int) -> Float[Tensor, "layer head"]:
    """What every head feeds a neuron at a position, in the neuron's activation; 0 above the neuron."""
    layer, index = neuron
    mlp = model.blocks[layer].mlp
    found = torch.zeros(model.cfg.n_layers, model.cfg.n_heads, device=ran.post.device)
    for below in range(layer + 1):
        writes = torch.einsum("hd,hdm->hm", ran.z[below, token], model.blocks[below].attn.W_O.detach())
        x = _into_ffn(model, ran, layer, token, writes.float())
        into = (x @ mlp.W_gate.detach()[:, index, None], x @ mlp.W_in.detach()[:, index, None])
        found[below] = _lost(mlp, ran, layer, *into, index)[:, 0]
    return found


def _into_ffn(model: HookedVLM, ran: Pass, layer: int, token: int, writes: Tensor) -> Tensor:
    """`γ₂ ∘ w / s`: a part of the stream as the FFN of a layer reads it."""
    weight = model.blocks[layer].ln2.weight.detach().float()
    return (writes * weight / ran.scale[layer, token].float()).to(model.cfg.dtype)


def _lost(mlp: Any, ran: Pass, layer: int, gate: Tensor, linear: Tensor, index: int | None = None) -> Tensor:
    """By how much neurons fall when these parts of their inputs are taken away."""
    of = slice(None) if index is None else slice(index, index + 1)
    g, u = ran.gate[layer, of].float(), ran.linear[layer, of].float()
    return mlp.act(g) * u - mlp.act(g - gate.float()) * (u - linear.float())


def row_norms(model: HookedVLM) -> Float[Tensor, "layer d_mlp"]:
    """Lengths of the neurons' output rows: what a unit of activation writes."""
    return torch.stack([block.mlp.W_out.detach().float().norm(dim=1) for block in model.blocks])
