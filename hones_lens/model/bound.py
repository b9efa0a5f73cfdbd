"""A model with pictures bound to it, for functions that pass tokens alone (`HookedVLM.bind`)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from torch import Tensor

from hones_lens.model.config import VLMConfig
from hones_lens.model.inputs import VLMInputs

TokensLike = Any  # ids [batch pos] or [pos], or text; anything else raises TypeError


class BindableModel(Protocol):
    """The part of `HookedVLM` that `BoundModel` uses; its methods take inputs."""

    @property
    def cfg(self) -> VLMConfig:
        """Image token and padding ids, the model's name."""
        ...

    @property
    def run_with_hooks(self) -> Callable[..., Any]:
        """Run with hooks."""
        ...

    @property
    def run_with_cache(self) -> Callable[..., tuple[Any, Any]]:
        """Run and keep activations."""
        ...

    @property
    def generate(self) -> Callable[..., list[str] | Tensor]:
        """Continue greedily."""
        ...

    @property
    def hooks(self) -> Callable[..., AbstractContextManager[Any]]:
        """Hooks for the runs inside a `with` block."""
        ...

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Run."""
        ...

    def to_tokens(self, text: str | Sequence[str], prepend_bos: bool | None = None) -> Tensor:
        """Ids of plain text."""
        ...

    def to_string(self, tokens: Tensor) -> str | list[str]:
        """Text of ids."""
        ...


@dataclass(frozen=True, eq=False)
class BoundModel:
    """A model that takes tokens [batch pos] and reads the pictures of its bound inputs with them.

    Methods that run the model take tokens where those of a `HookedVLM` take inputs; every other attribute is
    the model's own. Hooks are shared with the model: one added here is active there too.

    The tokens need not be the bound ones: another text of equal length is a counterfactual prompt on the
    same pictures. Image tokens and padding must be at the same positions as in the bound inputs. Inputs of
    one row can be used with any number of rows of tokens: several texts on one picture.

    Attributes:
        model: The model.
        inputs: The inputs that it is bound to, from `HookedVLM.as_inputs`.
    """

    model: BindableModel
    inputs: VLMInputs

    def __getattr__(self, name: str) -> Any:
        if name in ("model", "inputs"):  # not set yet, while a copy is made
            raise AttributeError(name)
        return getattr(self.model, name)

    def __repr__(self) -> str:
        rows, n = self.tokens.shape
        images = sum(map(len, self.inputs.grids))
        return f"{self.model.cfg.model_name} bound to {rows} × {n} tokens and {images} images"

    @property
    def cfg(self) -> VLMConfig:
        """The model's config."""
        return self.model.cfg

    @property
    def original_model(self) -> BindableModel:
        """The model, where TransformerLens looks for modules that are left in training mode."""
        return self.model

    @property
    def tokens(self) -> Tensor:
        """The bound tokens, [batch pos]."""
        return self.inputs.input_ids

    @property
    def texts(self) -> list[str]:
        """The bound prompts, image tokens written out and padding left out; `to_tokens` knows them."""
        rows = zip(self.tokens, self.inputs.attention_mask.bool(), strict=True)
        return [_text(self.model, ids[mask]) for ids, mask in rows]

    # -- tokens to inputs ------------------------------------------------------------------------

    def as_inputs(self, tokens: TokensLike) -> VLMInputs:
        """The bound inputs with these tokens in place of theirs.

        Args:
            tokens: Ids [batch pos] or [pos], or what `to_tokens` takes.

        Raises:
            TypeError: Inputs that bring pictures of their own, or ids that are no integers.
            ValueError: Another number of rows or tokens, or image tokens or padding elsewhere than in the
                bound inputs; names the row.
        """
        if isinstance(tokens, (str, list, tuple)):
            tokens = self.to_tokens(cast("str | Sequence[str]", tokens))
        if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.ndim not in (1, 2):
            raise TypeError(
                "a bound model takes tokens [batch pos]; inputs with pictures of their own are for the "
                f"model itself, and residual streams want start_at_layer: got {_describe(tokens)}"
            )
        ids = tokens.to(self.tokens.device).reshape(-1, tokens.shape[-1])
        bound = self._inputs_for_rows(len(ids))
        if ids.shape != bound.input_ids.shape:
            raise ValueError(
                f"tokens of the shape {tuple(ids.shape)} for inputs bound with {tuple(self.tokens.shape)}: "
                "another text must have as many tokens, so that the pictures stay in their places"
            )
        self._check_layout(ids, bound)
        return replace(bound, input_ids=ids)

    def _inputs_for_rows(self, n: int) -> VLMInputs:
        return self.inputs[[0] * n] if len(self.inputs) == 1 and n > 1 else self.inputs

    def _check_layout(self, ids: Tensor, bound: VLMInputs) -> None:
        image_tokens, bound_image_tokens = ids == self.cfg.image_token_id, bound.image_mask
        if (row := _first_true_row((image_tokens != bound_image_tokens).any(-1))) is not None:
            raise ValueError(
                f"row {row} has {int(image_tokens[row].sum())} image tokens; the bound inputs have "
                f"{int(bound_image_tokens[row].sum())}, not all in the same places"
            )
        padding = bound.attention_mask == 0
        if (row := _first_true_row(((ids != bound.input_ids) & padding).any(-1))) is not None:
            raise ValueError(f"row {row} has tokens where the bound inputs have padding")
        first_padding = padding.sum(-1, keepdim=True).clamp(max=ids.shape[1] - 1)
        is_padding, was_padding = (
            row_ids.gather(1, first_padding) == self.cfg.pad_token_id for row_ids in (ids, bound.input_ids)
        )
        if (row := _first_true_row((is_padding & ~was_padding)[:, 0])) is not None:
            raise ValueError(f"row {row} has padding where the bound inputs have tokens")

    def to_tokens(self, text: str | Sequence[str], prepend_bos: bool | None = None) -> Tensor:
        """Ids of plain text, as the model's own `to_tokens`; for the bound prompts, the bound tokens.

        The bound prompts are `texts`, or the user's prompts that `prepare` was given; several texts must
        match the prompts row by row.

        Raises:
            ValueError: Texts that differ from the bound ones in white space alone, at their ends: decoding
                may drop it, so which tokens are meant is not known.
        """
        texts = [text] if isinstance(text, str) else list(text)
        bound_texts = [self.texts]
        if self.inputs.question_mask is not None:
            rows = zip(self.tokens, self.inputs.question_mask, strict=True)
            bound_texts.append([_text(self.model, ids[mask]) for ids, mask in rows])
        if texts in bound_texts:
            return self.tokens
        if any([t.strip() for t in texts] == [t.strip() for t in prompts] for prompts in bound_texts):
            raise ValueError(
                "this text and the bound prompt differ in white space at their ends alone, which decoding "
                "may drop; for the bound prompt give `tokens` or one of `texts`, for another one its ids"
            )
        return self.model.to_tokens(text, prepend_bos)

    # -- running ---------------------------------------------------------------------------------

    def _model_call(self, model_input: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Arguments for the model itself: a residual stream is passed on, with the bound inputs."""
        if options.get("start_at_layer") is None:
            return self.as_inputs(model_input), options
        return model_input, {"inputs": self._inputs_for_rows(len(model_input)), **options}

    def forward(self, tokens: TokensLike, **options: Any) -> Any:
        """As `HookedVLM.forward`, for tokens; with `start_at_layer`, for a residual stream."""
        model_input, options = self._model_call(tokens, options)
        return self.model(model_input, **options)

    __call__ = forward

    def run_with_hooks(self, tokens: TokensLike, **options: Any) -> Any:
        """As `HookedVLM.run_with_hooks`, for tokens."""
        model_input, options = self._model_call(tokens, options)
        return self.model.run_with_hooks(model_input, **options)

    def run_with_cache(self, tokens: TokensLike, **options: Any) -> tuple[Any, Any]:
        """As `HookedVLM.run_with_cache`, for tokens: an ActivationCache, or a dict where one is asked for."""
        model_input, options = self._model_call(tokens, options)
        return self.model.run_with_cache(model_input, **options)

    def generate(self, tokens: TokensLike | None = None, *args: Any, **options: Any) -> list[str] | Tensor:
        """As `HookedVLM.generate`, for tokens; by default for the bound ones."""
        return self.model.generate(
            self.as_inputs(self.tokens if tokens is None else tokens), *args, **options
        )

    @contextmanager
    def hooks(self, *args: Any, **options: Any) -> Generator[BoundModel]:
        """As `HookedVLM.hooks`; the `with` block gets the bound model."""
        with self.model.hooks(*args, **options):
            yield self


def _text(model: BindableModel, ids: Tensor) -> str:
    """The text of one row of ids."""
    text = model.to_string(ids)
    assert isinstance(text, str)
    return text


def _first_true_row(rows: Tensor) -> int | None:
    """Index of the first row that is True; None if none is."""
    return int(rows.int().argmax()) if bool(rows.any()) else None


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__
