"""Corruptions: what makes a clean input a corrupted one, token for token in the same places.

A corruption is any function of a model and `VLMInputs` that returns `VLMInputs` of the same shape. Those
made here are deterministic: what an image becomes depends on its pixels, on the seed and on the image's
place in its row, never on the other rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import ImageColor
from torch import Tensor

from hones_lens.interventions.token_groups import Box, token_mask
from hones_lens.model import HookedVLM, VLMInputs, to_list

Corruption = Callable[[HookedVLM, VLMInputs], VLMInputs]
Color = str | tuple[int, int, int]
_CONTEXTS = (" ", "\n", "(")  # what a word may stand behind, as far as tokenizers care
_BYTES_OF_SPACE = "ĠĊĉč"  # how byte-level tokenizers write space, newline, tab and return
_REACH = 4  # standard deviations after which a blur's kernel ends


@dataclass(frozen=True)
class Named:
    """A corruption that says what it does."""

    what: str
    change: Corruption

    def __call__(self, model: HookedVLM, inputs: VLMInputs) -> VLMInputs:
        return self.change(model, model.as_inputs(inputs))

    def __str__(self) -> str:
        return self.what


def gaussian_noise(sigma: float = 3.0, seed: int = 0) -> Corruption:
    """Add normal noise to the image embeddings that the decoder reads.

    Args:
        sigma: Standard deviation of the noise, in units of the standard deviation of the same image's
            embeddings, over tokens and dimensions.
        seed: Same seed and same image, same noise.

    Raises:
        ValueError: A sigma that is not above 0. When run: no images.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be above 0, not {sigma}")

    def change(model: HookedVLM, inputs: VLMInputs) -> VLMInputs:
        pictures, encoded = _pictures(model, inputs), model.with_image_embeds(inputs)
        noisy: list[Tensor] = []
        for (_, place), picture, embed in zip(_places(inputs), pictures, _embeds(encoded), strict=True):
            noise = torch.randn(embed.shape, generator=_dice(seed, place, picture))
            noisy.append((embed + sigma * embed.float().std() * noise.to(embed.device)).to(embed.dtype))
        return _with_embeds(encoded, noisy)

    return Named(f"Gaussian noise of {sigma:g} standard deviations on the image embeddings", change)


def mean_image_token(mean: Float[Tensor, " d_model"] | None = None) -> Corruption:
    """Replace every image token's embedding by the mean over that image's tokens.

    Args:
        mean: Use this embedding instead, e.g. a mean over a data set.

    Raises:
        ValueError: When run: no images.
    """

    def change(model: HookedVLM, inputs: VLMInputs) -> VLMInputs:
        _pictures(model, inputs)
        encoded = model.with_image_embeds(inputs)
        embeds = _embeds(encoded)
        means = [embed.mean(0) if mean is None else mean.to(embed) for embed in embeds]
        return _with_embeds(encoded, [m.expand_as(e) for m, e in zip(means, embeds, strict=True)])

    return Named("every image token the mean image token", change)


def blank(color: Color = (128, 128, 128)) -> Corruption:
    """Paint the pictures in one colour.

    Args:
        color: Red, green, blue in 0–255, or a name that PIL knows, e.g. `white`.

    Raises:
        ValueError: Not a colour. When run: no images.
    """
    rgb = ImageColor.getrgb(color) if isinstance(color, str) else tuple(color)
    if len(rgb) != 3 or not all(0 <= part <= 255 for part in rgb):
        raise ValueError(f"{color!r} is not a colour: give red, green, blue in 0–255, or a name")

    def paint(model: HookedVLM, pictures: Sequence[Tensor]) -> list[Tensor]:
        paints = _normalised(model, torch.tensor(rgb, dtype=torch.float))
        return [paints.to(p)[:, None, None].expand_as(p) for p in pictures]

    return _of_pixels(f"pictures painted {color}", paint)


