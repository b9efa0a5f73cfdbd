"""A family from outside the package: one file, norms, MLP and unembedding of another kind than LLaMA's.

`Reference` is a small model in plain PyTorch that uses nothing of ours: LayerNorms, a two-matrix MLP with
GELU, biases everywhere, the unembedding's too. `HookedOutside` is all that a family's author writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from hones_lens import HookedVLM, VLMInputs
from hones_lens.model import VLMConfig
from hones_lens.model.config import VisionConfig
from hones_lens.model.families import FAMILIES
from hones_lens.model.nn.attention import Attention
from hones_lens.model.nn.block import Block
from hones_lens.model.nn.decoder import Decoder
from hones_lens.model.nn.mlp import MLP
from hones_lens.model.nn.norm import LayerNorm
from hones_lens.model.nn.projector import Projector
from hones_lens.model.nn.rotary import Rotary
from hones_lens.model.weights import WeightMap

D_MODEL, N_HEADS, D_MLP, D_VOCAB, N_LAYERS = 24, 3, 40, 29, 2
D_HEAD, EPS, THETA = D_MODEL // N_HEADS, 1e-3, 100.0
D_VISION, PATCH, SIZE = 10, 4, 12
IMAGE, PAD, EOS = 28, 0, 1
N_IMAGE_TOKENS = (SIZE // PATCH) ** 2


# -- the model that is to be hooked ----------------------------------------------------------------


class ReferenceBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_a, self.norm_b = (nn.LayerNorm(D_MODEL, eps=EPS) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(D_MODEL, D_MODEL) for _ in range(4))
        self.wide, self.narrow = nn.Linear(D_MODEL, D_MLP), nn.Linear(D_MLP, D_MODEL)

    def forward(self, x: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
        h = self.norm_a(x)
        q, k, v = (
            p(h).view(*h.shape[:2], N_HEADS, D_HEAD).transpose(1, 2)
            for p in (self.query, self.key, self.value)
        )
        scores = turned(q, positions) @ turned(k, positions).transpose(-1, -2) / D_HEAD**0.5
        n = x.shape[1]
        seen = torch.tril(torch.ones(n, n, dtype=torch.bool)) & tokens[:, None, None]
        seen = seen | torch.eye(n, dtype=torch.bool)  # padding sees itself
        z = scores.masked_fill(~seen, -1e30).softmax(-1) @ v
        x = x + self.out(z.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.norm_b(x))))


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions by complex numbers, [batch head pos d_head]: entry i with entry i + d_head/2."""
    half = D_HEAD // 2
    angles = positions[:, None, :, None] * THETA ** (-torch.arange(half) / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag), dim=-1)


class Reference(nn.Module):
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="outside", name_or_path="outside/small", layers=N_LAYERS)
        self.eye = nn.Conv2d(3, D_VISION, PATCH, stride=PATCH, bias=False)
        self.bridge = nn.ModuleList([nn.Linear(D_VISION, D_MODEL), nn.Linear(D_MODEL, D_MODEL)])
        self.words = nn.Embedding(D_VOCAB, D_MODEL)
        self.layers = nn.ModuleList(ReferenceBlock() for _ in range(N_LAYERS))
        self.norm = nn.LayerNorm(D_MODEL, eps=EPS)
        self.head = nn.Linear(D_MODEL, D_VOCAB)
        for p in self.parameters():
            p.data.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))

    @torch.no_grad()
    def forward(self, ids: Tensor, tokens: Tensor, pixels: Tensor) -> Tensor:
        x = self.words(ids)
        seen = self.eye(pixels).flatten(2).transpose(1, 2)
        x[ids == IMAGE] = self.bridge[1](F.silu(self.bridge[0](seen))).flatten(0, 1)
        positions = (tokens.long().cumsum(-1) - 1).clamp(min=0)
        for layer in self.layers:
            x = layer(x, positions, tokens)
        return self.head(self.norm(x))


# -- the family: what its author writes ------------------------------------------------------------


class BiasedUnembed(nn.Module):
    def __init__(self, d_model: int, d_vocab: int):
        super().__init__()
        self.linear = nn.Linear(d_model, d_vocab)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def tie(self, embed: nn.Embedding) -> None:
        self.linear.weight = embed.weight

    @property
    def W_U(self) -> Tensor:
        return self.linear.weight.T

    @property
    def b_U(self) -> Tensor:
        return self.linear.bias


class PatchEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, D_VISION, PATCH, stride=PATCH, bias=False)
        self.hook_embed = HookPoint()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.hook_embed(self.conv(pixels).flatten(2).transpose(1, 2))


