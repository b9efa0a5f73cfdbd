"""Corruptions: functions that turn clean inputs into corrupted ones, with all tokens at the same positions.

A corruption is any function of a model and `VLMInputs` that returns `VLMInputs` of the same shape. Those
made here are deterministic: the corrupted image depends on the image's pixels, on the seed and on its index
in the row, never on the other rows.
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
from hones_lens.model import HookedVLM, VLMInputs, to_list, token_names

Corruption = Callable[[HookedVLM, VLMInputs], VLMInputs]
Color = str | tuple[int, int, int]
_WORD_CONTEXTS = (" ", "\n", "(")  # text before a word that changes how it is tokenized
_KERNEL_EXTENT = 4  # standard deviations at which a blur's kernel is cut off


@dataclass(frozen=True)
class NamedCorruption:
    """A corruption with a description, which is its `str`."""

    description: str
    change: Corruption

    def __call__(self, model: HookedVLM, inputs: VLMInputs) -> VLMInputs:
        return self.change(model, model.as_inputs(inputs))

    def __str__(self) -> str:
        return self.description


def gaussian_noise(sigma: float = 3.0, seed: int = 0) -> Corruption:
    """Add normal noise to the image embeddings that the decoder reads.

    Args:
        sigma: Standard deviation of the noise, in units of the standard deviation of the same image's
            embeddings, over tokens and dimensions; with DeepStack, of each part of them apart.
        seed: Same seed and same image, same noise.

    Raises:
        ValueError: A sigma that is not above 0. When run: no images.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be above 0, not {sigma}")

    def change(model: HookedVLM, inputs: VLMInputs) -> VLMInputs:
        pictures, encoded = _require_pictures(model, inputs), model.with_image_embeds(inputs)
        noisy_embeds: list[Tensor] = []
        for (_, image), picture, embed in zip(
            _image_indices(inputs), pictures, _embeds_by_image(encoded), strict=True
        ):
            noise = torch.randn(embed.shape, generator=_image_generator(seed, image, picture))
            width, noise = model.cfg.d_model, noise.to(embed.device)
            noisy = [
                (part + sigma * part.float().std() * of_part).to(embed.dtype)
                for part, of_part in zip(
                    torch.split(embed, width, -1), torch.split(noise, width, -1), strict=True
                )
            ]
            noisy_embeds.append(torch.cat(noisy, dim=-1))
        return _with_embeds(encoded, noisy_embeds)

    return NamedCorruption(f"Gaussian noise of {sigma:g} standard deviations on the image embeddings", change)


def mean_image_token(mean: Float[Tensor, " d_model"] | None = None) -> Corruption:
    """Replace every image token's embedding by the mean over that image's tokens.

    Args:
        mean: Use this embedding instead, e.g. a mean over a data set; with DeepStack all of its parts, side
            by side.

    Raises:
        ValueError: When run: no images, or a mean of another width than the embeddings.
    """

    def change(model: HookedVLM, inputs: VLMInputs) -> VLMInputs:
        _require_pictures(model, inputs)
        encoded = model.with_image_embeds(inputs)
        embeds = _embeds_by_image(encoded)
        if mean is not None and mean.shape != embeds[0].shape[-1:]:
            raise ValueError(
                f"a mean of shape {tuple(mean.shape)} for embeddings of {embeds[0].shape[-1]} numbers"
            )
        means = [embed.mean(0) if mean is None else mean.to(embed) for embed in embeds]
        return _with_embeds(encoded, [m.expand_as(e) for m, e in zip(means, embeds, strict=True)])

    return NamedCorruption("every image token the mean image token", change)


