"""Pictures are read as Hugging Face reads them, whatever they come as; where not, something says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import picture_files, random_llava, random_qwen
from PIL import Image
from transformers.image_utils import load_image

from hones_lens import HookedVLM
from hones_lens.model.pictures import open_image

WHITE, DARK = (255, 255, 255), (7, 7, 7)


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.mode == other.mode == "RGB" and one.size == other.size and one.tobytes() == other.tobytes()


@pytest.fixture(scope="module", params=["llava", "qwen"])
def model(request: pytest.FixtureRequest) -> HookedVLM:
    return {"llava": random_llava, "qwen": random_qwen}[request.param].make_pair()[1]


def hf_read(file: Path) -> Image.Image:
    """What Hugging Face's `load_image` makes of the file (given its path, it leaves animations open)."""
    with Image.open(file) as opened:
        return load_image(opened)


def hf_pixels(model: HookedVLM, image: object) -> torch.Tensor:
    return model.processor.image_processor(images=[image], return_tensors="pt").pixel_values


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # load_image
@pytest.mark.parametrize("name", picture_files.OPAQUE)
def test_files_and_pil_images_are_read_as_hugging_face_reads_them(tmp_path: Path, name: str) -> None:
    file = picture_files.write(name, tmp_path)
    expected = hf_read(file)
    with Image.open(file) as opened:
        for given in (file, str(file), opened):
            read = open_image(given)
            assert same(read, expected)
            assert same(open_image(read), expected), "turned a second time"


@pytest.mark.parametrize("name", ["orientation 6", "orientation 3", "CMYK JPEG", "animated GIF"])
def test_prepare_sees_the_pixels_that_hugging_face_sees(model: HookedVLM, tmp_path: Path, name: str) -> None:
    file = picture_files.write(name, tmp_path)
    expected = hf_pixels(model, hf_read(file))
    with Image.open(file) as opened:
        for given in (file, opened):
            assert torch.equal(model.prepare(given, "is it red?").pixel_values, expected)


def test_the_regions_of_a_turned_picture_are_those_of_the_upright_one(model: HookedVLM, tmp_path) -> None:
    turned = picture_files.write("orientation 6", tmp_path)
    upright = hf_read(turned)
    assert upright.size == (40, 60)
    assert model.prepare(turned, "red?").regions == model.prepare(upright, "red?").regions


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparent_pixels_lie_on_white_where_hugging_face_shows_what_is_hidden(tmp_path, mode) -> None:
    picture_files.half_transparent(mode).save(tmp_path / "a.png")
    read = open_image(tmp_path / "a.png")
    opaque = hf_read(tmp_path / "a.png")
    assert {read.getpixel((x, y)) for x in (0, 29) for y in (0, 39)} == {WHITE}
    if opaque is not None:
        assert opaque.getpixel((0, 0)) == DARK
        right = (30, 0, 60, 40)
        assert same(read.crop(right), opaque.crop(right))


def test_a_half_opaque_pixel_is_half_white() -> None:
    read = open_image(Image.new("RGBA", (1, 1), (255, 0, 51, 102)))  # opacity 0.4: 0.4 c + 0.6 · 255
    assert read.getpixel((0, 0)) == (255, 153, 173)


@pytest.mark.parametrize(
    ("mode", "file"), [("I;16", "a.png"), ("I;16", "a.tiff"), ("I", "a.tiff"), ("F", "a.tiff")]
)
def test_more_than_8_bits_a_channel_are_refused(model: HookedVLM, tmp_path: Path, mode, file) -> None:
    kinds = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    image = Image.fromarray(np.full((4, 4), 300, kinds[mode]))
    image.save(tmp_path / file)
    assert hf_read(tmp_path / file).getpixel((0, 0)) == WHITE  # 300 of 65535
    with pytest.raises(ValueError, match=rf"image '.*{file}' has pixels of mode {mode}: save it with 8 bits"):
        model.prepare(tmp_path / file, "is it red?")
    with pytest.raises(ValueError, match=f"image 0 of prompt 1 has pixels of mode {mode}"):
        model.prepare([None, image], ["is it red?", "is it blue?"])


# -- arrays ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_tensor", [False, True])
def test_arrays_and_tensors_are_read_as_hugging_face_reads_them(model: HookedVLM, as_tensor: bool) -> None:
    pixels = np.asarray(picture_files.photograph())
    expected = hf_pixels(model, pixels)
    assert torch.equal(expected, hf_pixels(model, picture_files.photograph()))
    for array in (pixels, pixels.transpose(2, 0, 1)):
        given = torch.tensor(array) if as_tensor else array
        for images, prompts in ((given, "red?"), ([given], "red?"), ([given], ["red?"]), (given, ["red?"])):
            assert torch.equal(model.prepare(images, prompts).pixel_values, expected)


def test_an_array_of_images_is_several(model: HookedVLM) -> None:
    pixels = np.stack([np.asarray(image) for image in random_llava.make_images(3)])
    listed = model.prepare(list(pixels), ["a?", "b?", "c?"])
    for several in (pixels, torch.tensor(pixels), (image for image in pixels)):
        inputs = model.prepare(several, ["a?", "b?", "c?"])
        assert torch.equal(inputs.pixel_values, listed.pixel_values)
        assert torch.equal(inputs.input_ids, listed.input_ids)
    in_one = model.prepare(pixels, "which is red?")
    assert len(in_one.grids) == 1 and len(in_one.grids[0]) == 3
    assert torch.equal(in_one.pixel_values, listed.pixel_values)
    with pytest.raises(ValueError, match="3 entries of images for 2 prompts"):
        model.prepare(pixels, ["a?", "b?"])
    with pytest.raises(ValueError, match="1 entries of images for 3 prompts"):
        model.prepare(pixels[0].transpose(2, 0, 1), ["a?", "b?", "c?"])  # 3 channels are not 3 images