class HookedOutside(HookedVLM):
    family = "outside"

    @classmethod
    def from_config(
        cls, hf_config: Any, name: str, device: torch.device, dtype: torch.dtype
    ) -> HookedOutside:
        cfg = VLMConfig(
            family=cls.family,
            model_name=name,
            n_layers=hf_config.layers,
            n_heads=N_HEADS,
            n_key_value_heads=N_HEADS,
            d_model=D_MODEL,
            d_head=D_HEAD,
            d_mlp=D_MLP,
            d_vocab=D_VOCAB,
            n_ctx=64,
            act_fn="gelu",
            eps=EPS,
            image_token_id=IMAGE,
            eos_token_ids=(EOS,),
            pad_token_id=PAD,
            vision=VisionConfig(0, 1, D_VISION, D_VISION, 0, PATCH, SIZE, (0,)),
            device=device,
            dtype=dtype,
            normalization_type="LN",
        )
        frequencies = 1 / THETA ** (torch.arange(0, D_HEAD, 2) / D_HEAD)
        with torch.device("meta"):
            blocks = [
                Block(
                    Attention(layer, D_MODEL, N_HEADS, N_HEADS, D_HEAD, qkv_bias=True, out_bias=True),
                    MLP(D_MODEL, D_MLP, cfg.act_fn),
                    LayerNorm(D_MODEL, EPS),
                    LayerNorm(D_MODEL, EPS),
                )
                for layer in range(cfg.n_layers)
            ]
            decoder = Decoder(
                nn.Embedding(D_VOCAB, D_MODEL),
                Rotary(frequencies),
                blocks,
                LayerNorm(D_MODEL, EPS),
                BiasedUnembed(D_MODEL, D_VOCAB),
            )
            projector = Projector(D_VISION, D_MODEL, "silu", bias=True)
            return cls(cfg, decoder, PatchEmbedding(), projector)

    @classmethod
    def weight_map(cls, cfg: VLMConfig, hf_names: Sequence[str]) -> WeightMap:
        modules = {
            "eye": "vision_encoder.conv",
            "words": "embed",
            "norm": "ln_final",
            "head": "unembed.linear",
        }
        modules |= {"bridge.0": "vision_projector.linear_1", "bridge.1": "vision_projector.linear_2"}
        parts = {"norm_a": "ln1", "norm_b": "ln2", "wide": "mlp.up", "narrow": "mlp.down"}
        parts |= {"query": "attn.q", "key": "attn.k", "value": "attn.v", "out": "attn.o"}
        modules |= {
            f"layers.{layer}.{theirs}": f"blocks.{layer}.{ours}"
            for layer in range(cfg.n_layers)
            for theirs, ours in parts.items()
        }
        return {name: f"{modules[m]}.{kind}" for name in hf_names for m, _, kind in [name.rpartition(".")]}

    def encode_images(self, inputs: VLMInputs) -> Tensor:
        return self.vision_projector(self.vision_encoder(inputs.pixel_values))

    def positions(self, inputs: VLMInputs) -> Tensor:
        return (inputs.attention_mask.cumsum(-1) - 1).clamp(min=0)

    def locate_images(self, inputs: VLMInputs) -> VLMInputs:
        mask = inputs.input_ids == IMAGE
        side = SIZE // PATCH
        grids = tuple(((side, side),) * (count // side**2) for count in mask.sum(-1).tolist())
        return replace(inputs, image_mask_or_none=mask, grids=grids)

    def process_images(self, images: Sequence[Any]) -> tuple[dict[str, Any], list[int]]:
        return {"pixel_values": self.image_processor(images)}, [N_IMAGE_TOKENS] * len(images)

    def pictures(self, inputs: VLMInputs) -> list[Tensor]:
        return list(inputs.pixel_values) if inputs.pixel_values is not None else []

    def with_pictures(self, inputs: VLMInputs, pictures: Sequence[Tensor]) -> VLMInputs:
        return replace(inputs, pixel_values=torch.stack(list(pictures)), image_embeds=None)


# -- what is proven of it --------------------------------------------------------------------------


class Case:
    def __init__(self) -> None:
        self.reference = Reference().eval()
        self.model = HookedVLM.from_hf(self.reference)
        image = [IMAGE] * N_IMAGE_TOKENS
        self.ids = torch.tensor([[5, *image, 7, 9, 11], [PAD, PAD, *image, 3, 4]])
        self.tokens = self.ids != PAD
        self.pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(4))
        self.inputs = self.model.as_inputs(
            {"input_ids": self.ids, "attention_mask": self.tokens.long(), "pixel_values": self.pixels}
        )

    def expected(self) -> Tensor:
        return self.reference(self.ids, self.tokens, self.pixels)

    def close(self, ours: Tensor, expected: Tensor) -> None:
        difference = (ours - expected)[self.tokens].abs().max()
        assert difference <= 5e-5, difference


@pytest.fixture(scope="module")
def case() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "outside", f"{__name__}:HookedOutside")
        yield Case()


