"""`save_pretrained`: a hooked model's weights, with all edits, back in Hugging Face's format."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from hones_lens.model.nn.placed import weights_of
from hones_lens.model.quantised import is_quantised
from hones_lens.model.weights import WeightMap


class HFSource:
    """What a hooked model keeps of the Hugging Face model that it was made from.

    Args:
        config: Its config.
        generation_config: Its generation config, or None.
        weight_map: Its names of weights, and ours for each.
        unused: The weights that the hooked model has no use for, by Hugging Face's names.
    """

    def __init__(
        self, config: Any, generation_config: Any, weight_map: WeightMap, unused: Mapping[str, Tensor]
    ):
        self.config, self.generation_config = config, generation_config
        self.weight_map, self.unused = weight_map, dict(unused)


def hf_state_dict(model: Any) -> dict[str, Tensor]:
    """The weights by Hugging Face's names, as they are now; views, except where several of ours make one.

    Raises:
        ValueError: The model was not made from a Hugging Face model.
    """
    source = _source(model)
    ours = weights_of(model, remove_duplicate=False)
    weights = {name: weight.to(model.cfg.device, model.cfg.dtype) for name, weight in source.unused.items()}
    for name, target in source.weight_map.items():
        if isinstance(target, str):
            weights[name] = ours[target]
        elif target:
            weights[name] = torch.cat([ours[part] for part in target])
    return weights


def save_pretrained(model: Any, folder: str | Path) -> Path:
    """Write config, weights, generation config and processor as Hugging Face's `from_pretrained` reads them.

    Weights are written as they are now, so that edits of them (`model.blocks[2].mlp.W_out[7] = 0`, or
    `hones_lens.interventions.fold_neuron_scales`) are in the file. Hooks are not weights, and are not saved.

    Args:
        model: A hooked model that was made from a checkpoint or from a Hugging Face model.
        folder: Where to; it is made if it is not there.

    Returns:
        The folder.

    Raises:
        ValueError: The model was not made from a Hugging Face model, or its weights are quantised.
        FileExistsError: The folder holds something already.
    """
    source, folder = _source(model), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} holds something already: choose a new or empty folder")
    if is_quantised(source.config):
        raise ValueError(
            f"{model.cfg.model_name} has quantised weights, which are read and not written: load the "
            "original checkpoint to save it with edits"
        )
    hf_model = empty_hf_model(source.config)
    weights = hf_state_dict(model)
    report = hf_model.load_state_dict(weights, strict=False, assign=True)
    absent = [name for name, p in hf_model.named_parameters() if p.is_meta]
    if absent or report.unexpected_keys:
        raise ValueError(
            f"weights that can't be written back: {', '.join([*absent, *report.unexpected_keys][:5])}"
        )
    if source.generation_config is not None:
        hf_model.generation_config = deepcopy(source.generation_config)
    if _untied(hf_model):
        for config in (hf_model.config, hf_model.config.get_text_config()):
            config.tie_word_embeddings = False
    hf_model.save_pretrained(folder)
    if model.processor is not None:
        model.processor.save_pretrained(folder)
    return folder


def _untied(hf_model: Any) -> bool:
    """Whether embedding and unembedding differ, e.g. as one was edited: then nobody may tie them."""
    parts = (hf_model.get_input_embeddings(), hf_model.get_output_embeddings())
    embedding, unembedding = (part.weight for part in parts)
    return not torch.equal(embedding, unembedding)


def _source(model: Any) -> HFSource:
    if model.hf_source is None:
        raise ValueError(
            f"{model.cfg.model_name} was not made from a Hugging Face model: there is no config to save"
        )
    return model.hf_source


def empty_hf_model(config: Any) -> Any:
    """Hugging Face's model of a config, without values: its weights are on the meta device."""
    auto_model: Any = AutoModelForImageTextToText
    with torch.device("meta"):
        return auto_model.from_config(deepcopy(config))
