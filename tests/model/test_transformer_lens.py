"""TransformerLens's ActivationCache and helpers on an image prompt."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from helpers import random_llava, random_qwen
from helpers.hf_twin import Twin, at
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.tools.analysis import logit_lens

from hones_lens import HookedVLM, VLMInputs

LAYERS, HEADS, D_MLP, D_MODEL = 3, 4, 40, 32


class Run:
    """One model, a batch with images, the cache of everything, and what Hugging Face's model has there."""

    def __init__(self, made: ModuleType) -> None:
        self.twin = Twin(made, seed=21, text={"num_key_value_heads": 2})
        self.model: HookedVLM = self.twin.model
        self.inputs: VLMInputs = made.mixed_batch(self.model)
        self.logits: Tensor
        self.cache: ActivationCache
        with torch.no_grad():
            self.logits, self.cache = self.model.run_with_cache(self.inputs)
        self.real = self.inputs.attention_mask.bool()
        self.theirs, self.their_logits = self.twin.seen(self.inputs), self.twin.logits(self.inputs)

    def weight(self, layer: int, path: str) -> Tensor:
        return self.twin.hf.get_submodule(at(layer, path)).weight

    @property
    def their_end(self) -> Tensor:
        """The stream above the last block, [batch pos d_model]."""
        return self.theirs[f"blocks.{LAYERS - 1}.hook_resid_post"]

    @property
    def direction_scale(self) -> Tensor:
        """The final norm by its formula: weight over root mean square, [batch pos d_model]."""
        norm = self.twin.hf.model.language_model.norm
        return norm.weight / (self.their_end.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()

    def close(self, found: Tensor, expected: Tensor, atol: float = 5e-5) -> None:
        """At the positions that hold tokens; both are [batch pos …]."""
        torch.testing.assert_close(found[self.real], expected[self.real], atol=atol, rtol=1e-5)


@pytest.fixture(scope="module", params=[random_llava, random_qwen])
def run(request: pytest.FixtureRequest) -> Run:
    return Run(request.param)


@pytest.fixture(scope="module")
def llava() -> Run:
    return Run(random_llava)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def close(a: Tensor, b: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


def test_config_speaks_transformer_lens(run: Run) -> None:
    cfg = run.model.cfg
    sizes = (
        cfg.n_layers,
        cfg.n_heads,
        cfg.n_key_value_heads,
        cfg.d_model,
        cfg.d_head,
        cfg.d_mlp,
        cfg.d_vocab,
    )
    assert sizes == (LAYERS, HEADS, 2, D_MODEL, 8, D_MLP, run.logits.shape[-1])
    assert (cfg.n_ctx, cfg.attn_only, cfg.normalization_type) == (512, False, "RMS")
    assert (cfg.device, cfg.dtype) == (torch.device("cpu"), torch.float32)
    assert cfg.n_neurons == LAYERS * D_MLP
    assert all(block.hook_out_is_single_residual_stream for block in run.model.blocks)


def test_the_cache_is_transformer_lenss(run: Run) -> None:
    assert isinstance(run.cache, ActivationCache) and run.cache.has_batch_dim
    assert run.cache.has_embed and not run.cache.has_pos_embed
    assert torch.equal(run.cache["q", 1], run.cache["blocks.1.attn.hook_q"])
    assert torch.equal(run.cache["post", -1], run.cache["blocks.2.mlp.hook_post"])


def test_accumulated_resid(run: Run) -> None:
    stack, labels = run.cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "2_pre", "2_mid", "final_post"]
    assert torch.equal(stack[3], run.cache["resid_mid", 1])
    assert torch.equal(stack[-1], run.cache["resid_post", 2])


def test_decompose_resid_adds_up_at_image_positions_too(run: Run) -> None:
    stack, labels = run.cache.decompose_resid(return_labels=True)
    assert labels[0] == "embed" and len(labels) == 1 + 2 * LAYERS
    close(stack.sum(0), run.cache["resid_post", 2])
    upto, _ = run.cache.decompose_resid(layer=1, mlp_input=True, return_labels=True)
    close(upto.sum(0), run.cache["resid_mid", 1])


def test_stack_head_results(run: Run) -> None:
    stack, labels = run.cache.stack_head_results(return_labels=True, incl_remainder=True)
    assert labels == [f"L{i}H{h}" for i in range(LAYERS) for h in range(HEADS)] + ["remainder"]
    for layer in range(LAYERS):
        close(stack[layer * HEADS : (layer + 1) * HEADS].sum(0), run.cache["attn_out", layer])
    close(stack.sum(0), run.cache["resid_post", 2])
    _, own = run.model.run_with_cache(run.inputs, names_filter=lambda name: name.endswith("attn.hook_result"))
    close(own["result", 1][:, :, 3], stack[HEADS + 3])


def test_stack_neuron_results(run: Run) -> None:
    stack, labels = run.cache.stack_neuron_results(LAYERS, pos_slice=-1, return_labels=True)
    assert len(labels) == LAYERS * D_MLP and labels[D_MLP + 5] == "L1N5"
    for layer in range(LAYERS):
        close(stack[layer * D_MLP : (layer + 1) * D_MLP].sum(0), run.cache["mlp_out", layer][:, -1])
    expected = run.cache["post", 1][:, -1, 5, None] * run.model.blocks[1].mlp.down.weight[:, 5]
    close(stack[D_MLP + 5], expected)


@pytest.mark.parametrize("expand_neurons", [False, True])
def test_full_decomposition_adds_up_to_the_logit(run: Run, expand_neurons: bool) -> None:
    stack, labels = run.cache.get_full_resid_decomposition(
        expand_neurons=expand_neurons, pos_slice=-1, return_labels=True
    )
    assert len(labels) == len(stack) == LAYERS * (HEADS + (D_MLP if expand_neurons else 1)) + 2
    close(stack.sum(0), run.cache["resid_post", 2][:, -1])
    tokens = run.logits[:, -1].argmax(-1)
    others = torch.tensor([9, 10, 11])
    attributions = run.cache.logit_attrs(stack, tokens=tokens, pos_slice=-1)
    close(attributions.sum(0), run.logits[:, -1].gather(-1, tokens[:, None])[:, 0])
    differences = run.cache.logit_attrs(stack, tokens=tokens, incorrect_tokens=others, pos_slice=-1)
    expected = run.logits[:, -1].gather(-1, torch.stack((tokens, others), dim=-1))
    close(differences.sum(0), expected[:, 0] - expected[:, 1])


def test_logit_attributions_at_every_position(run: Run) -> None:
    stack = run.cache.decompose_resid()
    red = run.model.to_single_token("red")
    attributions = run.cache.logit_attrs(stack, tokens=red)
    close(attributions.sum(0), run.logits[..., red])
    by_name = run.cache.logit_attrs(stack, tokens="red")
    assert torch.equal(by_name, attributions)


def test_apply_ln_to_stack(run: Run) -> None:
    model, last = run.model, run.cache["resid_post", 2][None]
    close(run.cache.apply_ln_to_stack(last)[0] * model.ln_final.weight @ model.W_U, run.logits)
    mid = run.cache.apply_ln_to_stack(run.cache["resid_mid", 1][None], layer=1, mlp_input=True)[0]
    close(mid, run.cache["normalized", 1, "ln2"])
    pre = run.cache.apply_ln_to_stack(run.cache["resid_pre", 1][None], layer=1)[0]
    close(pre, run.cache["normalized", 1, "ln1"])


def test_logit_lens_ends_in_the_logits(run: Run) -> None:
    result = run.cache.logit_lens(positions=None)
    assert result.labels[-1] == "final_post"
    close(result.values[-1], run.logits)
    resid = run.cache["resid_post", 0]
    expected = run.model.unembed(run.model.ln_final(resid))
    close(result.values[result.labels.index("1_pre")], expected)


# -- against Hugging Face's modules --------------------------------------------------------------


def test_accumulated_streams_are_those_of_hf(run: Run) -> None:
    stack, labels = run.cache.accumulated_resid(incl_mid=True, return_labels=True)
    for found, label in zip(stack, labels, strict=True):
        layer, _, part = label.partition("_")
        name = "blocks.2.hook_resid_post" if layer == "final" else f"blocks.{layer}.hook_resid_{part}"
        run.close(found, run.theirs[name])
    to_neurons = run.cache.accumulated_resid(layer=1, mlp_input=True, apply_ln=True)
    scale = (run.theirs["blocks.1.hook_resid_mid"].pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    run.close(to_neurons[-1], run.theirs["blocks.1.hook_resid_mid"] / scale)
    norm = run.twin.hf.model.language_model.norm
    last = run.cache.accumulated_resid(apply_ln=True, pos_slice=-1)
    for layer in range(LAYERS):
        close(last[layer], norm(run.theirs[f"blocks.{layer}.hook_resid_pre"][:, -1]), 5e-5)


def test_components_are_what_hf_writes(run: Run) -> None:
    stack, labels = run.cache.decompose_resid(return_labels=True)
    names = ["blocks.0.hook_resid_pre"]
    names += [f"blocks.{i}.hook_{part}_out" for i in range(LAYERS) for part in ("attn", "mlp")]
    for found, name in zip(stack, names, strict=True):
        run.close(found, run.theirs[name])
    assert labels == ["embed", *(name.replace("blocks.", "").replace(".hook", "") for name in names[1:])]
    assert torch.equal(run.cache.decompose_resid(mode="attn", incl_embeds=False), stack[1::2])
    assert torch.equal(run.cache.decompose_resid(mode="mlp", incl_embeds=False), stack[2::2])
    scale = (run.theirs["blocks.1.hook_resid_pre"].pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    normed = run.cache.decompose_resid(layer=1, apply_ln=True)
    run.close(normed.sum(0), run.theirs["blocks.1.hook_resid_pre"] / scale)


def their_heads(run: Run, layer: int) -> Tensor:
    """What each head writes, by its columns of the output projection, [head batch pos d_model]."""
    z, columns = run.theirs[f"blocks.{layer}.attn.hook_z"], run.weight(layer, "self_attn.o_proj").split(8, 1)
    return torch.stack([z[:, :, head] @ columns[head].T for head in range(HEADS)])


def their_neurons(run: Run, layer: int) -> Tensor:
    """What each neuron writes, by its column of the output projection, [neuron batch pos d_model]."""
    m, columns = run.theirs[f"blocks.{layer}.mlp.hook_post"], run.weight(layer, "mlp.down_proj")
    return torch.stack([m[..., i, None] * columns[:, i] for i in range(D_MLP)])


def test_heads_write_what_hf_adds_for_them(run: Run) -> None:
    stack = run.cache.stack_head_results()
    for layer in range(LAYERS):
        for found, expected in zip(
            stack[layer * HEADS : (layer + 1) * HEADS], their_heads(run, layer), strict=True
        ):
            run.close(found, expected)
    below, labels = run.cache.stack_head_results(1, return_labels=True, incl_remainder=True)
    assert labels == ["L0H0", "L0H1", "L0H2", "L0H3", "remainder"]
    rest = run.theirs["blocks.0.hook_resid_post"] - run.theirs["blocks.0.hook_attn_out"]
    run.close(below[-1], rest)


def test_neurons_write_what_hf_adds_for_them(run: Run) -> None:
    direction = torch.linspace(-1, 1, D_MODEL)
    for layer in range(LAYERS):
        expected = their_neurons(run, layer)
        found = run.cache.get_neuron_results(layer)
        assert found.shape == (*run.real.shape, D_MLP, D_MODEL)
        run.close(found, expected.movedim(0, 2))
        few = run.cache.get_neuron_results(layer, neuron_slice=[3, 39], pos_slice=-1)
        close(few, expected[[3, 39], :, -1].movedim(0, 1), 5e-5)
        along = run.cache.get_neuron_results(layer, project_output_onto=direction)
        run.close(along, (expected @ direction).movedim(0, 2), 1e-4)
    stack, labels = run.cache.stack_neuron_results(2, incl_remainder=True, return_labels=True)
    assert len(stack) == len(labels) == 2 * D_MLP + 1
    run.close(stack[D_MLP + 7], their_neurons(run, 1)[7])
    written = run.theirs["blocks.0.hook_mlp_out"] + run.theirs["blocks.1.hook_mlp_out"]
    run.close(stack[-1], run.theirs["blocks.1.hook_resid_post"] - written, 1e-4)


@pytest.mark.parametrize("group", ["image", "text"])
@pytest.mark.parametrize("expand_neurons", [False, True])
def test_the_full_decomposition_is_hfs_logit(run: Run, group: str, expand_neurons: bool) -> None:
    """Summed over all components, at every position of the group, for the token that comes next."""
    stack = run.cache.get_full_resid_decomposition(expand_neurons=expand_neurons)
    tokens = run.their_logits.argmax(-1)
    found = run.cache.logit_attrs(stack, tokens=tokens).sum(0)
    expected = run.their_logits.gather(-1, tokens[..., None])[..., 0]
    where = run.inputs.token_groups[group]
    assert where.any() and (found - expected)[where].abs().max() <= 1e-4
    scaled = run.cache.get_full_resid_decomposition(
        expand_neurons=expand_neurons, apply_ln=True, project_output_onto=run.model.W_U[:, 9]
    )
    plain = (run.their_end * run.direction_scale / run.twin.hf.model.language_model.norm.weight) @ (
        run.twin.hf.lm_head.weight[9]
    )
    assert (scaled.sum(0) - plain)[where].abs().max() <= 1e-4, "without the norm's weight, as it is made"


def test_every_attribution_is_by_the_formula(run: Run) -> None:
    """A component times the norm's weight, over the stream's root mean square, times the token's row."""
    rows = run.twin.hf.lm_head.weight
    token, foil = 9, 17
    stack = run.cache.stack_head_results()
    found = run.cache.logit_attrs(stack, tokens=token)
    against = run.cache.logit_attrs(stack, tokens=token, incorrect_tokens=foil)
    for layer in range(LAYERS):
        for head, wrote in enumerate(their_heads(run, layer)):
            at_logit = wrote * run.direction_scale
            run.close(found[layer * HEADS + head], at_logit @ rows[token], 5e-5)
            run.close(against[layer * HEADS + head], at_logit @ (rows[token] - rows[foil]), 5e-5)
    last = torch.tensor([9, 10, 11])
    by_row = run.cache.logit_attrs(stack[:, :, -1], tokens=last, pos_slice=-1)
    expected = (their_heads(run, 2)[1] * run.direction_scale)[:, -1] * rows[last]
    close(by_row[2 * HEADS + 1], expected.sum(-1), 5e-5)


def test_stacks_are_normalised_as_hf_does(run: Run) -> None:
    """By the scale of the layer that reads them; the norm's weight is left to what reads it."""
    for layer in range(LAYERS):
        for mlp_input, part, path in (
            (False, "pre", "input_layernorm"),
            (True, "mid", "post_attention_layernorm"),
        ):
            stream = run.theirs[f"blocks.{layer}.hook_resid_{part}"]
            norm = run.twin.hf.get_submodule(at(layer, path))
            found = run.cache.apply_ln_to_stack(stream[None], layer=layer, mlp_input=mlp_input)[0]
            run.close(found * norm.weight, norm(stream), 5e-5)
    halves = torch.stack((run.their_end / 2, run.their_end / 2))
    final = run.cache.apply_ln_to_stack(halves).sum(0)
    run.close(final * run.twin.hf.model.language_model.norm.weight, run.their_end * run.direction_scale, 5e-5)


def test_the_logit_lens_is_hfs_head_on_every_layer(run: Run) -> None:
    result = run.cache.logit_lens(positions=None, incl_mid=True)
    hf = run.twin.hf
    for label, found in zip(result.labels, result.values, strict=True):
        layer, _, part = label.partition("_")
        name = "blocks.2.hook_resid_post" if layer == "final" else f"blocks.{layer}.hook_resid_{part}"
        run.close(found, hf.lm_head(hf.model.language_model.norm(run.theirs[name])), 5e-5)
    bound = run.model.bind(run.inputs)
    most = logit_lens(bound, run.inputs.input_ids, top_k=3)
    expected = hf.lm_head(hf.model.language_model.norm(run.theirs["blocks.1.hook_resid_pre"]))[:, -1]
    assert torch.equal(most.readout.top_ids[most.labels.index("1_pre")], expected.topk(3).indices)


def test_without_the_batch_axis(run: Run) -> None:
    logits, cache = run.model.run_with_cache(run.inputs[0], remove_batch_dim=True)
    stack = cache.get_full_resid_decomposition(pos_slice=-1)
    token = int(logits[0, -1].argmax())
    attributions = cache.logit_attrs(stack, tokens=token, pos_slice=-1, has_batch_dim=False)
    close(attributions.sum(), logits[0, -1, token])


def test_tokens_to_residual_directions(run: Run) -> None:
    model = run.model
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]])
    directions = model.tokens_to_residual_directions(tokens)
    assert directions.shape == (2, 3, D_MODEL)
    scaled = run.cache["resid_post", 2][0, -1] / run.cache["ln_final.hook_scale"][0, -1]
    close(directions @ scaled, run.logits[0, -1][tokens])
    one = model.tokens_to_residual_directions(5)
    assert one.shape == (D_MODEL,) and torch.equal(one, directions[0, 0])
    by_name = model.tokens_to_residual_directions("red")
    assert torch.equal(by_name, model.tokens_to_residual_directions(model.to_single_token("red")))


