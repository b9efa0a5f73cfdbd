"""The quantities that the explorer shows, computed from one forward pass of the model under the edits.

All quantities are those of the model *as edited*. Two conventions hold throughout:

- A vector in the residual stream is read as tokens by `vocabulary_logits`. Divided by the final norm's scale
  at the position, what the heads, neurons and the embedding write adds up to the centred logits.
- What a head *feeds* a neuron is direct: `m_i(x) − m_i(x − γ₂ ∘ w / s)`, where x enters the neuron's FFN, w
  is what the head writes at that position, and γ₂, s are weight and scale of the norm before the FFN, the
  scale held. Paths through other heads and neurons are not counted, nor is an edit of the neuron itself.

Where a norm is behind attention or MLP, what a head or a neuron writes means what it adds to the stream, that
norm's scale held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hones_lens.app.explorer.state import Edit, LayerIndex
from hones_lens.interventions import Hook
from hones_lens.model import PARTS, HookedVLM, Part, VLMInputs, scale_hook, weighted


@dataclass(frozen=True, eq=False)
class AnsweredPrompt:
    """A prompt and the answer that the unedited model generates to it.

    Attributes:
        prompt: The prompt, a batch of one row.
        answer: Generated token ids [n_answer], with the end-of-sequence token if it was reached.
        sequence: The prompt followed by the answer without its last token, so that every position from the
            last one of the prompt on predicts a token of the answer.
    """

    prompt: VLMInputs
    answer: Tensor
    sequence: VLMInputs

    @property
    def n_tokens(self) -> int:
        """Number of tokens in `sequence`."""
        return self.sequence.input_ids.shape[1]

    @property
    def last_prompt_position(self) -> int:
        """The last position of the prompt, which predicts the first token of the answer."""
        return self.n_tokens - len(self.answer)

    def answer_index(self, token: int) -> int:
        """Index of the answer token that a position predicts; 0 before the end of the prompt."""
        return max(0, token - self.last_prompt_position)


@dataclass(frozen=True, eq=False)
class Activations:
    """Activations of one forward pass over the sequence.

    Attributes:
        log_probs: Next-token log-probabilities at the positions that predict the answer, [n_answer d_vocab].
        pattern: Attention of every head from one query position, [layer head key].
        gate, linear: `mlp.hook_pre` and `mlp.hook_pre_linear` at that position, [layer d_mlp].
        z: Outputs of the heads before W_O, [layer pos head d_head].
        post: Activations of the neurons, [layer pos d_mlp].
        resid: The residual stream that enters block 0, and that leaves each block, [layer + 1 pos d_model].
        scale: What the norm before the FFN divides by, [layer pos].
        attn_scale, mlp_scale: What the norms behind attention and MLP divide by, [layer pos]; None without.
    """

    log_probs: Tensor
    pattern: Tensor
    gate: Tensor
    linear: Tensor
    z: Tensor
    post: Tensor
    resid: Tensor
    scale: Tensor
    attn_scale: Tensor | None = None
    mlp_scale: Tensor | None = None


@torch.no_grad()
def answer_prompt(model: HookedVLM, prompt: VLMInputs, max_new_tokens: int) -> AnsweredPrompt:
    """Generate the model's answer to one prompt.

    Raises:
        ValueError: The prompt is not exactly one row.
    """
    prompt = model.with_image_embeds(model.as_inputs(prompt))
    if len(prompt) != 1:
        raise ValueError(f"an explorer shows one prompt, not {len(prompt)}")
    answer = model.generate(prompt, max_new_tokens, return_type="tokens")
    assert isinstance(answer, Tensor)
    return AnsweredPrompt(prompt, answer[0], prompt.extended(answer[:, :-1]))


@torch.no_grad()
def run_with_edits(
    model: HookedVLM, answered: AnsweredPrompt, edits: tuple[Edit, ...], token: int
) -> Activations:
    """Run the sequence under the edits; `token` is the query position of `pattern`."""
    recorded: dict[str, Tensor] = {}
    n_layers = model.cfg.n_layers

    def recorder(name: str, index: Any = slice(None), row: int = 0, n_rows: int = n_layers) -> Any:
        def record(x: Tensor, hook: HookPoint) -> None:
            values = x.detach()[0][index]
            if name not in recorded:  # one array for all layers: those of the neurons are gigabytes
                recorded[name] = values.new_empty(n_rows, *values.shape)
            recorded[name][row] = values

        return record

    recorders: list[Hook] = [("blocks.0.hook_resid_pre", recorder("resid", row=0, n_rows=n_layers + 1))]
    for layer in range(n_layers):
        block = f"blocks.{layer}"
        recorders += [
            (f"{block}.attn.hook_pattern", recorder("pattern", (slice(None), token), layer)),
            (f"{block}.attn.hook_z", recorder("z", row=layer)),
            (f"{block}.ln2.hook_scale", recorder("scale", (slice(None), 0), layer)),
            (f"{block}.mlp.hook_pre", recorder("gate", token, layer)),
            (f"{block}.mlp.hook_pre_linear", recorder("linear", token, layer)),
            (f"{block}.mlp.hook_post", recorder("post", row=layer)),
            (f"{block}.hook_resid_post", recorder("resid", row=layer + 1, n_rows=n_layers + 1)),
        ]
        for part in PARTS:
            if (hook := scale_hook(model.blocks[layer], layer, part)) is not None:
                recorders.append((hook, recorder(f"{part}_scale", (slice(None), 0), layer)))
    hooks: Any = [
        *(edit.hook for edit in edits),
        *recorders,
    ]  # recorders come last, so they see edited values
    logits = model.run_with_hooks(answered.sequence, fwd_hooks=hooks, logits_to_keep=len(answered.answer))
    return Activations(log_probs=logits[0].float().log_softmax(-1), **recorded)


# -- reading vectors as tokens ---------------------------------------------------------------------


def final_scale(model: HookedVLM, resid: Float[Tensor, "*lead d_model"]) -> Float[Tensor, "*lead"]:
    """The divisor of the final norm, for a residual stream that leaves the last block."""
    return (resid.float().pow(2).mean(-1) + model.ln_final.eps).sqrt()


def logit_direction(model: HookedVLM, token_id: int) -> Float[Tensor, " d_model"]:
    """The direction whose dot product with a vector is the token's entry of `vocabulary_logits`."""
    mean = model.W_U.detach().mean(1, dtype=torch.float32) * model.ln_final.weight.detach().float()
    return model.tokens_to_residual_directions(token_id).detach().float() - mean