def blank(color: Color = (128, 128, 128)) -> Corruption:
    """Paint the pictures in one colour.

    Args:
        color: Red, green, blue in 0–255, or a name that PIL knows, e.g. `white`.

    Raises:
        ValueError: Not a colour. When run: no images.
    """
    try:
        rgb = ImageColor.getrgb(color) if isinstance(color, str) else tuple(color)
    except ValueError:
        rgb = ()
    if len(rgb) != 3 or not all(0 <= channel <= 255 for channel in rgb):
        raise ValueError(f"{color!r} is not a colour: give red, green, blue in 0–255, or a name")

    def paint(model: HookedVLM, pictures: Sequence[Tensor]) -> list[Tensor]:
        color_values = _normalised_color(model, torch.tensor(rgb, dtype=torch.float))
        return [color_values.to(p)[:, None, None].expand_as(p) for p in pictures]

    return _pixel_corruption(f"pictures painted {color}", paint)


def blur(radius: float = 4.0) -> Corruption:
    """Blur the pictures with a Gaussian kernel, edges continued outwards.

    Args:
        radius: Its standard deviation, in pixels of the picture as the vision tower reads it.

    Raises:
        ValueError: A radius that is not above 0. When run: no images.
    """
    if not radius > 0:
        raise ValueError(f"the radius must be above 0, not {radius}")
    steps = torch.arange(
        -int(_KERNEL_EXTENT * radius + 0.5), int(_KERNEL_EXTENT * radius + 0.5) + 1, dtype=torch.float
    )
    kernel = (-0.5 * (steps / radius) ** 2).exp()
    kernel = kernel / kernel.sum()

    def convolve(model: HookedVLM, pictures: Sequence[Tensor]) -> list[Tensor]:
        blurred: list[Tensor] = []
        for picture in pictures:
            weight, side = kernel.to(picture.device).view(1, 1, -1), len(kernel) // 2
            x = picture.float()
            for _ in range(2):  # along the last axis, then along the other
                lines = F.pad(x.flatten(0, 1)[:, None], (side, side), mode="replicate")
                x = F.conv1d(lines, weight).view(x.shape).transpose(1, 2)
            blurred.append(x.to(picture.dtype))
        return blurred

    # A kernel that adds up to 1 does the same to pixels before and after normalisation.
    return _pixel_corruption(f"pictures blurred with a radius of {radius:g}", convolve)


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
        for (_, image), picture, grid in zip(
            _image_indices(inputs), _require_pictures(model, inputs), grids, strict=True
        ):
            if grid[0] * grid[1] == 1:
                raise ValueError("an image of one token has no patches to shuffle")
            shuffled.append(_shuffle_cells(picture, grid, _image_generator(seed, image, picture)))
        return model.with_pictures(inputs, shuffled)

    return NamedCorruption("pictures with their patches shuffled", change)


