"""OV and QK by TransformerLens's FactoredMatrix and SVDInterpreter, against Hugging Face's own weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import random_llava, random_qwen
from helpers.hf_twin import Twin, at
from torch import Tensor, nn
from transformer_lens import FactoredMatrix, SVDInterpreter

from hones_lens.model.tl_weights import by_query_head

SHAPES = {
    "llava, mha": (random_llava, {}),
    "llava, gqa, head_dim set": (random_llava, {"num_key_value_heads": 2, "head_dim": 10}),
    "qwen, gqa": (random_qwen, {}),
    "qwen, one kv head": (random_qwen, {"num_key_value_heads": 1}),
}


class Case(Twin):
    def __init__(self, shape: str):
        made, text = SHAPES[shape]
        super().__init__(made, seed=6, text=text)
        self.groups = 4 // self.model.cfg.n_key_value_heads

    def weight(self, layer: int, path: str) -> Tensor:
        module = self.hf.get_submodule(at(layer, path))
        return module.weight.detach()

    def rows(self, layer: int, letter: str, head: int) -> Tensor:
        """What a query head projects by, [d_head d_model]."""
        head = head if letter == "q" else head // self.groups
        return self.weight(layer, f"self_attn.{letter}_proj")[head * self.d_head : (head + 1) * self.d_head]

    def ov(self, layer: int, head: int) -> Tensor:
        columns = self.weight(layer, "self_attn.o_proj")[:, head * self.d_head : (head + 1) * self.d_head]
        return (columns @ self.rows(layer, "v", head)).T

    def qk(self, layer: int, head: int) -> Tensor:
        return self.rows(layer, "q", head).T @ self.rows(layer, "k", head)


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


def check_singular_vectors(actual: Tensor, matrix: Tensor) -> None:
    """Columns [d n] are the first right singular vectors of a matrix [m d], up to close singular values.

    One by one they are determined only as far as those values lie apart; that they are orthonormal, and that
    each is scaled by its own value's square, holds to rounding whatever the values are.
    """
    actual, matrix = actual.double(), matrix.double()
    values = torch.linalg.svdvals(matrix)[: actual.shape[1]]
    close(actual.T @ actual, torch.eye(actual.shape[1], dtype=actual.dtype))
    close(matrix.T @ (matrix @ actual) / values[0] ** 2, actual * (values / values[0]) ** 2)


@pytest.mark.parametrize("name", ["OV", "QK"])
def test_circuits_are_products_of_hugging_faces_weights(case: Case, name: str) -> None:
    actual = getattr(case.model, name)
    assert isinstance(actual, FactoredMatrix) and actual.shape == (3, 4, 32, 32)
    for layer, head in itertools.product(range(3), range(4)):
        expected = getattr(case, name.lower())(layer, head)
        close(actual[layer, head].AB, expected)
        s, d = torch.linalg.svdvals(expected), case.d_head
        close(actual.S[layer, head], s[:d])
        assert s[d:].abs().max() < 1e-4, "the rank is that of a head"
        check_singular_vectors(actual.V[layer, head], expected)
        check_singular_vectors(actual.U[layer, head], expected.T)
        largest = torch.linalg.eigvals(expected).abs().topk(3).values  # small ones are ill-conditioned
        close(actual[layer, head].eigenvalues.abs().topk(3).values, largest)
        close(actual[layer, head].norm(), expected.norm())


def test_a_query_and_a_key_meet_in_qk(case: Case) -> None:
    """Without biases and rotation, a query times a key is the form that QK is."""
    x, y = torch.randn(2, 32)
    attn = case.model.blocks[1].attn
    q = nn.functional.linear(x, attn.q.weight).view(4, -1)
    k = nn.functional.linear(y, attn.k.weight).view(4 // case.groups, -1)
    for head in range(4):
        close(x @ (case.model.QK[1, head] @ y), q[head] @ k[head // case.groups])


def check_vectors_as_logits(actual: Tensor, lm_head: Tensor, matrix: Tensor) -> None:
    """[d_vocab 1 n] logits of the first right singular vectors of a matrix [m d_model]."""
    vectors = torch.linalg.lstsq(lm_head.double(), actual[:, 0].double()).solution  # lm_head has full rank
    close(lm_head.double() @ vectors, actual[:, 0].double())
    check_singular_vectors(vectors, matrix)


def test_singular_vectors_of_ov(case: Case) -> None:
    """What a head writes for the directions that it reads most, as logits."""
    interpreter, lm_head = SVDInterpreter(case.model), case.hf.lm_head.weight.detach()
    for layer, head in itertools.product((0, 2), range(4)):
        actual = interpreter.get_singular_vectors("OV", layer_index=layer, num_vectors=3, head_index=head)
        assert actual.shape == (len(lm_head), 1, 3) and not actual.requires_grad
        check_vectors_as_logits(actual, lm_head, case.ov(layer, head))


def test_singular_vectors_of_neurons(case: Case) -> None:
    """What neurons read, behind the norm's weight, and what they write."""
    interpreter, lm_head = SVDInterpreter(case.model), case.hf.lm_head.weight.detach()
    norm = case.weight(1, "post_attention_layernorm")
    matrices = {"w_in": case.weight(1, "mlp.up_proj") * norm, "w_out": case.weight(1, "mlp.down_proj").T}
    for name, matrix in matrices.items():
        actual = interpreter.get_singular_vectors(name, layer_index=1, num_vectors=4)
        assert actual.shape == (len(lm_head), 1, 4)
        check_vectors_as_logits(actual, lm_head, matrix)


