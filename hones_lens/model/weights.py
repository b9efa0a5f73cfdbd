"""Maps from Hugging Face's weight names to ours."""

from __future__ import annotations

WeightMap = dict[str, str | tuple[str, ...] | None]
"""Hugging Face name → ours; several of ours split its rows evenly; None drops the weight on purpose."""

_TOP = {"embed_tokens": "embed", "norm": "ln_final"}
_BLOCK = {
    "input_layernorm": "ln1",
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o",
    "self_attn.q_norm": "attn.q_norm",
    "self_attn.k_norm": "attn.k_norm",
    "post_attention_layernorm": "ln2",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
_VIT_BLOCK = {
    "layer_norm1": "ln1",
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.out_proj": "attn.o",
    "layer_norm2": "ln2",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
}


def decoder_weights(n_layers: int, prefix: str = "model.language_model") -> WeightMap:
    """The map for a decoder that is laid out as LLaMA's, as most families' are.

    Args:
        n_layers: Number of blocks.
        prefix: Name of the decoder in Hugging Face's model.
    """
    top = {f"{prefix}.{hf_name}": name for hf_name, name in _TOP.items()} | {"lm_head": "unembed.linear"}
    return parameters(top) | parameters(
        {
            f"{prefix}.layers.{layer}.{hf_name}": f"blocks.{layer}.{name}"
            for layer in range(n_layers)
            for hf_name, name in _BLOCK.items()
        }
    )


def vit_weights(hf_prefix: str, n_layers: int) -> WeightMap:
    """The map for the blocks of a vision tower that is laid out as CLIP's and SigLIP's are.

    Args:
        hf_prefix: Name of the blocks in Hugging Face's model, e.g. `model.vision_tower.encoder.layers`.
        n_layers: Number of blocks that are built.
    """
    return parameters(
        {
            f"{hf_prefix}.{layer}.{hf_name}": f"vision_encoder.blocks.{layer}.{name}"
            for layer in range(n_layers)
            for hf_name, name in _VIT_BLOCK.items()
        }
    )


def parameters(modules: dict[str, str]) -> WeightMap:
    """A map of module names expanded to their weights and biases."""
    return {f"{k}.{s}": f"{v}.{s}" for k, v in modules.items() for s in ("weight", "bias")}
