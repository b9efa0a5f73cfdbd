"""Loading checkpoints from folders or the Hub, and turning Hugging Face models into hooked ones."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig
from transformers.utils import logging as hf_logging

from hones_lens.model.choices import require_choice
from hones_lens.model.config import all_settings, checkpoint_path, find_settings, token_ids
from hones_lens.model.decoding import Decoding
from hones_lens.model.dispatch import (
    DeviceMap,
    check_device_map,
    check_parts,
    home_device,
    offloaded_weights,
    require_accelerate,
)
from hones_lens.model.families import load_family
from hones_lens.model.fitting import Need
from hones_lens.model.hooked_vlm import HookedVLM
from hones_lens.model.loadable import (
    check_config,
    check_device,
    check_dtype,
    check_folder,
    check_hf_model,
    check_json_files,
    check_shards,
    naming,
)
from hones_lens.model.names import did_you_mean
from hones_lens.model.nn.placed import is_placed, place
from hones_lens.model.quantised import is_quantised, quantised_weights, without_quantisation
from hones_lens.model.saving import HFSource, empty_hf_model
from hones_lens.model.weights import WeightMap


def resolve(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """The folder or Hub id, and the Hub revision, of a model name.

    Args:
        name: A known model, a folder or a Hub id.
        revision: A branch, tag or commit on the Hub; default: that of the known model's settings, else the
            repository's main branch.

    Raises:
        ValueError: Neither a known model, nor a folder of a checkpoint, nor a Hub id (lists the known ones);
            or a revision of what is not on the Hub.
    """
    place, known_revision = _resolve(name)
    if revision is not None and Path(place).is_dir():
        raise ValueError(f"{name!r} is a folder, which has no revision {revision!r}")
    return place, revision or known_revision


def _resolve(name: str) -> tuple[str, str | None]:
    settings = find_settings(name)
    if settings is not None and settings.checkpoint is not None:
        return str(checkpoint_path(settings.checkpoint)), None
    if settings is not None:
        return str(settings.hub_id), settings.revision
    if Path(name).is_dir():
        check_folder(Path(name))
        return name, None
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return name, None
    known = [alias for s in all_settings().values() for alias in (s.name, *s.aliases)]
    hint = did_you_mean(name, known)
    raise ValueError(f"unknown model {name!r}: not a folder, nor a Hub id; known: {', '.join(known)}{hint}")


def load_hf_model(
    name: str,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    plain_greedy: bool = False,
    revision: str | None = None,
    device_map: DeviceMap | None = None,
    **processor_options: Any,
) -> tuple[Any, Any]:
    """Hugging Face's own model (in eval mode) and processor for a name that `resolve` takes.

    With `plain_greedy`, its generation config keeps the special tokens alone. The other options are those
    of `HookedVLM.from_pretrained`.

    Raises:
        ImportError: A `device_map` without accelerate.
        ValueError: An unknown name, family, device or processor option, weights that are missing or left
            over, or that don't fit into memory (says how much is needed and free, and what would help).
    """
    check_dtype(dtype)
    folder, revision = resolve(name, revision)
    device, device_map = check_device_map(device, device_map)
    torch_device = check_device(device)
    if dtype is None:
        dtype = torch.float32 if torch_device.type == "cpu" else "auto"
    auto_config: Any = AutoConfig
    if Path(folder).is_dir():
        check_json_files(Path(folder))
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    with naming(name, "config"):
        config = auto_config.from_pretrained(folder, **source)
    check_config(name, config)
    family = load_family(config.model_type)
    without_weights = empty_hf_model(config)
    check_parts(device_map, without_weights)
    if is_quantised(config):
        device_map = device_map or {"": str(torch_device)}  # bitsandbytes quantises where it loads
    else:
        device_map = _fitting_map(device_map, Need(name, without_weights, dtype, folder), torch_device)
    for option in processor_options:
        valid = family.processor_options
        require_choice(f"processor option of {name!r}:", option, valid, "" if valid else "none")
    if Path(folder).is_dir():
        check_shards(Path(folder))
    model = _read_weights(name, folder, {**source, "dtype": dtype, "device_map": device_map})
    if plain_greedy:
        model.generation_config = _special_tokens_alone(model.generation_config)
    load_processor = family.processor_class.from_pretrained
    with naming(name, "tokenizer or picture processor"):
        processor = load_processor(folder, **source, **processor_options)
    return (model if device_map else model.to(torch_device)).eval(), processor


def _read_weights(name: str, folder: str, options: dict[str, Any]) -> Any:
    """Hugging Face's model of a folder or Hub id, all of whose weights are there."""
    auto_model: Any = AutoModelForImageTextToText
    with _quietly(), naming(name, "model"):
        model, report = auto_model.from_pretrained(
            folder, **options, output_loading_info=True, ignore_mismatched_sizes=True
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            listed = ", ".join(map(str, sorted(report[kind], key=str)[:5]))
            raise ValueError(f"checkpoint {name!r} has {kind.replace('_', ' ')}: {listed}")
    return model


def _fitting_map(device_map: DeviceMap | None, need: Need, device: torch.device) -> DeviceMap | None:
    """The device map that a model is loaded with; `auto` is one device, where that has room."""
    if device_map == "auto" and need.fits(device):
        device_map = None
    if device_map is None:
        need.check(device)
    else:
        require_accelerate()
    return device_map


def _special_tokens_alone(config: Any) -> GenerationConfig:
    """A generation config with which greedy decoding is the plain one."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{name: getattr(config, name) for name in names})


@contextmanager
def _quietly() -> Generator[None]:
    """No progress bars, and no report of missing weights, which are an error here."""
    shown, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if shown:
            hf_logging.enable_progress_bar()


def load_model(
    name: str,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    plain_greedy: bool = False,
    revision: str | None = None,
    device_map: DeviceMap | None = None,
    **processor_options: Any,
) -> HookedVLM:
    """Load and hook a model; see `HookedVLM.from_pretrained`."""
    options: dict[str, Any] = {"plain_greedy": plain_greedy, "revision": revision, **processor_options}
    model, processor = load_hf_model(name, device, dtype, device_map=device_map, **options)
    hooked = hook_hf_model(model, processor)
    with naming(name, "picture processor"):  # its settings are wrong for every picture or for none
        hooked.process_images([Image.new("RGB", (64, 64))])
    settings = find_settings(name)
    hooked.cfg = replace(hooked.cfg, model_name=settings.name if settings else name)
    return hooked


def hook_hf_model(hf_model: Any, processor: Any = None) -> HookedVLM:
    """Hook an in-memory Hugging Face model; see `HookedVLM.from_hf`."""
    check_hf_model(hf_model)
    config = hf_model.config
    family = load_family(config.model_type)
    name = config.name_or_path or config.model_type
    home = home_device(hf_model)
    hooked = family.from_config(without_quantisation(config), name, home, hf_model.dtype)
    weight_map, unused = _share_weights(hooked, hf_model, home)
    hooked.hf_source = HFSource(config, getattr(hf_model, "generation_config", None), weight_map, unused)
    hooked.processor = processor
    hooked.cfg = replace(
        hooked.cfg, **_special_tokens(hooked, hf_model), default_prepend_bos=_prepends_bos(processor)
    )
    hooked.decoding = Decoding.of(getattr(hf_model, "generation_config", None))
    return hooked.eval()


def _share_weights(
    hooked: HookedVLM, hf_model: Any, home: torch.device
) -> tuple[WeightMap, dict[str, Tensor]]:
    """Let every parameter of the hooked model share the storage of the Hugging Face weight it is mapped to.

    Those that accelerate keeps elsewhere are read there when they are needed.

    Returns:
        The map from Hugging Face's names to ours, and the weights that are mapped to nothing.

    Raises:
        ValueError: A weight that is not mapped, or a parameter that no weight fills; names them.
    """
    hf_weights = {name: p.detach() for name, p in hf_model.named_parameters(remove_duplicate=False)}
    readers = offloaded_weights(hf_model)
    for name, (shape, read) in quantised_weights(hf_model).items():
        hf_weights[name] = torch.empty(shape, dtype=hf_model.dtype, device="meta")
        readers[name] = read
    weight_map = hooked.weight_map(hooked.cfg, list(hf_weights))
    expected = {name for name, _ in hooked.named_parameters()}
    targets: WeightMap = {name: weight_map.get(name, name) for name in hf_weights}
    targets_of = {
        name: (target,) if isinstance(target, str) else target or () for name, target in targets.items()
    }
    unmapped = sorted(name for name, target in targets_of.items() if not expected.issuperset(target))
    if unmapped:
        raise ValueError(f"weights that this family does not use: {', '.join(unmapped[:5])}")
    state_dict: dict[str, Tensor] = {}
    for name, target in targets_of.items():
        state_dict.update(zip(target, hf_weights[name].chunk(len(target)) if target else (), strict=True))
    missing = sorted(expected - set(state_dict))
    if missing:
        raise ValueError(f"weights that are missing: {', '.join(missing[:5])}")
    for name, parameter in hooked.named_parameters():
        if parameter.shape != state_dict[name].shape:
            raise ValueError(
                f"weight {name} has shape {list(state_dict[name].shape)}, not {list(parameter.shape)}"
            )
    hooked.load_state_dict(state_dict, strict=True, assign=True)
    hooked.requires_grad_(False)  # or every pass outside `no_grad` would keep its graph
    place(
        hooked,
        home,
        {ours: read for name in readers for ours, read in _parts(readers[name], targets_of[name])},
    )
    if not is_placed(hooked) and hooked.unembed.W_U.data_ptr() == hooked.embed.weight.data_ptr():
        hooked.unembed.tie(hooked.embed)  # so that they stay tied when the model is moved
    unused = [name for name, target in targets.items() if not target]
    return targets, {name: readers[name]() if name in readers else hf_weights[name] for name in unused}


def _parts(read: Callable[[], Tensor], names: Sequence[str]) -> list[tuple[str, Callable[[], Tensor]]]:
    """How each of several weights is read that are rows of one, in this order."""

    def part(index: int) -> Callable[[], Tensor]:
        return lambda: read().chunk(len(names))[index]

    return [(name, part(index)) for index, name in enumerate(names)]


def _special_tokens(hooked: HookedVLM, hf_model: Any) -> dict[str, Any]:
    """EOS and padding ids as Hugging Face's `generate` takes them: from the generation config first."""
    settings = getattr(hf_model, "generation_config", None)
    if settings is None:
        return {}
    eos = token_ids(settings.eos_token_id)
    pad = settings.pad_token_id
    if pad is None and eos:
        pad = eos[0]
    return {"eos_token_ids": eos} if pad is None else {"eos_token_ids": eos, "pad_token_id": pad}


def _prepends_bos(processor: Any) -> bool:
    """Whether the tokenizer puts a beginning-of-sequence token before a text by itself."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or tokenizer.bos_token_id is None:
        return False
    ids: list[int] = tokenizer("").input_ids
    return ids[:1] == [tokenizer.bos_token_id]