def test_grey_arrays_and_opacity_are_those_of_pil() -> None:
    pixels = np.asarray(picture_files.half_transparent("RGBA"))
    expected = open_image(picture_files.half_transparent("RGBA"))
    assert same(open_image(pixels), expected) and same(open_image(pixels.transpose(2, 0, 1)), expected)
    grey = np.asarray(picture_files.photograph().convert("L"))
    for array in (grey, grey[..., None], grey[None]):
        assert same(open_image(array), Image.fromarray(grey).convert("RGB"))
    assert same(open_image(grey[:, ::-2]), Image.fromarray(grey[:, ::-2].copy()).convert("RGB"))


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((4, 5, 3), np.float32), "image 0 of prompt 0 is an array of float32: give uint8 pixels"),
        (torch.rand(3, 4, 5), "is an array of float32: give uint8"),
        (torch.rand(3, 4, 5, dtype=torch.bfloat16), "is an array of bfloat16: give uint8"),
        (np.zeros((4, 5, 3), np.uint16), "is an array of uint16: give uint8"),
        (np.zeros((4, 5, 3), bool), "is an array of bool: give uint8"),
        (np.zeros((6, 5, 2), np.uint8), r"is an array of \[6, 5, 2\]: give \[height, width\], "),
        (np.zeros((3, 5, 3), np.uint8), r"is an array of \[3, 5, 3\]: its channels may come first or last"),
        (np.zeros((0, 5, 3), np.uint8), r"has no pixels: it is an array of \[0, 5, 3\]"),
        (np.zeros((1, 2, 3, 4, 5), np.uint8), r"is an array of \[2, 3, 4, 5\]: give"),
        (np.zeros((), np.uint8), r"is an array of \[\]: give"),
    ],
)
def test_other_arrays_are_refused(model: HookedVLM, array: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        model.prepare(array, "is it red?")


# -- what is no picture ------------------------------------------------------------------------------


@pytest.mark.wrong_types
@pytest.mark.parametrize("given", [b"\x89PNG", {"bytes": b"", "path": "a.png"}, 3, [[["a.png"]]]])
def test_what_is_no_picture_is_refused_by_its_type(model: HookedVLM, given: object) -> None:
    kind = type(given[0] if isinstance(given, list) else given).__name__
    with pytest.raises(TypeError, match=f"image 0 of prompt 0 is of type {kind}: give a PIL image"):
        model.prepare(given, "is it red?")


@pytest.mark.parametrize("as_type", [str, Path])
def test_missing_files_folders_and_files_that_are_no_pictures(model, tmp_path, as_type) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no picture at all", encoding="utf-8")
    (tmp_path / "folder.png").mkdir()
    cases = {
        "none.png": (FileNotFoundError, r"image '.*none\.png' does not exist$"),
        "none/none.png": (FileNotFoundError, r"none\.png' does not exist$"),
        "folder.png": (FileNotFoundError, r"folder\.png' does not exist as a file: it is a folder"),
        "empty.png": (ValueError, r"image '.*empty\.png' can't be read as an image: it is empty"),
        "text.jpg": (ValueError, r"image '.*text\.jpg' can't be read as an image: it is in no format"),
    }
    for name, (error, says) in cases.items():
        with pytest.raises(error, match=says):
            model.prepare(as_type(tmp_path / name), "is it red?")


@pytest.mark.parametrize("address", ["https://x.org/a.png", "http://x.org/a.png", "data:image/png;base64,AA"])
def test_addresses_are_not_fetched(model: HookedVLM, address: str) -> None:
    with pytest.raises(ValueError, match="is an address, which is not fetched"):
        model.prepare(address, "is it red?")


def test_a_picture_that_is_far_too_large_is_named(model: HookedVLM, tmp_path: Path, monkeypatch) -> None:
    file = picture_files.write("grey", tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"image '.*a\.png' can't be read .*decompression bomb"):
        model.prepare(file, "is it red?")


@pytest.mark.parametrize("name", ["grey", "CMYK JPEG", "palette of a GIF", "turned TIFF", "turned WebP"])
def test_truncated_files_are_named_from_a_path_and_from_an_open_image(model, tmp_path, name) -> None:
    file = picture_files.write(name, tmp_path)
    whole = file.read_bytes()
    for length in range(0, len(whole) - 20, 1 + len(whole) // 12):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"image '.*{file.name}' can't be read as an image"):
            model.prepare(file, "is it red?")


def test_an_open_image_of_a_truncated_file_is_named_by_its_place(model: HookedVLM, tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    random_llava.make_images(1, size=(200, 200))[0].save(file)
    file.write_bytes(file.read_bytes()[:-2000])
    whole = Image.new("RGB", (30, 30))
    says = "image 1 of prompt 1 can't be read as an image: .*truncated"
    with Image.open(file) as cut, pytest.raises(ValueError, match=says):
        model.prepare([whole, [whole, cut]], ["is it red?", "which is red?"])


def test_images_that_pil_does_not_convert_and_those_without_pixels_are_named() -> None:
    with pytest.raises(ValueError, match="the image can't be read as an image: conversion from La"):
        open_image(Image.new("La", (4, 4)))
    with pytest.raises(ValueError, match="the image has no pixels: it is 0 × 4"):
        open_image(Image.new("RGB", (0, 4)))