def added(
    model: HookedVLM, activations: Activations, layer: int, part: Part, token: int, written: Tensor
) -> Tensor:
    """What heads or neurons add at a position, from what they write; so too directions to read that along."""
    scale = activations.attn_scale if part == "attn" else activations.mlp_scale
    vectors = weighted(model.blocks[layer], part, written.float())
    return vectors if scale is None else vectors / scale[layer, token].float()


def head_writes(
    model: HookedVLM, activations: Activations, component: LayerIndex, token: int
) -> Float[Tensor, " d_model"]:
    """What a head adds to the residual stream at a position: `z W_O`."""
    layer, head = component
    written = activations.z[layer, token, head] @ model.blocks[layer].attn.W_O[head].detach()
    return added(model, activations, layer, "attn", token, written)


def direct_heads(
    model: HookedVLM, activations: Activations, direction: Float[Tensor, " d_model"], token: int
) -> Float[Tensor, "layer head"]:
    """Direct contribution of each head to a token's centred logit: `⟨z W_O, direction⟩ / scale`."""
    contributions: list[Tensor] = []
    for layer, block in enumerate(model.blocks):
        along = added(model, activations, layer, "attn", token, direction)
        read = block.attn.W_O.detach().float() @ along
        contributions.append((activations.z[layer, token].float() * read).sum(-1))
    return torch.stack(contributions) / final_scale(model, activations.resid[-1, token])


def direct_neurons(
    model: HookedVLM, activations: Activations, direction: Float[Tensor, " d_model"], token: int
) -> Float[Tensor, "layer d_mlp"]:
    """Direct contribution of each neuron to a token's centred logit: `m_i ⟨W_out[i], direction⟩ / scale`."""
    contributions: list[Tensor] = []
    for layer, block in enumerate(model.blocks):
        along = added(model, activations, layer, "mlp", token, direction).to(model.cfg.dtype)
        contributions.append(
            activations.post[layer, token].float() * (block.mlp.W_out.detach() @ along).float()
        )
    return torch.stack(contributions) / final_scale(model, activations.resid[-1, token])


def lens(model: HookedVLM, activations: Activations, position: int) -> Float[Tensor, "layer d_vocab"]:
    """Logit lens of a position: probabilities at the input of block 0 and at the output of every block."""
    with torch.no_grad():
        return model.unembed(model.ln_final(activations.resid[:, position])).float().softmax(-1)


