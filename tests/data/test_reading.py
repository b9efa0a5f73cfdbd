"""Encodings and separators of text files: read, or refused with what to do."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest
from helpers.dataset_files import FORMATS, sample_scenes

from hones_lens.data.check import check_data
from hones_lens.data.loading import load_examples

HEADER, ROW = "image,question,answer", "a.png,Où est le café ?,à gauche"


def own(folder: Path, content: bytes) -> Path:
    sample_scenes(1)[0].load().save(folder / "a.png")
    file = folder / "own.csv"
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_utf8_is_read_with_and_without_its_mark(tmp_path, mark, newline):
    file = own(tmp_path, mark + newline.join([HEADER, ROW, ""]).encode())
    (example,) = load_examples(file, "vqa", "all")
    assert (example.question, example.answers) == ("Où est le café ?", ("à gauche",))


def test_another_encoding_is_named_with_the_line_and_the_remedy(tmp_path):
    file = own(tmp_path, f"{HEADER}\n{ROW}\n".encode("cp1252"))
    reason = r"own\.csv is not UTF-8 text: line 2 holds the byte 0xf9.*encoding='cp1252'.*iconv -f CP1252"
    with pytest.raises(ValueError, match=reason):
        load_examples(file, "vqa", "all")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_named(tmp_path, encoding):
    file = own(tmp_path, f"{HEADER}\n{ROW}\n".encode(encoding))
    with pytest.raises(ValueError, match=r"own\.csv is not UTF-8 text, but UTF-16 .*iconv -f UTF-16"):
        load_examples(file, "vqa", "all")


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16", "utf-8", "UTF8"])
def test_the_encoding_that_is_given_is_used(tmp_path, encoding):
    file = own(tmp_path, f"{HEADER}\n{ROW}\n".encode(encoding))
    (example,) = load_examples(file, "vqa", "all", encoding=encoding)
    assert (example.question, example.answers) == ("Où est le café ?", ("à gauche",))
    assert check_data(file, "vqa", encoding=encoding).ok
    (own(tmp_path, f"{HEADER}\n{ROW}\n".encode()))
    assert load_examples(file, "vqa", "all")[0].question == "Où est le café ?", "it holds for one call"


def test_an_encoding_that_does_not_fit_or_exist_is_refused(tmp_path):
    file = own(tmp_path, f"{HEADER}\n{ROW}\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"own\.csv is not text in ascii: .*0xf9"):
        load_examples(file, "vqa", "all", encoding="ascii")
    with pytest.raises(ValueError, match="unknown encoding 'utf-nine'"):
        load_examples(file, "vqa", "all", encoding="utf-nine")
    with pytest.raises(
        ValueError, match="'shapes' is drawn, not read from files: encoding='cp1252' has no use"
    ):
        load_examples("shapes", "vqa", "dev", 1, encoding="cp1252")


SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("quote", ["", '"'])
def test_another_separator_is_named(tmp_path, separator, quote):
    lines = [separator.join(f"{quote}{c}{quote}" for c in line.split(",")) for line in (HEADER, ROW)]
    file = own(tmp_path, "\n".join(lines).encode())
    reason = (
        rf"own\.csv: its columns are separated by {SEPARATORS[separator]}, not commas: save it separated by"
    )
    with pytest.raises(ValueError, match=reason):
        load_examples(file, "vqa", "all")


def test_a_semicolon_in_a_cell_is_no_separator(tmp_path):
    file = own(tmp_path, b"image,question,answer\na.png,red; or blue?,red | blue\n")
    (example,) = load_examples(file, "vqa", "all")
    assert (example.question, example.answers) == ("red; or blue?", ("red | blue",))


def test_the_csv_of_flickr30k_is_refused_as_ones_own(tmp_path):
    dataset = FORMATS["flickr30k_csv"](tmp_path)
    with pytest.raises(ValueError, match="Flickr30k's file of captions: use the data set 'flickr30k' for it"):
        load_examples(dataset.data_file, "caption", "all")