def test_a_bound_model_has_the_same_circuits(case: Case) -> None:
    bound = case.model.bind(case.model.to_tokens("is it red?"))
    assert torch.equal(bound.OV.AB, case.model.OV.AB)
    interpreters = (SVDInterpreter(bound), SVDInterpreter(case.model))
    first, second = (one.get_singular_vectors("OV", 1, 2, head_index=3) for one in interpreters)
    assert torch.equal(first, second)


def test_weights_by_name_compute_what_the_modules_do(case: Case) -> None:
    """Every projection of a block with its bias, by query head."""
    weights, block = case.model.tl_parameters(), case.model.blocks[2]
    assert len(weights) == len(list(weights)) == 4 + 3 * 14
    assert "blocks.3.attn.W_Q" not in weights
    with pytest.raises(KeyError):
        weights["blocks.3.attn.W_Q"]
    x, neurons = torch.randn(32), torch.randn(40)
    z = torch.randn(4, case.d_head)
    layer = case.hf.get_submodule(at(2))
    for letter in "QKV":
        by_head = torch.einsum("m,hmd->hd", x, weights[f"blocks.2.attn.W_{letter}"])
        expected = layer.get_submodule(f"self_attn.{letter.lower()}_proj")(x).view(-1, case.d_head)
        close(by_head + weights[f"blocks.2.attn.b_{letter}"], by_query_head(expected, 4))
    wrote = torch.einsum("hd,hdm->m", z, weights["blocks.2.attn.W_O"]) + weights["blocks.2.attn.b_O"]
    close(wrote, layer.self_attn.o_proj(z.flatten()))
    close(x @ weights["blocks.2.mlp.W_gate"], layer.mlp.gate_proj(x))
    close(x @ weights["blocks.2.mlp.W_in"], layer.mlp.up_proj(x))
    out = neurons @ weights["blocks.2.mlp.W_out"] + weights["blocks.2.mlp.b_out"]
    close(out, layer.mlp.down_proj(neurons))
    close(x @ weights["unembed.W_U"] + weights["unembed.b_U"], case.hf.lm_head(x))
    assert torch.equal(weights["embed.W_E"], case.hf.get_input_embeddings().weight)
    assert torch.equal(weights["ln_final.w"], case.hf.model.language_model.norm.weight)
    for ours, theirs in (("ln1", "input_layernorm"), ("ln2", "post_attention_layernorm")):
        assert torch.equal(weights[f"blocks.2.{ours}.w"], layer.get_submodule(theirs).weight)
    assert block.attn.W_K.shape[0] == case.model.cfg.n_key_value_heads, "the module's own stay as they are"


def test_heads_of_a_group_share_keys_and_values() -> None:
    weight = torch.arange(6.0).view(3, 2)
    assert by_query_head(weight, 6).tolist() == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]]
    assert by_query_head(weight.T, 3, axis=1).tolist() == weight.T.tolist()


def test_stacked_biases_are_those_of_hugging_faces_layers(case: Case) -> None:
    model, n_layers = case.model, case.model.cfg.n_layers
    letters = {"b_Q": "q", "b_K": "k", "b_V": "v"}
    for name, letter in letters.items():
        for layer in range(n_layers):
            bias = case.hf.get_submodule(at(layer, f"self_attn.{letter}_proj")).bias
            stacked = getattr(model, name)[layer]
            expected = torch.zeros(stacked.numel()) if bias is None else bias.detach()
            assert torch.equal(stacked.flatten(), expected), (name, layer)
    assert model.b_Q.shape == (n_layers, model.cfg.n_heads, model.cfg.d_head)
    assert model.b_O.shape == model.b_out.shape == (n_layers, model.cfg.d_model)
    with pytest.raises(AttributeError):
        _ = model.b_in  # a gated network has none


def test_what_transformer_lens_s_code_reads_of_a_config(case: Case) -> None:
    cfg = case.model.cfg
    assert cfg.attn_scale == case.d_head**0.5
    assert cfg.d_vocab_out == case.hf.get_output_embeddings().weight.shape[0]
    assert (cfg.attention_dir, cfg.positional_embedding_type) == ("causal", "rotary")
    assert cfg.use_attn_result and not cfg.use_hook_mlp_in and not cfg.ungroup_grouped_query_attention