def _shuffle_cells(picture: Tensor, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """The picture with its cells in another order; pixels beyond the last whole cell stay."""
    (rows, columns), (height, width) = grid, picture.shape[1:]
    cell_height, cell_width = height // rows, width // columns
    n_cells, order = rows * columns, torch.arange(rows * columns)
    while bool((order == torch.arange(n_cells)).all()):
        order = torch.randperm(n_cells, generator=generator)
    cropped = picture[:, : rows * cell_height, : columns * cell_width].reshape(
        -1, rows, cell_height, columns, cell_width
    )
    cells = cropped.permute(1, 3, 0, 2, 4).flatten(0, 1)[order.to(picture.device)]
    result = picture.clone()
    shuffled = cells.view(*grid, *cells.shape[1:]).permute(2, 0, 3, 1, 4)
    result[:, : rows * cell_height, : columns * cell_width] = shuffled.reshape(
        -1, rows * cell_height, columns * cell_width
    )
    return result


def region(corruption: Corruption, box: Box) -> Corruption:
    """Restrict a corruption of images to a box.

    If the corruption changes pixels, only the pixels in the box change; the vision tower still carries the
    change to other tokens. If it changes embeddings, only those of the image tokens that the box touches
    change.

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
        clean_pictures, changed_pictures = _require_pictures(model, inputs), model.pictures(changed)
        if any(not torch.equal(a, b) for a, b in zip(clean_pictures, changed_pictures, strict=True)):
            masks = [
                _box_pixels(inputs, box, *image_index, p)
                for image_index, p in zip(_image_indices(inputs), clean_pictures, strict=True)
            ]
            mixed_pictures = [
                torch.where(m, b, a) for m, a, b in zip(masks, clean_pictures, changed_pictures, strict=True)
            ]
            return model.with_pictures(inputs, mixed_pictures)
        encoded, changed_encoded = model.with_image_embeds(inputs), model.with_image_embeds(changed)
        clean_embeds, changed_embeds = (
            torch.cat(_embeds_by_image(encoded)),
            torch.cat(_embeds_by_image(changed_encoded)),
        )
        return _with_embeds(
            encoded, [torch.where(touched[inputs.image_mask][:, None], changed_embeds, clean_embeds)]
        )

    return NamedCorruption(f"{corruption}, {box}" if box.outside else f"{corruption}, in {box}", change)


def token_swap(old: str | Mapping[str, str], new: str | None = None) -> Corruption:
    """Swap words of the text for others of as many tokens.

    Words are found where a word begins and ends, in the user's own prompt where that is marked, else in all
    text.

    Args:
        old: A word, or a mapping from words to their replacements; `{"red": "blue", "blue": "red"}` swaps.
        new: The replacement, where `old` is one word.

    Raises:
        ValueError: Nothing to swap. When run: words of different numbers of tokens, or a row that has none
            of the words.
    """
    if isinstance(old, str) == (new is None):
        raise ValueError("token_swap takes an old and a new word, or a table of them")
    replacements = {old: str(new)} if isinstance(old, str) else dict(old)
    if not replacements or any(not a.strip() or not b.strip() or a == b for a, b in replacements.items()):
        raise ValueError(f"no words to swap in {replacements!r}")

    def change(model: HookedVLM, inputs: VLMInputs) -> VLMInputs:
        forms = [form for a, b in replacements.items() for form in _written_forms(model, a, b)]
        swappable = inputs.token_groups.get("question", inputs.token_groups["text"])
        all_ids: list[list[int]] = to_list(inputs.input_ids)
        all_allowed: list[list[bool]] = to_list(swappable)
        rows: list[list[int]] = []
        for row, (ids, allowed) in enumerate(zip(all_ids, all_allowed, strict=True)):
            swapped = _swap_ids(model, ids, allowed, forms)
            if swapped == ids:
                raise ValueError(f"row {row} has none of the words {', '.join(map(repr, replacements))}")
            rows.append(swapped)
        return replace(inputs, input_ids=torch.tensor(rows, device=inputs.input_ids.device))

    words = ", ".join(f"{a!r} swapped for {b!r}" for a, b in replacements.items())
    return NamedCorruption(words, change)


def _written_forms(model: HookedVLM, old: str, new: str) -> Iterator[tuple[bool, list[int], list[int]]]:
    """Token ids of both words in each written form: (whether the form follows a space, old ids, new ids)."""
    seen: list[list[int]] = []
    for context in _WORD_CONTEXTS:
        old_ids, new_ids = (_ids_after(model, context, word) for word in (old, new))
        if old_ids is not None and new_ids is not None and old_ids not in seen:
            seen.append(old_ids)
            yield context == " ", old_ids, new_ids


def _ids_after(model: HookedVLM, context: str, word: str) -> list[int] | None:
    """Token ids of a word after a context; None where the tokenizer merges the two."""
    context_ids, all_ids = (
        model.tokenizer(text, add_special_tokens=False).input_ids
        for text in ("a" + context.strip(" "), "a" + context + word)
    )
    return all_ids[len(context_ids) :] if all_ids[: len(context_ids)] == context_ids else None


def _swap_ids(
    model: HookedVLM,
    ids: list[int],
    allowed: list[bool],
    forms: Sequence[tuple[bool, list[int], list[int]]],
) -> list[int]:
    """The ids with every whole word swapped once; replacements are not swapped again."""
    out, start = list(ids), 0
    longest_first_forms = sorted(forms, key=lambda form: -len(form[1]))
    while start < len(ids):
        for after_space, old, new in longest_first_forms:
            end = start + len(old)
            matches = ids[start:end] == old and all(allowed[start:end])
            starts_word = matches and (
                after_space or not _has_alphanumeric_at(model, ids[start - 1 : start], -1)
            )
            if starts_word and not _has_alphanumeric_at(model, ids[end : end + 1], 0):
                if len(old) != len(new):
                    words = " and ".join(repr(model.tokenizer.decode(x).strip()) for x in (old, new))
                    raise ValueError(
                        f"{words} are {len(old)} and {len(new)} tokens: a swap needs words of equal length"
                    )
                out[start:end], start = new, end - 1
                break
        start += 1
    return out


def _has_alphanumeric_at(model: HookedVLM, token: list[int], character: int) -> bool:
    """Whether the first (0) or last (-1) character of a token is a letter or digit; False for no token."""
    text = "".join(token_names(model, token))
    return bool(text) and token[0] not in model.tokenizer.all_special_ids and text[character].isalnum()


# -- pictures and embeddings -------------------------------------------------------------------------


def _pixel_corruption(
    description: str, edit: Callable[[HookedVLM, Sequence[Tensor]], list[Tensor]]
) -> Corruption:
    """A corruption from a function of normalised pictures, [3 height width] each."""

    def change(model: HookedVLM, inputs: VLMInputs) -> VLMInputs:
        return model.with_pictures(inputs, edit(model, _require_pictures(model, inputs)))

    return NamedCorruption(description, change)


def _require_pictures(model: HookedVLM, inputs: VLMInputs) -> list[Tensor]:
    pictures = model.pictures(inputs)
    if not pictures:
        raise ValueError("these inputs have no images to corrupt")
    return pictures


def _image_indices(inputs: VLMInputs) -> Iterator[tuple[int, int]]:
    """(row, index in the row) of every image, in order."""
    return ((row, image) for row, grids in enumerate(inputs.grids) for image in range(len(grids)))


def _normalised_color(model: HookedVLM, rgb: Float[Tensor, " channel"]) -> Float[Tensor, " channel"]:
    """A colour in 0–255 as the checkpoint's image processor gives it to the vision tower.

    Raises:
        ValueError: The model was made without a processor.
    """
    processor = model.image_processor
    value = rgb * processor.rescale_factor if processor.do_rescale else rgb
    if processor.do_normalize:
        value = (value - torch.tensor(processor.image_mean)) / torch.tensor(processor.image_std)
    return value


def _box_pixels(
    inputs: VLMInputs, box: Box, row: int, image: int, picture: Tensor
) -> Bool[Tensor, "height width"]:
    """Mask of the pixels, as the vision tower reads them, that a box touches; all False for another image."""
    height, width = picture.shape[1:]
    if image != box.image:
        return torch.zeros(height, width, dtype=torch.bool, device=picture.device)
    left, top, right, bottom = inputs.regions[row][image]
    y, x = torch.arange(height), torch.arange(width)
    pixel_height, pixel_width = (bottom - top) / height, (right - left) / width
    in_y = (top + y * pixel_height < box.bottom) & (top + (y + 1) * pixel_height > box.top)
    in_x = (left + x * pixel_width < box.right) & (left + (x + 1) * pixel_width > box.left)
    inside = (in_y[:, None] & in_x).to(picture.device)
    return ~inside if box.outside else inside


def _embeds_by_image(encoded: VLMInputs) -> list[Float[Tensor, "token d_model"]]:
    """The embeddings of each image, from inputs with `image_embeds`."""
    assert encoded.image_embeds is not None
    sizes = [n for row in encoded.image_tokens for n in row]
    return list(torch.split(encoded.image_embeds.flatten(0, -2), sizes))


def _with_embeds(encoded: VLMInputs, embeds: Sequence[Tensor]) -> VLMInputs:
    assert encoded.image_embeds is not None
    merged = torch.cat(list(embeds)).view_as(encoded.image_embeds)
    return replace(encoded, image_embeds=merged)


def _image_generator(seed: int, image: int, picture: Tensor) -> torch.Generator:
    """Random generator for one image, the same in every row of every batch."""
    pixels = picture.detach().float().cpu().contiguous().numpy().tobytes()
    digest = hashlib.blake2b(f"{seed} {image} ".encode() + pixels, digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))
