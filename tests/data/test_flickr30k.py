"""The captions of Flickr30k from its official file and from Kaggle's, line by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from hones_lens.data.check import check_data
from hones_lens.data.loading import load_examples

# Lines as published, Kaggle's row without its last separator, and quotation marks.
TOKEN = """1000092795.jpg#0\tTwo young guys with shaggy hair look at their hands .
1000092795.jpg#1\tTwo young , White males are outside near many bushes .
10002456.jpg#0\tSeveral men in hard hats are operating a giant pulley system .
2199200615.jpg#0\t"Look , a dog" , says the | man .
2199200615.jpg#4\tA dog runs across the grass .
"""
KAGGLE = """image_name| comment_number| comment
1000092795.jpg| 0| Two young guys with shaggy hair look at their hands .
1000092795.jpg| 1| Two young , White males are outside near many bushes .
10002456.jpg| 0| Several men in hard hats are operating a giant pulley system .
2199200615.jpg| 0| "Look , a dog" , says the | man .
2199200615.jpg| 4   A dog runs across the grass .
"""
FILES = {"results_20130124.token": TOKEN, "results.csv": KAGGLE}
CAPTIONS = {
    "1000092795.jpg": (
        "Two young guys with shaggy hair look at their hands .",
        "Two young , White males are outside near many bushes .",
    ),
    "10002456.jpg": ("Several men in hard hats are operating a giant pulley system .",),
    "2199200615.jpg": ('"Look , a dog" , says the | man .', "A dog runs across the grass ."),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_captions_are_those_of_the_lines(tmp_path: Path, name: str, newline: str):
    file = tmp_path / name
    file.write_bytes(FILES[name].replace("\n", newline).encode())
    examples = load_examples("flickr30k", "caption", "all", data_file=file)
    assert {e.facts["image_id"]: e.references for e in examples} == CAPTIONS
    assert [e.id for e in examples] == [f"flickr30k/{image}" for image in CAPTIONS]
    assert check_data("flickr30k", "caption", data_file=file, open_images=False).ok


@pytest.mark.parametrize(
    ("name", "line", "reason"),
    [
        ("results.csv", "7.jpg", "record line 7: '7.jpg' is not an image, the number of its caption"),
        ("results.csv", "7.jpg| one| A caption", "record line 7: '7.jpg. one. A caption' is not"),
        ("results.csv", "7.jpg| 0| ", "record 7.jpg: caption is empty"),
        ("results.csv", "10002456.jpg| 0| Twice .", "line 7: caption 0 of 10002456.jpg is there twice"),
        ("results_20130124.token", "7.jpg A caption", "record line 6: '7.jpg A caption' is not an image"),
        ("results_20130124.token", "10002456.jpg#0\tTwice .", "line 6: caption 0 of 10002456.jpg is there"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path: Path, name: str, line: str, reason: str):
    file = tmp_path / name
    file.write_text(FILES[name] + line + "\n")
    with pytest.raises(ValueError, match=rf"{name}: 1 record can't be used: .*{reason}"):
        load_examples("flickr30k", "caption", "all", data_file=file)
    with pytest.warns(UserWarning, match=reason):
        examples = load_examples("flickr30k", "caption", "all", data_file=file, on_error="skip")
    assert {e.facts["image_id"]: e.references for e in examples} == CAPTIONS


def test_as_ones_own_file_it_is_refused_by_name(tmp_path: Path):
    file = tmp_path / "results.csv"
    file.write_text(KAGGLE)
    with pytest.raises(ValueError, match=r"separated by vertical bars.* use the data set 'flickr30k' for it"):
        load_examples(file, "caption", "all")
