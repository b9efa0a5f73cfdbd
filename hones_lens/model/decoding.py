"""How new tokens are chosen: a checkpoint's generation config, applied as Hugging Face's `generate` does.

Every setting that changes the choice is applied by Hugging Face's own class, or refused by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import logits_process as hf

from hones_lens.model.names import did_you_mean


@dataclass(frozen=True)
class _Prompts:
    """What a processor may need to know of the prompts that are continued."""

    attention_mask: Tensor  # [batch pos]
    eos_token_ids: Tensor
    max_new_tokens: int

    @property
    def length(self) -> int:
        return self.attention_mask.shape[1]

    @property
    def device(self) -> Any:
        return self.attention_mask.device

    @property
    def padding(self) -> Tensor | None:
        """Leading padding of each row [batch]; None where no row has any."""
        if bool(self.attention_mask.all()):
            return None
        return (self.attention_mask != 0).int().argmax(dim=1)


_Maker = Callable[[Any, _Prompts], Any]

# Makers of Hugging Face's processors by setting, in the order in which `generate` applies them.
_PROCESSORS: dict[str, _Maker] = {
    "sequence_bias": lambda value, prompts: hf.SequenceBiasLogitsProcessor(value),
    "repetition_penalty": lambda value, prompts: hf.RepetitionPenaltyLogitsProcessor(
        float(value), prompt_ignore_length=prompts.padding
    ),
    "no_repeat_ngram_size": lambda value, prompts: hf.NoRepeatNGramLogitsProcessor(value),
    "bad_words_ids": lambda value, prompts: hf.NoBadWordsLogitsProcessor(value, prompts.eos_token_ids),
    "min_length": lambda value, prompts: hf.MinLengthLogitsProcessor(
        value, prompts.eos_token_ids, prompts.device
    ),
    "min_new_tokens": lambda value, prompts: hf.MinNewTokensLengthLogitsProcessor(
        prompts.length, value, prompts.eos_token_ids, prompts.device
    ),
    "forced_bos_token_id": lambda value, prompts: hf.ForcedBOSTokenLogitsProcessor(value),
    "forced_eos_token_id": lambda value, prompts: hf.ForcedEOSTokenLogitsProcessor(
        prompts.length + prompts.max_new_tokens, value, prompts.device
    ),
    "remove_invalid_values": lambda value, prompts: hf.InfNanRemoveLogitsProcessor(),
    "exponential_decay_length_penalty": lambda value, prompts: hf.ExponentialDecayLengthPenalty(
        value, prompts.eos_token_ids, prompts.length
    ),
    "suppress_tokens": lambda value, prompts: hf.SuppressTokensLogitsProcessor(value, prompts.device),
    "begin_suppress_tokens": lambda value, prompts: hf.SuppressTokensAtBeginLogitsProcessor(
        value, prompts.length, prompts.device
    ),
}
_SAMPLING: dict[str, _Maker] = {
    "temperature": lambda value, prompts: hf.TemperatureLogitsWarper(float(value)),
    "top_h": lambda value, prompts: hf.TopHLogitsWarper(value),
    "top_k": lambda value, prompts: hf.TopKLogitsWarper(value),
    "top_p": lambda value, prompts: hf.TopPLogitsWarper(value),
    "min_p": lambda value, prompts: hf.MinPLogitsWarper(value),
    "typical_p": lambda value, prompts: hf.TypicalLogitsWarper(value),
    "epsilon_cutoff": lambda value, prompts: hf.EpsilonLogitsWarper(value),
    "eta_cutoff": lambda value, prompts: hf.EtaLogitsWarper(value, device=prompts.device),
}
_LAST: dict[str, _Maker] = {"renormalize_logits": lambda value, prompts: hf.LogitNormalization()}

_NEEDS_EOS = ("min_length", "min_new_tokens", "exponential_decay_length_penalty")
_DEFAULT_TOP_K = 50  # of Hugging Face's `generate`, where neither the call nor the checkpoint sets it

# Values with which a setting does nothing, besides None.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "remove_invalid_values": (False,),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "temperature": (1,),
    "top_k": (0,),
    "top_p": (1,),
    "min_p": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "renormalize_logits": (False,),
}
# Settings that change the tokens and are not handled, with the values that change nothing besides None.
REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "constraints": (),
    "force_words_ids": (),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "watermarking_config": (),
    "token_healing": (False,),
    "stop_strings": (),
    "max_time": (),
    "cache_implementation": (
        "dynamic",
        "static",
        "offloaded",
        "offloaded_static",
        "hybrid",
        "sliding_window",
    ),
}
APPLIED = (*_PROCESSORS, *_LAST)
SAMPLING = tuple(_SAMPLING)


@dataclass(frozen=True)
class Decoding:
    """Settings that change which token follows, by their names in Hugging Face's `GenerationConfig`.

    Without settings, decoding is plain greedy: the token with the largest logit follows.

    Attributes:
        settings: E.g. `{"repetition_penalty": 1.05}`. Those of sampling (`temperature`, `top_k`, …) are
            read where tokens are drawn.
    """

    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        known = (*APPLIED, *SAMPLING, *REFUSED)
        for name in self.settings:
            if name not in known:
                raise TypeError(
                    f"unknown setting of decoding {name!r}; valid: {', '.join((*APPLIED, *SAMPLING))}"
                    f"{did_you_mean(name, (*APPLIED, *SAMPLING))}"
                )

    @classmethod
    def of(cls, config: GenerationConfig | None) -> Decoding:
        """The settings of a generation config that change which token follows; plain greedy for None."""
        values = {name: getattr(config, name, None) for name in (*APPLIED, *SAMPLING, *REFUSED)}
        return cls({name: deepcopy(value) for name, value in values.items() if value is not None})

    def __str__(self) -> str:
        """`greedy`, and the settings with which it is not the plain one."""
        return self.describe(do_sample=False)

    def describe(self, do_sample: bool) -> str:
        """How tokens are chosen, with every setting that changes the choice."""
        kind, settings = ("sampled" if do_sample else "greedy"), self._active(do_sample)
        return ", ".join([kind, *(f"{name}={value}" for name, value in settings.items())])

    def with_settings(self, settings: Mapping[str, Any]) -> Decoding:
        """These settings in place of those of the same names; None leaves one as it is.

        Raises:
            TypeError: A setting that does not exist; lists those that do.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        return Decoding({**self.settings, **given})

    def check(self) -> None:
        """Raise ValueError for a setting that is not handled; names it."""
        for name, neutral in REFUSED.items():
            value = self.settings.get(name)
            if value is not None and value not in neutral:
                raise ValueError(
                    f"the generation config sets {name}={value!r}, which is not handled; for plain greedy "
                    "decoding: model.decoding = Decoding(), or --plain-greedy on the command line"
                )

    def _active(self, do_sample: bool) -> dict[str, Any]:
        """The settings that do something, refused ones too, in the order in which they are applied."""
        settings = dict(self.settings)
        if settings.get("min_new_tokens"):
            settings.pop("min_length", None)  # overruled, as in Hugging Face's `generate`
        names = (*REFUSED, *_PROCESSORS, *(_SAMPLING if do_sample else ()), *_LAST)
        if do_sample:
            settings.setdefault("top_k", _DEFAULT_TOP_K)
        values = {name: settings.get(name) for name in names}
        return {name: value for name, value in values.items() if not _does_nothing(name, value)}

    def processors(
        self,
        attention_mask: Tensor,
        eos_token_ids: Sequence[int],
        max_new_tokens: int,
        do_sample: bool = False,
    ) -> Any:
        """Hugging Face's `LogitsProcessorList` for prompts with this mask [batch pos].

        It takes the ids so far [batch pos], prompts included, and float32 logits [batch d_vocab]. An
        empty list leaves the logits as they are.

        Raises:
            ValueError: A setting that is not handled, has an invalid value, or would count padding.
        """
        self.check()
        eos = torch.tensor(eos_token_ids, dtype=torch.long, device=attention_mask.device)
        prompts = _Prompts(attention_mask, eos, max_new_tokens)
        made: Any = hf.LogitsProcessorList()
        for name, value in self._active(do_sample).items():
            if name in _NEEDS_EOS and not eos_token_ids:
                continue  # no row can end early
            _check_padding(name, value, attention_mask)
            made.append({**_PROCESSORS, **_SAMPLING, **_LAST}[name](value, prompts))
        return made


def _does_nothing(name: str, value: Any) -> bool:
    return value is None or value in (*_NEUTRAL.get(name, ()), *REFUSED.get(name, ()))


def _check_padding(name: str, value: Any, attention_mask: Tensor) -> None:
    """Raise ValueError where the choice would depend on a row's padding, and so on the rows beside it."""
    if bool(attention_mask.all()):
        return
    shortest = int(attention_mask.sum(1).min())
    if (name == "min_length" and value > shortest) or (name == "no_repeat_ngram_size" and value == 1):
        raise ValueError(
            f"{name}={value} counts the padding of a batch with rows of several lengths; generate row by "
            "row" + (", or set min_new_tokens" if name == "min_length" else "")
        )
