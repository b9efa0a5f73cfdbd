"""Decoding of a hooked model: greedy, or sampled."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hones_lens.model.choices import require_choice
from hones_lens.model.config import VLMConfig
from hones_lens.model.decoding import SAMPLING, Decoding
from hones_lens.model.inputs import ModelInput, VLMInputs
from hones_lens.model.nn.context import KVCache
from hones_lens.model.tokens import tokenizer_of


class PredictsTokens(Protocol):
    """The part of a model that decoding needs."""

    decoding: Decoding

    @property
    def cfg(self) -> VLMConfig:
        """End-of-sequence and padding ids."""
        ...

    def next_token_logits(self, inputs: VLMInputs, said: Tensor, kv_cache: KVCache | None) -> Tensor:
        """Logits [batch d_vocab] of the token that follows the prompts and `said`."""
        ...


class Streamer(Protocol):
    """What is told of tokens as they come, e.g. Hugging Face's `TextStreamer`.

    To read a `TextIteratorStreamer` meanwhile, run `generate` in a thread: hooks belong to the thread that
    set them, so set them in that one, or run it by `contextvars.copy_context().run`.
    """

    def put(self, value: Tensor) -> None:
        """Take the prompts [batch pos], then the new token of every row [batch], once a step."""
        ...

    def end(self) -> None:
        """Be told that no token follows."""
        ...


@torch.no_grad()
def decode(
    model: PredictsTokens,
    inputs: VLMInputs,
    max_new_tokens: int,
    use_kv_cache: bool = True,
    *,
    decoding: Decoding | None = None,
    do_sample: bool = False,
    generator: torch.Generator | None = None,
    streamer: Streamer | None = None,
) -> Tensor:
    """New tokens [batch new] of every row, EOS kept, then padding.

    Args:
        model: The model.
        inputs: The prompts (from `as_inputs`).
        max_new_tokens, use_kv_cache, streamer: As of `generate`.
        decoding: Settings that change the choice of a token; default: the model's.
        do_sample: Draw from the distribution; else the likeliest token follows.
        generator: Where draws come from; default: PyTorch's own of the device.

    Raises:
        ValueError: max_new_tokens below 1, a row padded on the right, or a setting that is not handled.
        FloatingPointError: Logits that are not finite; names the row.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    inputs.require_left_padding("generate")
    process = (decoding or model.decoding).processors(
        inputs.attention_mask, model.cfg.eos_token_ids, max_new_tokens, do_sample
    )
    eos = torch.tensor(model.cfg.eos_token_ids, device=model.cfg.device)
    finished = torch.zeros(len(inputs), dtype=torch.bool, device=model.cfg.device)
    new_tokens = inputs.input_ids[:, :0]
    kv_cache = KVCache() if use_kv_cache else None
    if streamer is not None:
        streamer.put(inputs.input_ids.cpu())
    while new_tokens.shape[1] < max_new_tokens and not bool(finished.all()):
        logits = model.next_token_logits(inputs, new_tokens, kv_cache).float()
        if not bool(torch.isfinite(logits).all()):
            row = int((~torch.isfinite(logits).all(-1)).int().argmax())
            raise FloatingPointError(f"logits of row {row} are not finite at new token {new_tokens.shape[1]}")
        scores = process(torch.cat((inputs.input_ids, new_tokens), dim=1), logits)
        token = torch.where(finished, model.cfg.pad_token_id, _choose(scores, do_sample, generator))
        new_tokens = torch.cat((new_tokens, token[:, None]), dim=1)
        finished = finished | torch.isin(token, eos)
        if streamer is not None:
            streamer.put(token.cpu())
    if streamer is not None:
        streamer.end()
    return new_tokens


def _choose(scores: Tensor, do_sample: bool, generator: torch.Generator | None) -> Tensor:
    """One token of each row [batch]; drawn as in Hugging Face's `generate`, which draws for all rows."""
    if not do_sample:
        return scores.argmax(-1)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


