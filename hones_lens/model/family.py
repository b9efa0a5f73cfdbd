"""`Family`: the interface of a family of models, besides the modules that it passes to `HookedVLM`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor

from hones_lens.model.config import VLMConfig
from hones_lens.model.inputs import ImageText, Region, VLMInputs
from hones_lens.model.typed import to_list
from hones_lens.model.weights import WeightMap


class Family(ABC):
    """The methods that `HookedVLM` leaves abstract and that each file of `families/` implements.

    Attributes:
        family: Its key in the registry, `families.FAMILIES`.
        processor_class: Has `from_pretrained(folder, revision=…, trust_remote_code=…, **options)`.
        processor_options: Names of these options.
        answer_separator: Text between the rendered prompt and an answer, where the chat template shows none.
        default_chat_template: Used if the checkpoint has no chat template.
        whole_among_others: Whether pictures of a row that has several are read as wholes, unlike one alone.
        more_inputs: Keys of inputs that it reads and not every family does.
        image_markup: What stands for an image in a chat template that takes only text; `{image}` is the image
            token.
        reads_token_types: Hugging Face's model reads `token_type_ids`: which tokens are an image's.
    """

    family = ""
    processor_class: Any = AutoProcessor
    processor_options: tuple[str, ...] = ()
    more_inputs: tuple[str, ...] = ()
    whole_among_others = False
    answer_separator = ""
    default_chat_template = ""
    image_markup = "{image}\n"
    reads_token_types = False

    @classmethod
    @abstractmethod
    def weight_map(cls, cfg: VLMConfig, hf_names: Sequence[str]) -> WeightMap:
        """Map from Hugging Face's weight names to ours."""

    @abstractmethod
    def encode_images(self, inputs: VLMInputs) -> Float[Tensor, "*image_token d_model"]:
        """Image embeddings as the decoder reads them; runs the vision hooks."""

    @abstractmethod
    def positions(self, inputs: VLMInputs) -> Tensor:
        """Rotary positions of every token, [batch pos] or [3 batch pos]."""

    def mutual_groups(self, inputs: VLMInputs) -> Tensor | None:
        """Groups of tokens that see each other both ways, [batch pos]; −1: none. None: all are causal."""
        return None

    def image_placeholder(self) -> str | None:
        """The token that chat templates write for an image, where it is not the image token."""
        return None

    @abstractmethod
    def locate_images(self, inputs: VLMInputs) -> VLMInputs:
        """Fill in `image_mask` and `grids`; raise where images and image tokens disagree."""

    @abstractmethod
    def process_images(self, images: Sequence[Image.Image]) -> tuple[dict[str, Any], Sequence[ImageText]]:
        """Pixel inputs of the vision tower for these pictures, and what stands for each in a prompt.

        That is a number of image tokens, or a text with image tokens in it.
        """

    def process_pictures(
        self, images: Sequence[Image.Image], wholes: Sequence[bool]
    ) -> tuple[dict[str, Any], Sequence[ImageText]]:
        """As `process_images`, where some pictures are read as wholes (`whole_among_others`)."""
        return self.process_images(images)

    def pixel_rows(self, pixels: Mapping[str, Tensor], texts: Sequence[ImageText]) -> list[int]:
        """How many rows of `pixel_values` each picture has, of what `process_images` returns."""
        grid_thw = pixels.get("image_grid_thw")
        return [1] * len(pixels["pixel_values"]) if grid_thw is None else to_list(grid_thw.prod(-1))

    def shown_regions(self, width: int, height: int) -> list[Region]:
        """The part of a picture that each of its grids covers, where a picture may have several."""
        return [self.shown_region(width, height)]

    def whole_region(self, width: int, height: int) -> Region:
        """The part of a picture that its one grid covers where it is read as a whole."""
        return self.shown_region(width, height)

    @abstractmethod
    def pictures(self, inputs: VLMInputs) -> list[Float[Tensor, "channel _ _"]]:
        """All images of all rows as the vision tower reads them, [channel height width] each, normalised."""

    @abstractmethod
    def with_pictures(self, inputs: VLMInputs, pictures: Sequence[Float[Tensor, "channel _ _"]]) -> VLMInputs:
        """The same inputs with other pictures of the same sizes, not encoded; the inverse of `pictures`."""

    def shown_region(self, width: int, height: int) -> Region:
        """The part of a picture that reaches the vision tower: left, top, right, bottom in its pixels."""
        return (0.0, 0.0, float(width), float(height))