def ov_directions(
    model: HookedVLM, component: LayerIndex, count: int
) -> tuple[Float[Tensor, " count"], Float[Tensor, "count d_model"]]:
    """The `count` largest singular values of `diag(γ₁) W_V W_O`, and their output directions.

    γ₁ is the weight of the norm before the attention; that of a norm behind it is multiplied to `W_O`. The
    product has rank d_head, so only small matrices are decomposed.
    """
    layer, head = component
    attn, norm = model.blocks[layer].attn, model.blocks[layer].ln1
    group = head // (attn.n_heads // attn.n_key_value_heads)
    value_weights = norm.weight.detach().float()[:, None] * attn.W_V[group].detach().float()
    output_weights = weighted(model.blocks[layer], "attn", attn.W_O[head].detach().float())
    basis, mixing = torch.linalg.qr(output_weights.T)
    _, sizes, right_vectors = torch.linalg.svd(torch.linalg.qr(value_weights)[1] @ mixing.T)
    return sizes[:count], right_vectors[:count] @ basis.T


# -- which heads feed which neurons ----------------------------------------------------------------


def fed_neurons(
    model: HookedVLM, activations: Activations, head: LayerIndex, token: int
) -> Float[Tensor, "layer d_mlp"]:
    """How much of every neuron's activation at a position is due to a head; 0 in layers below the head."""
    writes = head_writes(model, activations, head, token)
    changes = torch.zeros(model.cfg.n_layers, model.cfg.d_mlp, device=writes.device)
    for layer in range(head[0], model.cfg.n_layers):
        mlp = model.blocks[layer].mlp
        ffn_input = _ffn_input(model, activations, layer, token, writes)
        changes[layer] = _activation_change(
            mlp, activations, layer, ffn_input @ mlp.W_gate.detach(), ffn_input @ mlp.W_in.detach()
        )
    return changes


def feeding_heads(
    model: HookedVLM, activations: Activations, neuron: LayerIndex, token: int
) -> Float[Tensor, "layer head"]:
    """How much of a neuron's activation at a position is due to every head; 0 in layers above the neuron."""
    layer, index = neuron
    mlp = model.blocks[layer].mlp
    changes = torch.zeros(model.cfg.n_layers, model.cfg.n_heads, device=activations.post.device)
    for lower_layer in range(layer + 1):
        writes = torch.einsum(
            "hd,hdm->hm", activations.z[lower_layer, token], model.blocks[lower_layer].attn.W_O.detach()
        )
        writes = added(model, activations, lower_layer, "attn", token, writes)
        ffn_input = _ffn_input(model, activations, layer, token, writes)
        contributions = (
            ffn_input @ mlp.W_gate.detach()[:, index, None],
            ffn_input @ mlp.W_in.detach()[:, index, None],
        )
        changes[lower_layer] = _activation_change(mlp, activations, layer, *contributions, index)[:, 0]
    return changes


def _ffn_input(model: HookedVLM, activations: Activations, layer: int, token: int, writes: Tensor) -> Tensor:
    """`γ₂ ∘ w / s`: a summand of the residual stream as the FFN of a layer reads it."""
    weight = model.blocks[layer].ln2.weight.detach().float()
    return (writes * weight / activations.scale[layer, token].float()).to(model.cfg.dtype)


def _activation_change(
    mlp: Any, activations: Activations, layer: int, gate: Tensor, linear: Tensor, index: int | None = None
) -> Tensor:
    """Activations of neurons minus those with `gate` and `linear` subtracted from their inputs."""
    neurons = slice(None) if index is None else slice(index, index + 1)
    old_gate, old_linear = (
        activations.gate[layer, neurons].float(),
        activations.linear[layer, neurons].float(),
    )
    return mlp.act(old_gate) * old_linear - mlp.act(old_gate - gate.float()) * (old_linear - linear.float())


def neuron_output_norms(model: HookedVLM) -> Float[Tensor, "layer d_mlp"]:
    """L2 norms of the neurons' output rows, ‖W_out[i]‖, or ‖γ ∘ W_out[i]‖ with γ of a norm behind the MLP."""
    rows = [weighted(block, "mlp", block.mlp.W_out.detach().float()) for block in model.blocks]
    return torch.stack([of_layer.norm(dim=1) for of_layer in rows])