class Generates(PredictsTokens, Protocol):
    """A model that takes any kind of input and generates text."""

    processor: Any

    def as_inputs(self, model_input: ModelInput) -> VLMInputs:
        """Any kind of model input as VLMInputs."""
        ...


def generate(
    model: Generates,
    inputs: ModelInput,
    max_new_tokens: int = 24,
    return_type: Literal["text", "tokens"] = "text",
    use_kv_cache: bool = True,
    *,
    do_sample: bool = False,
    num_return_sequences: int = 1,
    generator: torch.Generator | int | None = None,
    streamer: Streamer | None = None,
    **settings: Any,
) -> list[str] | Tensor:
    """Continue every row; hooks are active at every step (`HookedVLM.generate`).

    Tokens are those of Hugging Face's `generate` with the same arguments on the same checkpoint: its
    generation config's settings are applied (see `decoding`); how many tokens, and whether they are drawn,
    is for the arguments here to say.

    Args:
        model: The model.
        inputs: Prompts with their images.
        max_new_tokens: Stop a row after this many, or after an end-of-sequence token.
        return_type: `text`, or `tokens`: the new tokens [batch new], EOS kept, then padding.
        use_kv_cache: False computes everything anew at every step (same tokens, slower).
        do_sample: Draw every token from the model's distribution. Default: the likeliest follows.
        num_return_sequences: Answers to draw for each row; those of a row follow each other.
        generator: A seed or a generator of draws; default: PyTorch's own (`torch.manual_seed`), as in
            Hugging Face's `generate`.
        streamer: Is told of every token as it comes, as in Hugging Face's `generate`.
        settings: In place of the checkpoint's: `temperature`, `top_k` (50 where nothing sets it, 0 for
            all tokens), `top_p`, `min_p`, …, which need `do_sample`; `repetition_penalty`,
            `no_repeat_ngram_size`, `min_new_tokens`, … of Hugging Face's `GenerationConfig`.

    Returns:
        Stripped strings without special tokens, or token ids.

    Raises:
        TypeError: A setting that does not exist; lists those that do.
        ValueError: An option that would have no effect, an invalid value, a setting (given or the
            checkpoint's) that is not handled, or what `decode` refuses.
    """
    require_choice("return_type", return_type, ("text", "tokens"))
    if not do_sample:
        _check_greedy(num_return_sequences, generator, settings)
    if isinstance(generator, int):
        generator = torch.Generator(model.cfg.device).manual_seed(generator)
    tokens = decode(
        model,
        _repeated(model.as_inputs(inputs).positions_for_generation(), num_return_sequences),
        max_new_tokens,
        use_kv_cache,
        decoding=model.decoding.with_settings(settings),
        do_sample=do_sample,
        generator=generator,
        streamer=streamer,
    )
    return tokens if return_type == "tokens" else _texts(model, tokens)


def _texts(model: Generates, tokens: Tensor) -> list[str]:
    return [text.strip() for text in tokenizer_of(model).batch_decode(tokens, skip_special_tokens=True)]


def _repeated(inputs: VLMInputs, times: int) -> VLMInputs:
    """Every row so many times, one copy behind the other."""
    if times < 1:
        raise ValueError(f"num_return_sequences must be at least 1, not {times}")
    return inputs if times == 1 else inputs[[row for row in range(len(inputs)) for _ in range(times)]]


def _check_greedy(
    num_return_sequences: int, generator: torch.Generator | int | None, settings: dict[str, Any]
) -> None:
    """Raise ValueError for what has no effect where nothing is drawn; names it."""
    idle = [name for name in SAMPLING if settings.get(name) is not None]
    if generator is not None:
        idle.append("generator")
    if num_return_sequences > 1:
        idle.append("num_return_sequences")
    if idle:
        raise ValueError(f"{', '.join(idle)}: greedy decoding draws nothing; give do_sample=True")
