"""Pictures from files: opened late, upright, RGB, with a blue box around the text."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import picture_files
from hypothesis import given, strategies as st
from PIL import Image, ImageFile
from transformers.image_utils import load_image

from hones_lens.data import images
from hones_lens.data.check import check_data
from hones_lens.data.drawing import BOX_BLUE
from hones_lens.data.examples import CACHED_BYTES, PICTURES, Example, PictureCache
from hones_lens.data.images import Picture, clip_box
from hones_lens.data.loading import load_examples
from hones_lens.data.records import BadRecord
from hones_lens.model import open_image

SIZES = st.integers(1, 400)
STARTS = st.floats(-500, 500, allow_nan=False)
LENGTHS = st.floats(0.01, 900, allow_nan=False)


def saved(path, size=(320, 240), color="white", **options):
    Image.new("RGB", size, color).save(path, **options)
    return path


def blue(image: Image.Image) -> np.ndarray:
    return (np.asarray(image) == BOX_BLUE).all(-1)


@given(SIZES, SIZES, STARTS, STARTS, LENGTHS, LENGTHS)
def test_a_clipped_box_lies_inside_and_covers_all_of_the_box_that_does(width, height, x, y, w, h):
    try:
        (left, top, right, bottom), crosses = clip_box((x, y, w, h), (width, height))
    except BadRecord:
        assert x >= width or y >= height or x + w <= 0 or y + h <= 0
        return
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert left <= max(x, 0) and right >= min(x + w, width)
    assert top <= max(y, 0) and bottom >= min(y + h, height)
    assert crosses == (x < 0 or y < 0 or x + w > width or y + h > height)


def test_the_line_runs_around_the_box_and_hides_none_of_it(tmp_path):
    image = Picture("7", saved(tmp_path / "a.png"), box=(100, 50, 30, 20)).load()
    drawn = blue(image)
    assert not drawn[50:70, 100:130].any()
    assert drawn.sum() == 34 * 24 - 30 * 20
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (48, 71, 98, 131)


@pytest.mark.parametrize(
    ("size", "line"), [((112, 112), 2), ((640, 480), 3), ((1024, 768), 5), ((768, 2000), 10)]
)
def test_the_line_grows_with_the_picture(tmp_path, size, line):
    image = Picture("7", saved(tmp_path / "a.png", size), box=(40, 40, 20, 20)).load()
    assert blue(image)[50].sum() == 2 * line


def test_a_box_at_the_border_is_clipped_and_stays_closed(tmp_path):
    drawn = blue(Picture("7", saved(tmp_path / "a.png"), box=(-5, 200, 50, 100)).load())
    assert drawn[198:, 0].all() and drawn[-1, :47].all() and drawn[198:200, :47].all()
    assert not drawn[:198].any() and not drawn[:, 47:].any()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright_and_boxes_are_those_of_the_upright_picture(tmp_path, orientation):
    upright = Image.new("RGB", (60, 40), "white")
    upright.paste("red", (0, 0, 20, 10))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposes that EXIF undoes
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    picture = Picture("7", tmp_path / "a.png", size=(60, 40), box=(30, 20, 10, 10))
    image = picture.load()
    assert image.size == picture.header_size() == (60, 40)
    assert image.getpixel((5, 5)) == (255, 0, 0) and image.getpixel((50, 35)) == (255, 255, 255)
    assert blue(image)[18:20, 28:42].all()
    assert Picture("7", tmp_path / "a.png").verify() == ((60, 40), orientation != 1)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # load_image
@pytest.mark.parametrize("name", picture_files.OPAQUE)
def test_a_data_set_and_prepare_read_what_hugging_face_reads(tmp_path, name):
    file = picture_files.write(name, tmp_path)
    with Image.open(file) as opened:
        expected = load_image(opened)
    picture = Picture("7", file)
    content = Picture("7", tmp_path / "row 7", content=file.read_bytes)
    for read in (picture.load(), content.load(), open_image(file)):
        assert (read.mode, read.size, read.tobytes()) == ("RGB", expected.size, expected.tobytes())
    assert picture.header_size() == content.header_size() == expected.size
    turned = name.startswith("turned") or name in {f"orientation {o}" for o in range(2, 9)}
    assert picture.verify() == (expected.size, turned)


def test_transparent_pixels_are_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert Picture("7", tmp_path / "clear.png").load().getpixel((0, 0)) == (255, 255, 255)
    for mode in ("RGBA", "LA", "P", "RGB"):
        picture_files.half_transparent(mode).save(tmp_path / "a.png")
        read = Picture("7", tmp_path / "a.png").load()
        assert read.getpixel((0, 0)) == (255, 255, 255)
        assert read.tobytes() == open_image(tmp_path / "a.png").tobytes()


def test_pictures_of_16_bits_raise(tmp_path):
    Image.new("I;16", (4, 4)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"record 7: image .*deep\.png has pixels of mode I;16"):
        Picture("7", tmp_path / "deep.png").load()


def test_a_box_for_a_picture_of_another_size_raises(tmp_path):
    file = saved(tmp_path / "a.png")
    assert Picture("7", file, size=(640, 480)).load().size == (320, 240)
    with pytest.raises(ValueError, match=r"a\.png is 320 × 240 pixels, but annotated as 640 × 480 pixels"):
        Picture("7", file, size=(640, 480), box=(1, 1, 9, 9)).load()


def test_a_missing_picture_and_one_that_is_too_large_name_the_record(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"record 7: image .*none\.png does not exist"):
        Picture("7", tmp_path / "none.png").load()
    file = saved(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"record 7: image .*a\.png can't be read .*decompression bomb"):
        Picture("7", file).load()


def test_the_check_counts_turned_doubled_and_resized_pictures(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    saved(tmp_path / "a.jpg", exif=exif)
    saved(tmp_path / "b.jpg", color="red")
    (tmp_path / "c.jpg").write_bytes((tmp_path / "b.jpg").read_bytes())
    lines = ["image,question,answer", *(f"{n}.jpg,what?,that" for n in "abc")]
    (tmp_path / "own.csv").write_text("\n".join(lines))
    check = check_data(tmp_path)
    assert check.ok
    assert "the same picture under two names, so that splits may share it: c.jpg = b.jpg" in str(check)
    assert "1 pictures are turned upright by EXIF: a.jpg" in str(check)
    assert "too few images for a record in every split" in str(check)
    image = load_examples(tmp_path, "vqa", "all", limit=1)[0].image
    assert image.size == (240, 320)


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("kind", ["jpg", "tiff", "png", "webp"])
def test_boxes_of_turned_pictures_lie_where_the_upright_picture_has_them(tmp_path, kind, orientation):
    """A data set annotates a red square of the upright picture: the blue box runs around it."""
    upright = Image.new("RGB", (120, 80), "white")
    upright.paste("red", (64, 24, 88, 48))
    stored = upright.transpose({3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation])
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(kind, {})
    stored.save(tmp_path / f"a.{kind}", exif=picture_files.exif(orientation), **options)
    row = {"image": f"a.{kind}", "text": "stop", "bbox": [64, 24, 24, 24]}
    (tmp_path / "own.jsonl").write_text(json.dumps(row))
    (example,) = load_examples(tmp_path, "ocr", "all")
    assert example.image.size == (120, 80) and not example.facts["box_clipped"]
    drawn = blue(example.image)
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (22, 49, 62, 89)
    red, green, _ = np.moveaxis(np.asarray(example.image).astype(int), -1, 0)
    assert ((red > 200) & (green < 60))[25:47, 65:87].all()


def test_pictures_of_a_source_of_ones_own_are_read_like_all_others():
    class Source:
        def __init__(self, image):
            self.image = image

        def load(self):
            return self.image

    upright = picture_files.photograph()
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    stored.info["exif"] = picture_files.exif(6).tobytes()
    image = Example("mine/1", Source(stored)).image
    assert image.size == upright.size and image.tobytes() == upright.tobytes()
    with pytest.raises(ValueError, match="the image of example mine/2 has pixels of mode I;16"):
        _ = Example("mine/2", Source(Image.new("I;16", (4, 4)))).image


def table(folder, *names):
    """A data set of one's own with a question on each of these pictures."""
    rows = "".join(f'"{name}",what?,red\n' for name in names)
    file = folder / "data.csv"
    file.write_text("image,question,answer\n" + rows, encoding="utf-8")
    return file