def blur(radius: float = 4.0) -> Corruption:
    """Blur the pictures with a Gaussian kernel, edges continued outwards.

    Args:
        radius: Its standard deviation, in pixels of the picture as the vision tower reads it.

    Raises:
        ValueError: A radius that is not above 0. When run: no images.
    """
    if not radius > 0:
        raise ValueError(f"the radius must be above 0, not {radius}")
    steps = torch.arange(-int(_REACH * radius + 0.5), int(_REACH * radius + 0.5) + 1, dtype=torch.float)
    kernel = (-0.5 * (steps / radius) ** 2).exp()
    kernel = kernel / kernel.sum()

    def smear(model: HookedVLM, pictures: Sequence[Tensor]) -> list[Tensor]:
        out: list[Tensor] = []
        for picture in pictures:
            weight, side = kernel.to(picture.device).view(1, 1, -1), len(kernel) // 2
            x = picture.float()
            for _ in range(2):  # along the last axis, then along the other
                lines = F.pad(x.flatten(0, 1)[:, None], (side, side), mode="replicate")
                x = F.conv1d(lines, weight).view(x.shape).transpose(1, 2)
            out.append(x.to(picture.dtype))
        return out

    # A kernel that adds up to 1 does the same to pixels before and after normalisation.
    return _of_pixels(f"pictures blurred with a radius of {radius:g}", smear)


def patch_shuffle(seed: int = 0) -> Corruption:
    """Shuffle the squares of pixels that become image tokens.

    Args:
        seed: Same seed and same image, same order.

    Raises:
        ValueError: When run: no images, or one of a single token.
    """

    def change(model: HookedVLM, inputs: VLMInputs) -> VLMInputs:
        shuffled: list[Tensor] = []
        grids = [grid for row in inputs.grids for grid in row]
        for (_, place), picture, grid in zip(_places(inputs), _pictures(model, inputs), grids, strict=True):
            if grid[0] * grid[1] == 1:
                raise ValueError("an image of one token has no patches to shuffle")
            shuffled.append(_shuffled(picture, grid, _dice(seed, place, picture)))
        return model.with_pictures(inputs, shuffled)

    return Named("pictures with their patches shuffled", change)


def _shuffled(picture: Tensor, grid: tuple[int, int], dice: torch.Generator) -> Tensor:
    """Its cells in another order; pixels over the last cell stay."""
    (rows, columns), (height, width) = grid, picture.shape[1:]
    tall, wide = height // rows, width // columns
    n, order = rows * columns, torch.arange(rows * columns)
    while bool((order == torch.arange(n)).all()):
        order = torch.randperm(n, generator=dice)
    cut = picture[:, : rows * tall, : columns * wide].reshape(-1, rows, tall, columns, wide)
    cells = cut.permute(1, 3, 0, 2, 4).flatten(0, 1)[order.to(picture.device)]
    out = picture.clone()
    laid = cells.view(*grid, *cells.shape[1:]).permute(2, 0, 3, 1, 4)
    out[:, : rows * tall, : columns * wide] = laid.reshape(-1, rows * tall, columns * wide)
    return out


def region(corruption: Corruption, box: Box) -> Corruption:
    """A corruption of images where a box lies, and only there.

    Of one that changes pixels, the pixels in the box are taken: the vision tower then carries the change to
    other tokens too. Of one that changes embeddings, the image tokens that the box touches.

    Args:
        corruption: E.g. `blank("white")`.
        box: In the picture's own pixels; with `outside=True` all but the box.

    Raises:
        ValueError: When run: a box outside of what the model sees, a row without that image, or a corruption
            that changes tokens of text.
    """

    def change(model: HookedVLM, inputs: VLMInputs) -> VLMInputs:
        touched = token_mask(inputs, box)
        changed = corruption(model, inputs)
        if not torch.equal(changed.input_ids, inputs.input_ids):
            raise ValueError(f"{corruption} changes text, and a box lies on a picture")
        before, after = _pictures(model, inputs), model.pictures(changed)
        if any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            masks = [_pixels_in(inputs, box, *of, p) for of, p in zip(_places(inputs), before, strict=True)]
            mixed = [torch.where(m, b, a) for m, a, b in zip(masks, before, after, strict=True)]
            return model.with_pictures(inputs, mixed)
        encoded, other = model.with_image_embeds(inputs), model.with_image_embeds(changed)
        were, now = torch.cat(_embeds(encoded)), torch.cat(_embeds(other))
        return _with_embeds(encoded, [torch.where(touched[inputs.image_mask][:, None], now, were)])

    return Named(f"{corruption}, {box}" if box.outside else f"{corruption}, in {box}", change)