def test_it_is_found_by_its_model_type(case: Case) -> None:
    assert type(case.model).__name__ == "HookedOutside"
    assert case.model.cfg.model_name == "outside/small"


@torch.no_grad()
def test_logits(case: Case) -> None:
    case.close(case.model(case.inputs), case.expected())


def test_weights_are_shared(case: Case) -> None:
    theirs = {p.data_ptr() for p in case.reference.parameters()}
    assert {p.data_ptr() for p in case.model.parameters()} == theirs


def test_greedy_tokens(case: Case) -> None:
    ids, tokens = case.ids, case.tokens
    for _ in range(6):
        best = case.reference(ids, tokens, case.pixels)[:, -1].argmax(-1, keepdim=True)
        ids, tokens = torch.cat((ids, best), dim=1), torch.cat((tokens, torch.ones_like(best).bool()), dim=1)
    expected = ids[:, -6:]
    assert not (expected == EOS).any() and not (expected == IMAGE).any(), "the reference is to go on"
    assert torch.equal(case.model.generate(case.inputs, 6, "tokens"), expected)


def noise(x: Tensor, hook: HookPoint) -> Tensor:
    return x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(x.numel()))


@torch.no_grad()
def test_every_hook_is_causal(case: Case) -> None:
    clean = case.model(case.inputs)
    for name in case.model.hook_dict:
        changed = case.model.run_with_hooks(case.inputs, fwd_hooks=[(name, noise)])
        assert (changed - clean)[case.tokens].abs().max() > 1e-3, name


@torch.no_grad()
def test_neurons_and_heads_at_zero_are_columns_at_zero(case: Case) -> None:
    block = case.reference.layers[1]
    entry = slice(2 * D_HEAD, 3 * D_HEAD)

    def silence(x: Tensor, hook: HookPoint) -> Tensor:
        x = x.clone()
        x[..., 7] = 0
        return x

    def silence_head(z: Tensor, hook: HookPoint) -> Tensor:
        z = z.clone()
        z[:, :, 2] = 0
        return z

    hooks = {"mlp.hook_post": (block.narrow, 7, silence), "attn.hook_z": (block.out, entry, silence_head)}
    for name, (linear, columns, fn) in hooks.items():
        ours = case.model.run_with_hooks(case.inputs, fwd_hooks=[(f"blocks.1.{name}", fn)])
        kept = linear.weight.data.clone()
        linear.weight.data[:, columns] = 0
        try:
            expected = case.expected()
        finally:
            linear.weight.data.copy_(kept)
        case.close(ours, expected)
        assert (ours - case.model(case.inputs))[case.tokens].abs().max() > 1e-3


@torch.no_grad()
def test_parts_of_the_residual_stream_add_up_to_logits(case: Case) -> None:
    """TransformerLens's decomposition with a LayerNorm: what is left is the norm's and the head's bias."""
    logits, cache = case.model.run_with_cache(case.inputs)
    parts, labels = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
    assert len(labels) == N_LAYERS * (N_HEADS + 1) + 2
    parts = cache.apply_ln_to_stack(parts, layer=-1)
    token = torch.tensor([[6]]).expand(case.ids.shape)
    directions = case.model.tokens_to_residual_directions(token)
    total = torch.einsum("cbpd,bpd->bp", parts, directions)
    head, norm = case.reference.head, case.reference.norm
    constant = norm.bias @ head.weight[6] + head.bias[6]
    case.close((total + constant)[..., None], logits[..., 6:7])


def test_weights_by_transformer_lens_names(case: Case) -> None:
    named = case.model.tl_parameters()
    assert "blocks.0.mlp.W_gate" not in named and not hasattr(case.model, "W_gate")
    assert torch.equal(named["blocks.1.mlp.b_in"], case.reference.layers[1].wide.bias)
    assert torch.equal(named["unembed.b_U"], case.reference.head.bias)
    assert torch.equal(case.model.W_in[1], case.reference.layers[1].wide.weight.T)
    assert case.model.accumulated_bias(2).shape == (D_MODEL,)


def test_an_incomplete_family_names_what_it_lacks() -> None:
    class Unfinished(HookedVLM):
        family = "unfinished"

    with pytest.raises(TypeError, match="encode_images"):
        Unfinished(*[None] * 4)