def outsiders(tmp_path):
    """A folder with a good picture, and the names of pictures that lie outside it."""
    folder = tmp_path / "set"
    (folder / "deep").mkdir(parents=True)
    saved(folder / "in.png")
    outside = saved(tmp_path / "x.png", color="red")
    (folder / "link.png").symlink_to(outside)
    (folder / "linked").symlink_to(tmp_path)
    return folder, ["../x.png", "deep/../../x.png", str(outside), "link.png", "linked/x.png"]


@pytest.mark.parametrize("number", range(5))
def test_a_picture_outside_the_folder_is_refused_by_record_and_file(tmp_path, number):
    folder, names = outsiders(tmp_path)
    file = table(folder, "in.png", names[number])
    where = {"data_file": file, "image_dir": folder}
    reason = rf"line 3: its image .*{names[number].replace('.', '[.]')} lies outside the folder of images"
    for files in ({"data_file": file}, where):  # the folder of the file, or one that is given
        with pytest.raises(ValueError, match=reason):
            load_examples("own", "vqa", "all", **files)
        with pytest.warns(UserWarning, match=reason):
            (kept,) = load_examples("own", "vqa", "all", **files, on_error="skip")
        assert kept.facts["file"].endswith("in.png")
        check = check_data("own", **files)
        assert not check.ok and "lies outside the folder" in str(check.tasks["vqa"].unusable[0])
        read = load_examples("own", "vqa", "all", **files, allow_outside=True)
        assert [e.image.getpixel((0, 0)) for e in sorted(read, key=lambda e: e.id)][1] == (255, 0, 0)
        assert check_data("own", **files, allow_outside=True).ok