def token_swap(old: str | Mapping[str, str], new: str | None = None) -> Corruption:
    """Swap words of the text for others of as many tokens.

    Words are found where a word begins and ends, in the user's own prompt where that is marked, else in all
    text.

    Args:
        old: A word, or a table of words and what takes their place; `{"red": "blue", "blue": "red"}` swaps.
        new: What takes the place of one word.

    Raises:
        ValueError: Nothing to swap. When run: words of different numbers of tokens, or a row that has none
            of the words.
    """
    if isinstance(old, str) == (new is None):
        raise ValueError("token_swap takes an old and a new word, or a table of them")
    table = {old: str(new)} if isinstance(old, str) else dict(old)
    if not table or any(not a.strip() or not b.strip() or a == b for a, b in table.items()):
        raise ValueError(f"no words to swap in {table!r}")

    def change(model: HookedVLM, inputs: VLMInputs) -> VLMInputs:
        forms = [form for a, b in table.items() for form in _forms(model, a, b)]
        asked = inputs.token_groups.get("question", inputs.token_groups["text"])
        all_ids: list[list[int]] = to_list(inputs.input_ids)
        all_allowed: list[list[bool]] = to_list(asked)
        rows: list[list[int]] = []
        for row, (ids, allowed) in enumerate(zip(all_ids, all_allowed, strict=True)):
            swapped = _swapped(model, ids, allowed, forms)
            if swapped == ids:
                raise ValueError(f"row {row} has none of the words {', '.join(map(repr, table))}")
            rows.append(swapped)
        return replace(inputs, input_ids=torch.tensor(rows, device=inputs.input_ids.device))

    words = ", ".join(f"{a!r} swapped for {b!r}" for a, b in table.items())
    return Named(words, change)


def _forms(model: HookedVLM, old: str, new: str) -> Iterator[tuple[bool, list[int], list[int]]]:
    """The ids of both words, in each way that they are written: whether behind a space, old, new."""
    seen: list[list[int]] = []
    for context in _CONTEXTS:
        a, b = (_behind(model, context, word) for word in (old, new))
        if a is not None and b is not None and a not in seen:
            seen.append(a)
            yield context == " ", a, b


def _behind(model: HookedVLM, context: str, word: str) -> list[int] | None:
    """The ids of a word behind a context; None where the tokenizer joins the two."""
    first, whole = (
        model.tokenizer(text, add_special_tokens=False).input_ids
        for text in ("a" + context.strip(" "), "a" + context + word)
    )
    return whole[len(first) :] if whole[: len(first)] == first else None


def _swapped(
    model: HookedVLM,
    ids: list[int],
    allowed: list[bool],
    forms: Sequence[tuple[bool, list[int], list[int]]],
) -> list[int]:
    """The ids with every whole word swapped; what was swapped is not swapped again."""
    out, at = list(ids), 0
    longest_first = sorted(forms, key=lambda form: -len(form[1]))
    while at < len(ids):
        for spaced, old, new in longest_first:
            end = at + len(old)
            here = ids[at:end] == old and all(allowed[at:end])
            begins = here and (spaced or not _goes_on(model, ids[at - 1 : at], -1))
            if begins and not _goes_on(model, ids[end : end + 1], 0):
                if len(old) != len(new):
                    words = " and ".join(repr(model.tokenizer.decode(x).strip()) for x in (old, new))
                    raise ValueError(
                        f"{words} are {len(old)} and {len(new)} tokens: a swap needs words of equal length"
                    )
                out[at:end], at = new, end - 1
                break
        at += 1
    return out