def test_there_are_no_biases_to_accumulate(run: Run) -> None:
    assert torch.equal(run.model.accumulated_bias(LAYERS), torch.zeros(D_MODEL))
    assert torch.equal(run.model.accumulated_bias(1, mlp_input=True), torch.zeros(D_MODEL))
    assert torch.equal(run.model.b_U, torch.zeros(run.model.cfg.d_vocab))


def test_accumulated_biases_of_blocks_that_have_some() -> None:
    """No LLaMA has them; a family that does must add them up in this order."""
    model = random_llava.make_pair()[1]
    for i, block in enumerate(model.blocks):
        block.attn.o.bias = torch.nn.Parameter(torch.full((D_MODEL,), 10.0**i))
        block.mlp.down.bias = torch.nn.Parameter(torch.full((D_MODEL,), 2 * 10.0**i))
    assert model.accumulated_bias(2)[0] == 33
    assert model.accumulated_bias(0)[0] == 0
    assert model.accumulated_bias(2, include_mlp_biases=False)[0] == 11
    assert model.accumulated_bias(1, mlp_input=True)[0] == 13


def test_single_tokens_and_their_strings(llava: Run) -> None:
    model = llava.model
    red = model.to_single_token(" red")
    assert red == model.tokenizer(" red", add_special_tokens=False).input_ids[0]
    with pytest.raises(ValueError, match=r"' red circle' is \d tokens"):
        model.to_single_token(" red circle")
    strings = model.to_str_tokens("is it red?")
    assert strings[0] == "<s>" and "".join(strings[1:]).replace("▁", " ").strip() == "is it red?"
    assert "<s>" not in model.to_str_tokens("is it red?", prepend_bos=False)
    ids = model.to_tokens("is it red?")
    assert model.to_str_tokens(ids) == model.to_str_tokens(ids[0]) == strings
    assert model.to_str_tokens(ids[0].tolist()) == strings
    assert model.to_string(ids[0, 1:]) == model.to_string(ids[:, 1:])[0] == "is it red?"