def test_a_picture_inside_the_folder_may_be_named_in_any_way(tmp_path):
    folder = tmp_path / "set"
    (folder / "deep").mkdir(parents=True)
    saved(folder / "in.png")
    (folder / "link.png").symlink_to("in.png")
    (tmp_path / "other").symlink_to(folder)
    names = ["in.png", "deep/../in.png", str(folder / "in.png"), "link.png", str(tmp_path / "other/in.png")]
    file = table(folder, *names)
    for image_dir in (folder, tmp_path / "other"):
        assert len(load_examples("own", "vqa", "all", data_file=file, image_dir=image_dir)) == 5


def test_a_large_picture_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    assert Picture("7", tmp_path).most_megapixels == images.MOST_MEGAPIXELS == 64
    monkeypatch.setattr(images, "MOST_MEGAPIXELS", 0.01)
    saved(tmp_path / "large.png", (101, 100))
    saved(tmp_path / "most.png", (100, 100))
    file = table(tmp_path, "large.png", "most.png")
    (refused,) = check_data("own", data_file=file).tasks["vqa"].unusable
    assert "large.png is of 101 × 100 pixels, more than 0.01 megapixels" in str(refused)
    large, most = sorted(load_examples("own", "vqa", "all", data_file=file), key=lambda e: e.id)
    assert most.image.size == (100, 100)
    with monkeypatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
        with pytest.raises(ValueError, match=r"record line 2: image .*large.png is of 101 × 100 pixels"):
            _ = large.image
    examples = load_examples("own", "vqa", "all", data_file=file, allow_large_pictures=True)
    assert {e.image.width for e in examples} == {100, 101}
    assert check_data("own", data_file=file, allow_large_pictures=True).ok


def test_bounds_on_pictures_have_no_use_for_drawn_ones():
    with pytest.raises(ValueError, match="'shapes' is drawn, not read from files: allow_outside=True has no"):
        load_examples("shapes", "vqa", "test", 1, allow_outside=True)


class Sized:
    """A picture source that counts how often it is asked."""

    def __init__(self, size):
        self.size, self.asked = size, 0

    def load(self):
        self.asked += 1
        return Image.new("RGB", self.size)


def test_pictures_are_held_by_bytes():
    cache = PictureCache(4 * 100 * 100 * 3)
    small = [Example(str(i), Sized((100, 100))) for i in range(4)]
    for example in (*small[:3], small[0], small[3]):  # the last one pushes out number 1, not 0
        assert cache.picture(example).size == (100, 100)
    assert (len(cache), cache.held) == (3, 4 * 100 * 100 * 3)
    for example in (small[0], small[2], small[3]):
        cache.picture(example)
    assert [e.image_source.asked for e in small] == [1, 1, 1, 1]
    cache.picture(small[1])
    assert small[1].image_source.asked == 2
    large = Example("large", Sized((200, 151)))
    assert cache.picture(large).size == (200, 151) and len(cache) == 3 and cache.held == 4 * 100 * 100 * 3
    cache.clear()
    assert (len(cache), cache.held) == (0, 0)


def test_pictures_of_examples_are_held_so(monkeypatch):
    assert PICTURES.size == CACHED_BYTES == 2**29
    PICTURES.clear()
    monkeypatch.setattr(PICTURES, "size", 4 * 300 * 300 * 5)
    pictures = [Example(str(i), Sized((300, 300))).image for i in range(9)]
    assert len(pictures) == 9 and PICTURES.held == 4 * 300 * 300 * 5
    PICTURES.clear()