def _goes_on(model: HookedVLM, token: list[int], letter: int) -> bool:
    """Whether a token, if there is one, has a letter or digit at its beginning (0) or end (-1)."""
    text = "".join(model.tokenizer.convert_ids_to_tokens(token))
    if not text or token[0] in model.tokenizer.all_special_ids:
        return False
    return text[letter].isalnum() and text[letter] not in _BYTES_OF_SPACE


# -- pictures and embeddings -------------------------------------------------------------------------


def _of_pixels(what: str, edit: Callable[[HookedVLM, Sequence[Tensor]], list[Tensor]]) -> Corruption:
    """A corruption from what it makes of normalised pictures [3 height width]."""

    def change(model: HookedVLM, inputs: VLMInputs) -> VLMInputs:
        return model.with_pictures(inputs, edit(model, _pictures(model, inputs)))

    return Named(what, change)


def _pictures(model: HookedVLM, inputs: VLMInputs) -> list[Tensor]:
    pictures = model.pictures(inputs)
    if not pictures:
        raise ValueError("these inputs have no images to corrupt")
    return pictures


def _places(inputs: VLMInputs) -> Iterator[tuple[int, int]]:
    """Of every image, in order, its row and its place in it."""
    return ((row, place) for row, grids in enumerate(inputs.grids) for place in range(len(grids)))


def _normalised(model: HookedVLM, rgb: Float[Tensor, " channel"]) -> Float[Tensor, " channel"]:
    """A colour in 0–255 as the checkpoint's image processor gives it to the vision tower.

    Raises:
        ValueError: The model was made without a processor.
    """
    made = model.image_processor
    value = rgb * made.rescale_factor if made.do_rescale else rgb
    if made.do_normalize:
        value = (value - torch.tensor(made.image_mean)) / torch.tensor(made.image_std)
    return value


def _pixels_in(
    inputs: VLMInputs, box: Box, row: int, place: int, picture: Tensor
) -> Bool[Tensor, "height width"]:
    """Which pixels that the vision tower reads a box touches; none of another image."""
    height, width = picture.shape[1:]
    if place != box.image:
        return torch.zeros(height, width, dtype=torch.bool, device=picture.device)
    left, top, right, bottom = inputs.regions[row][place]
    y, x = torch.arange(height), torch.arange(width)
    tall, wide = (bottom - top) / height, (right - left) / width
    in_y = (top + y * tall < box.bottom) & (top + (y + 1) * tall > box.top)
    in_x = (left + x * wide < box.right) & (left + (x + 1) * wide > box.left)
    inside = (in_y[:, None] & in_x).to(picture.device)
    return ~inside if box.outside else inside


def _embeds(encoded: VLMInputs) -> list[Float[Tensor, "token d_model"]]:
    """The embeddings of each image of inputs that are encoded."""
    assert encoded.image_embeds is not None
    sizes = [rows * columns + encoded.leading_tokens for row in encoded.grids for rows, columns in row]
    return list(torch.split(encoded.image_embeds.flatten(0, -2), sizes))


def _with_embeds(encoded: VLMInputs, embeds: Sequence[Tensor]) -> VLMInputs:
    assert encoded.image_embeds is not None
    made = torch.cat(list(embeds)).view_as(encoded.image_embeds)
    return replace(encoded, image_embeds=made)


def _dice(seed: int, place: int, picture: Tensor) -> torch.Generator:
    """Random numbers of one image: the same in every row of every batch."""
    pixels = picture.detach().float().cpu().contiguous().numpy().tobytes()
    digest = hashlib.blake2b(f"{seed} {place} ".encode() + pixels, digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
