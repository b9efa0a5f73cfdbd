"""Generation configs and sampling: the tokens of Hugging Face's `generate` on the same checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from helpers import random_llava, random_qwen
from torch import Tensor
from transformers import GenerationConfig, TextIteratorStreamer

from hones_lens import Decoding, HookedVLM, VLMInputs
from hones_lens.model.decoding import APPLIED, REFUSED, SAMPLING

NEW = 12
# Of `GenerationConfig`: what changes no token of greedy decoding or of draws, or is said by arguments.
WITHOUT_EFFECT = {
    *("max_length", "max_new_tokens", "do_sample", "num_return_sequences", "use_cache"),  # arguments
    *("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),  # read by the config
    *("early_stopping", "length_penalty", "diversity_penalty"),  # of beam search, which is refused
    *("cache_config", "max_cache_len", "compile_config", "disable_compile", "prefill_chunk_size"),  # speed
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_dict_in_generate", "low_memory", "transformers_version", "continuous_batching_config"),
    # Assisted decoding: guesses are kept where the model itself chooses the same.
    *("use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    *("assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size"),
    *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "speculation_type"),
    "assistant_ensemble_weight",
}


class Checkpoint:
    """One random model, whose generation config each test sets anew; a batch of rows of several lengths."""

    def __init__(self, made: Any):
        self.hf = made.make_hf(made.make_config(text={"num_key_value_heads": 2}), seed=11)
        self.processor = made.make_pair(self.hf.config)[1].processor
        self.plain = deepcopy(self.hf.generation_config)
        self.inputs = made.mixed_batch(self.hooked())

    def hooked(self, **settings: Any) -> HookedVLM:
        self.hf.generation_config = deepcopy(self.plain)
        for name, value in settings.items():
            setattr(self.hf.generation_config, name, value)
        return HookedVLM.from_hf(self.hf, self.processor)

    def hf_tokens(self, inputs: VLMInputs, **options: Any) -> Tensor:
        self.hf.model.rope_deltas = None
        options = {"do_sample": False, "max_new_tokens": NEW, **options}
        return self.hf.generate(**inputs.to_hf(), **options)[:, inputs.input_ids.shape[1] :]


@pytest.fixture(scope="module", params=[random_llava, random_qwen], ids=["llava", "qwen"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return Checkpoint(request.param)


# What to set, made from the tokens [new] that the first row gets by plain greedy decoding.
SETTINGS: dict[str, Callable[[list[int]], dict[str, Any]]] = {
    "repetition_penalty": lambda said: {"repetition_penalty": 1.3},
    "repetition_penalty, below one": lambda said: {"repetition_penalty": 0.5},
    "no_repeat_ngram_size": lambda said: {"no_repeat_ngram_size": 2},
    "suppress_tokens": lambda said: {"suppress_tokens": said[:2]},
    "begin_suppress_tokens": lambda said: {"begin_suppress_tokens": said[:1]},
    "bad_words_ids": lambda said: {"bad_words_ids": [said[:1], said[2:4]]},
    "sequence_bias": lambda said: {"sequence_bias": [[said[:1], -50.0], [[said[1], 7], 50.0]]},
    "min_new_tokens": lambda said: {"min_new_tokens": 8, "eos_token_id": said[1]},
    "min_length": lambda said: {"min_length": 3, "eos_token_id": said[1]},
    "forced_eos_token_id": lambda said: {"forced_eos_token_id": 2},
    "exponential_decay_length_penalty": lambda said: {"exponential_decay_length_penalty": (3, 4.0)},
    "several": lambda said: {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "suppress_tokens": said[:1],
        "min_new_tokens": 5,
        "renormalize_logits": True,
        "remove_invalid_values": True,
    },
    "what Qwen2.5-VL ships": lambda said: {
        "repetition_penalty": 1.05,
        "do_sample": True,
        "temperature": 0.1,
        "top_p": 0.001,
        "top_k": 1,
    },
}
SHOWS_NO_DIFFERENCE = ("min_length", "what Qwen2.5-VL ships")


@pytest.mark.parametrize("kind", SETTINGS)
def test_greedy_tokens_follow_the_generation_config(checkpoint: Checkpoint, kind: str) -> None:
    inputs = checkpoint.inputs
    model = checkpoint.hooked()
    plain = model.generate(inputs, NEW, "tokens")
    settings = SETTINGS[kind](plain[0].tolist())
    model = checkpoint.hooked(**settings)
    expected = checkpoint.hf_tokens(inputs)
    assert torch.equal(model.generate(inputs, NEW, "tokens"), expected)
    assert torch.equal(model.generate(inputs, NEW, "tokens", use_kv_cache=False), expected)
    if kind not in SHOWS_NO_DIFFERENCE:
        assert expected.tolist() != plain.tolist(), "the setting is too weak to show"
    model.decoding = Decoding()
    if "eos_token_id" not in settings:
        assert torch.equal(model.generate(inputs, NEW, "tokens"), plain)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 3),
        ("num_beam_groups", 2),
        ("penalty_alpha", 0.6),
        ("dola_layers", "high"),
        ("guidance_scale", 1.5),
        ("encoder_repetition_penalty", 1.2),
        ("encoder_no_repeat_ngram_size", 2),
        ("token_healing", True),
        ("stop_strings", ["a"]),
        ("max_time", 1.0),
        ("constraints", [1]),
        ("force_words_ids", [[1]]),
        ("watermarking_config", {"greenlist_ratio": 0.5}),
        ("cache_implementation", "quantized"),
    ],
)
def test_what_is_not_handled_is_refused_by_name(checkpoint: Checkpoint, name: str, value: Any) -> None:
    model = checkpoint.hooked(**{name: value})
    with pytest.raises(ValueError, match=rf"sets {name}=.*plain greedy"):
        model.generate(checkpoint.inputs)
    model.decoding = Decoding()
    assert len(model.generate(checkpoint.inputs, 2)) == 3


def test_every_setting_of_hugging_face_is_applied_refused_or_without_effect() -> None:
    listed = [*APPLIED, *SAMPLING, *REFUSED, *WITHOUT_EFFECT]
    assert len(set(listed)) == len(listed)
    public = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert public - set(listed) == set()


def test_defaults_of_hugging_face_change_nothing() -> None:
    config = GenerationConfig(**GenerationConfig._get_default_generation_params())
    assert (
        str(Decoding.of(config)) == str(Decoding.of(GenerationConfig())) == str(Decoding.of(None)) == "greedy"
    )
    assert not Decoding.of(config).processors(torch.ones(1, 4), (2,), 5)


def test_decoding_says_what_it_does() -> None:
    config = GenerationConfig(repetition_penalty=1.05, top_k=1, temperature=0.1, do_sample=True)
    decoding = Decoding.of(config)
    assert str(decoding) == "greedy, repetition_penalty=1.05"
    assert decoding.describe(do_sample=True) == "sampled, repetition_penalty=1.05, temperature=0.1, top_k=1"
    assert Decoding().describe(do_sample=True) == "sampled, top_k=50"
    with pytest.raises(TypeError, match=r"repetition_penality.*valid: .*repetition_penalty"):
        Decoding({"repetition_penality": 1.2})


def test_settings_of_a_call_go_before_the_checkpoint_s(checkpoint: Checkpoint) -> None:
    model, inputs = checkpoint.hooked(repetition_penalty=1.3), checkpoint.inputs
    for settings in ({"repetition_penalty": 1.0}, {"repetition_penalty": 2.0, "no_repeat_ngram_size": 2}):
        expected = checkpoint.hf_tokens(inputs, **settings)
        assert torch.equal(model.generate(inputs, NEW, "tokens", **settings), expected)


def test_the_given_model_is_not_changed(checkpoint: Checkpoint) -> None:
    model = checkpoint.hooked(suppress_tokens=[5, 6])
    model.decoding.settings["suppress_tokens"].append(7)
    assert checkpoint.hf.generation_config.suppress_tokens == [5, 6]


def test_choices_that_would_count_padding_are_refused(checkpoint: Checkpoint) -> None:
    inputs, alone = checkpoint.inputs, checkpoint.inputs[2].without_padding()
    eos = int(checkpoint.hooked().generate(alone, NEW, "tokens")[0, 1])
    for name, value in (("min_length", alone.input_ids.shape[1] + 6), ("no_repeat_ngram_size", 1)):
        model = checkpoint.hooked(**{name: value}, eos_token_id=eos)
        with pytest.raises(ValueError, match=rf"{name}={value} counts the padding"):
            model.generate(inputs, 3)
        assert torch.equal(model.generate(alone, NEW, "tokens"), checkpoint.hf_tokens(alone))


# -- sampling ------------------------------------------------------------------------------------

DRAWS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.8, "top_k": 0},
    {"top_k": 5},
    {"top_p": 0.6, "top_k": 0},
    {"min_p": 0.05, "top_k": 0},
    {"typical_p": 0.5, "top_k": 30},
    {"epsilon_cutoff": 0.002, "eta_cutoff": 0.003},
    {"top_h": 0.5},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2, "renormalize_logits": True},
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("settings", DRAWS, ids=lambda s: ", ".join(s) or "defaults")
def test_draws_equal_hugging_face_s(checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
    model, inputs = checkpoint.hooked(), checkpoint.inputs
    torch.manual_seed(5)
    expected = checkpoint.hf_tokens(inputs, do_sample=True, num_return_sequences=2, **settings)
    options = {"do_sample": True, "num_return_sequences": 2, "return_type": "tokens", **settings}
    assert torch.equal(model.generate(inputs, NEW, generator=5, **options), expected)
    torch.manual_seed(5)
    assert torch.equal(model.generate(inputs, NEW, **options), expected)
    own = torch.Generator().manual_seed(5)
    assert torch.equal(model.generate(inputs, NEW, generator=own, **options), expected)
    assert not torch.equal(model.generate(inputs, NEW, generator=own, **options), expected)
    from_checkpoint = checkpoint.hooked(**settings)
    options = {name: value for name, value in options.items() if name not in settings}
    assert torch.equal(from_checkpoint.generate(inputs, NEW, generator=5, **options), expected)


@pytest.mark.parametrize("settings", DRAWS[1:], ids=lambda s: ", ".join(s))
def test_processed_logits_equal_hugging_face_s(checkpoint: Checkpoint, settings: dict[str, Any]) -> None:
    """Step by step, on Hugging Face's own logits."""
    model, inputs = checkpoint.hooked(), checkpoint.inputs
    checkpoint.hf.model.rope_deltas = None
    torch.manual_seed(2)
    run = checkpoint.hf.generate(
        **inputs.to_hf(),
        **{"do_sample": True, "max_new_tokens": 5, **settings},
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    process = model.decoding.with_settings(settings).processors(
        inputs.attention_mask, model.cfg.eos_token_ids, 5, do_sample=True
    )
    n = inputs.input_ids.shape[1]
    for step, (scores, logits) in enumerate(zip(run.scores, run.logits, strict=True)):
        assert torch.equal(process(run.sequences[:, : n + step], logits.clone()), scores)


def test_texts_of_several_answers_follow_each_other(checkpoint: Checkpoint) -> None:
    model, inputs = checkpoint.hooked(), checkpoint.inputs
    options = {"do_sample": True, "generator": 1, "num_return_sequences": 3}
    texts = model.generate(inputs, 4, **options)
    tokens = model.generate(inputs, 4, "tokens", **options)
    assert texts == [t.strip() for t in model.tokenizer.batch_decode(tokens, skip_special_tokens=True)]
    assert len(texts) == 9
    bound = model.bind(inputs)
    assert bound.generate(max_new_tokens=4, **options) == texts


def test_hooks_are_active_where_answers_are_drawn(checkpoint: Checkpoint) -> None:
    model, inputs = checkpoint.hooked(), checkpoint.inputs

    def always(logits: Tensor, hook: object) -> Tensor:
        return torch.zeros_like(logits)

    with model.hooks([("ln_final.hook_normalized", always)]):  # all logits equal: every token as likely
        drawn = model.generate(inputs, 40, "tokens", do_sample=True, top_k=0, generator=0)
    assert len(drawn.unique()) > 60


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.5}, "temperature: greedy decoding draws nothing"),
        ({"top_k": 5, "top_p": 0.5}, "top_k, top_p: greedy"),
        ({"generator": 3}, "generator: greedy"),
        ({"num_return_sequences": 2}, "num_return_sequences: greedy"),
        ({"num_return_sequences": 0, "do_sample": True}, "at least 1, not 0"),
        ({"temperature": 0.0, "do_sample": True}, "temperature"),
        ({"temperature": -1, "do_sample": True}, "temperature"),
        ({"top_p": 1.5, "do_sample": True}, "top_p"),
        ({"top_k": -2, "do_sample": True}, "top_k"),
        ({"repetition_penalty": -1.0}, "penalty"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"return_type": "str"}, "unknown return_type 'str'; valid: text, tokens"),
    ],
)
def test_options_without_effect_and_invalid_values_raise(
    checkpoint: Checkpoint, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint.hooked().generate(checkpoint.inputs, 2, **options)


def test_an_unknown_option_raises(checkpoint: Checkpoint) -> None:
    with pytest.raises(TypeError, match=r"'temprature'; valid: .*temperature"):
        checkpoint.hooked().generate(checkpoint.inputs, 2, do_sample=True, temprature=0.5)


class Recorder:
    """A streamer that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Tensor] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.told.append(value.clone())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("eos", [False, True])
def test_streamers_are_told_what_hugging_face_tells_them(checkpoint: Checkpoint, eos: bool) -> None:
    inputs = checkpoint.inputs[1]
    first = checkpoint.hooked().generate(inputs, NEW, "tokens")[0]
    model = checkpoint.hooked(**({"eos_token_id": int(first[3])} if eos else {}))
    ours, theirs = Recorder(), Recorder()
    model.generate(inputs, NEW, streamer=ours)
    checkpoint.hf_tokens(inputs, streamer=theirs)
    assert ours.ended == theirs.ended == 1
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(ours.told, theirs.told))
    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    (text,) = model.generate(inputs, NEW, streamer=streamer)
    assert "".join(streamer).strip() == text


@pytest.fixture(autouse=True)
def _restored(checkpoint: Checkpoint) -> Iterator[None]:
    yield
    checkpoint.hf.generation_config = deepcopy(checkpoint.plain)
