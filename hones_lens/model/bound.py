"""A model with pictures bound to it, for functions that pass tokens alone (`HookedVLM.bind`)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from torch import Tensor
from transformer_lens import ActivationCache

from hones_lens.model.config import VLMConfig
from hones_lens.model.inputs import VLMInputs

Tokens = Any  # ids [batch pos] or [pos], or text; anything else raises TypeError


class RunsInputs(Protocol):
    """What `BoundModel` calls of a model, as `HookedVLM` has it; all of it takes inputs."""

    @property
    def cfg(self) -> VLMConfig:
        """Image token and padding ids, the model's name."""
        ...

    @property
    def run_with_hooks(self) -> Callable[..., Any]:
        """Run with hooks."""
        ...

    @property
    def run_with_cache(self) -> Callable[..., tuple[Tensor, ActivationCache]]:
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

    def to_tokens(self, text: str | Sequence[str], prepend_bos: bool = True) -> Tensor:
        """Ids of plain text."""
        ...

    def to_string(self, tokens: Tensor) -> str | list[str]:
        """Text of ids."""
        ...


@dataclass(frozen=True, eq=False)
class BoundModel:
    """A model that takes tokens [batch pos] and reads the pictures of its bound inputs with them.

    What runs the model takes tokens where a `HookedVLM` takes inputs; every other attribute is the
    model's own. Hooks are the model's too: one added here is heard there.

    The tokens need not be the bound ones: another text of equal length is a counterfactual prompt on the
    same pictures. Image tokens and padding must lie where they lie in the bound inputs. Inputs of one row
    serve any number of rows of tokens: several texts on one picture.

    Attributes:
        model: What is bound.
        inputs: What it is bound to, located by the model (`HookedVLM.as_inputs`).
    """

    model: RunsInputs
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
    def original_model(self) -> RunsInputs:
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

    def as_inputs(self, tokens: Tokens) -> VLMInputs:
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
        bound = self._rows(len(ids))
        if ids.shape != bound.input_ids.shape:
            raise ValueError(
                f"tokens of the shape {tuple(ids.shape)} for inputs bound with {tuple(self.tokens.shape)}: "
                "another text must have as many tokens, so that the pictures stay in their places"
            )
        self._check_places(ids, bound)
        return replace(bound, input_ids=ids)

    def _rows(self, n: int) -> VLMInputs:
        return self.inputs[[0] * n] if len(self.inputs) == 1 and n > 1 else self.inputs

    def _check_places(self, ids: Tensor, bound: VLMInputs) -> None:
        shown, held = ids == self.cfg.image_token_id, bound.image_mask
        if (row := _first((shown != held).any(-1))) is not None:
            raise ValueError(
                f"row {row} has {int(shown[row].sum())} image tokens; the bound inputs have "
                f"{int(held[row].sum())}, not all in the same places"
            )
        padding = bound.attention_mask == 0
        if (row := _first(((ids != bound.input_ids) & padding).any(-1))) is not None:
            raise ValueError(f"row {row} has tokens where the bound inputs have padding")
        first = padding.sum(-1, keepdim=True).clamp(max=ids.shape[1] - 1)
        now, was = (x.gather(1, first) == self.cfg.pad_token_id for x in (ids, bound.input_ids))
        if (row := _first((now & ~was)[:, 0])) is not None:
            raise ValueError(f"row {row} has padding where the bound inputs have tokens")

    def to_tokens(self, text: str | Sequence[str], prepend_bos: bool = True) -> Tensor:
        """Ids of plain text, as the model's own `to_tokens`, but of a bound prompt the bound tokens.

        A bound prompt is one of `texts`, or the user's words that `prepare` was given; several texts are
        the bound prompts where each is that of its row.
        """
        given = [text] if isinstance(text, str) else list(text)
        known = [self.texts]
        if self.inputs.question_mask is not None:
            rows = zip(self.tokens, self.inputs.question_mask, strict=True)
            known.append([_text(self.model, ids[mask]) for ids, mask in rows])
        if any([t.strip() for t in given] == [t.strip() for t in prompts] for prompts in known):
            return self.tokens
        return self.model.to_tokens(text, prepend_bos)

    # -- running ---------------------------------------------------------------------------------

    def _filled(self, model_input: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """What the model itself is called with: a residual stream brings no tokens, but needs inputs."""
        if options.get("start_at_layer") is None:
            return self.as_inputs(model_input), options
        return model_input, {"inputs": self._rows(len(model_input)), **options}

    def forward(self, tokens: Tokens, **options: Any) -> Tensor:
        """As `HookedVLM.forward`, of tokens; with `start_at_layer` of a residual stream."""
        filled, options = self._filled(tokens, options)
        return self.model(filled, **options)

    __call__ = forward

    def run_with_hooks(self, tokens: Tokens, **options: Any) -> Tensor:
        """As `HookedVLM.run_with_hooks`, of tokens."""
        filled, options = self._filled(tokens, options)
        return self.model.run_with_hooks(filled, **options)

    def run_with_cache(self, tokens: Tokens, **options: Any) -> tuple[Tensor, ActivationCache]:
        """As `HookedVLM.run_with_cache`, of tokens."""
        filled, options = self._filled(tokens, options)
        return self.model.run_with_cache(filled, **options)

    def generate(self, tokens: Tokens | None = None, *args: Any, **options: Any) -> list[str] | Tensor:
        """As `HookedVLM.generate`, of tokens; without any, of the bound ones."""
        return self.model.generate(
            self.as_inputs(self.tokens if tokens is None else tokens), *args, **options
        )

    @contextmanager
    def hooks(self, *args: Any, **options: Any) -> Generator[BoundModel]:
        """As `HookedVLM.hooks`; the `with` block gets the bound model."""
        with self.model.hooks(*args, **options):
            yield self


def _text(model: RunsInputs, ids: Tensor) -> str:
    """The text of one row of ids."""
    text = model.to_string(ids)
    assert isinstance(text, str)
    return text


def _first(rows: Tensor) -> int | None:
    """The first row that is True, if any is."""
    return int(rows.int().argmax()) if bool(rows.any()) else None


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__