def test_tokens_of_several_texts_are_padded_on_the_left(run: Run) -> None:
    ids = run.model.to_tokens(["is it red?", "red"])
    short = run.model.to_tokens("red")[0]
    assert ids.shape[0] == 2
    assert torch.equal(ids[1, -len(short) :], short)
    assert (ids[1, : -len(short)] == run.model.cfg.pad_token_id).all()


def test_stacked_weights(run: Run) -> None:
    model = run.model
    assert model.W_Q.shape == (LAYERS, HEADS, D_MODEL, 8)
    assert model.W_K.shape == model.W_V.shape == (LAYERS, 2, D_MODEL, 8)
    assert model.W_O.shape == (LAYERS, HEADS, 8, D_MODEL)
    assert model.W_gate.shape == model.W_in.shape == (LAYERS, D_MODEL, D_MLP)
    assert model.W_out.shape == (LAYERS, D_MLP, D_MODEL)
    x, block = torch.randn(D_MODEL), model.blocks[1]
    for name, projection in {"Q": block.attn.q, "K": block.attn.k, "V": block.attn.v}.items():
        by_head = torch.einsum("m,hmd->hd", x, getattr(model, f"W_{name}")[1])
        close((by_head + getattr(block.attn, f"b_{name}")).flatten(), projection(x))
    z = torch.randn(HEADS, 8)
    close(torch.einsum("hd,hdm->m", z, model.W_O[1]), block.attn.o(z.flatten()))
    close(x @ model.W_gate[1], block.mlp.gate(x))
    close(x @ model.W_in[1], block.mlp.up(x))
    close(torch.ones(D_MLP) @ model.W_out[1], block.mlp.down(torch.ones(D_MLP)))
    close(x @ model.W_U, model.unembed(x))
    assert torch.equal(model.W_E[7], model.embed(torch.tensor(7)))
