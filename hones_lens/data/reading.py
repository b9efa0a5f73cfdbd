"""Readers of annotation files. Every error names the file."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

_ENCODING: ContextVar[str] = ContextVar("encoding", default="utf-8")


@contextmanager
def text_encoding(encoding: str) -> Iterator[None]:
    """Text files are read in this encoding inside the context.

    Raises:
        ValueError: Python knows no such encoding of text.
    """
    try:
        "".encode(encoding)
    except LookupError as error:
        raise ValueError(f"unknown encoding {encoding!r}, e.g. 'utf-8', 'latin-1', 'cp1252'") from error
    token = _ENCODING.set(encoding)
    try:
        yield
    finally:
        _ENCODING.reset(token)


def read_text(file: Path) -> str:
    """The text of a file, in UTF-8 or the encoding of `text_encoding`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is empty, a folder, or in another encoding; the message says what to do.
    """
    if not file.exists():
        raise FileNotFoundError(f"no such file: {file}")
    if file.is_dir():
        raise ValueError(f"{file} is a folder, not a file")
    text = _decoded(file, file.read_bytes()).replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise ValueError(f"{file} is empty")
    return text


def _decoded(file: Path, content: bytes) -> str:
    encoding = _ENCODING.get()
    if codecs.lookup(encoding).name != "utf-8":
        try:
            return content.decode(encoding)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not text in {encoding}: {error}") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:1000]:
        raise ValueError(
            f"{file} is not UTF-8 text, but UTF-16 or no text at all; {_convert(file, 'UTF-16')}"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file} is not UTF-8 text: line {line} holds the byte 0x{content[error.start]:02x}, as text "
            f"saved in Latin-1 (Windows-1252) does; {_convert(file, 'CP1252')}"
        ) from error


def _convert(file: Path, encoding: str) -> str:
    convert = f"iconv -f {encoding} -t UTF-8 {file.name} > utf8_{file.name}"
    name = encoding.lower()
    given = f"encoding='{name}' (--encoding {name})"
    return f"load it with {given}, or save it as UTF-8, for instance with: {convert}"


def read_json(file: Path) -> Any:
    """The JSON value of a file; raises ValueError if an object has a key twice."""
    return _parse(read_text(file), str(file))


def read_jsonl(file: Path) -> list[tuple[int, Any]]:
    """Line numbers and values of a file with one JSON value per line; empty lines are skipped."""
    lines = enumerate(read_text(file).split("\n"), start=1)
    return [(n, _parse(line, f"{file}, line {n},")) for n, line in lines if line.strip()]


def read_json_or_jsonl(file: Path) -> Any:
    """The JSON value of a file; of a file with one object per line, whatever its name, the list of them."""
    lines = read_text(file).strip().split("\n")
    several = len(lines) > 1 or file.suffix.lower() == ".jsonl"
    if several and lines[0].startswith("{") and lines[0].rstrip().endswith("}"):
        return [value for _, value in read_jsonl(file)]
    return read_json(file)


def read_csv(file: Path) -> list[tuple[int, dict[str, str]]]:
    """Line numbers (of the last line of a row) and cells by column, of a file with a header line.

    Raises:
        ValueError: Columns not separated by commas, no rows, a column without a name, two with the same
            name, or a row of another length.
    """
    text = read_text(file)
    _refuse_other_separator(text.lstrip().split("\n", 1)[0], file)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
    try:
        columns = [column.strip() for column in next(reader)]
        if "" in columns or len(set(columns)) < len(columns):
            raise ValueError(f"{file}: each column needs a name of its own, not {columns}")
        for cells in reader:
            if not any(cells):
                continue
            if len(cells) != len(columns):
                counts = f"{len(cells)} cells for {len(columns)} columns"
                raise ValueError(f"{file}, line {reader.line_num}: {counts}")
            rows.append((reader.line_num, dict(zip(columns, cells, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}, is not CSV: {error}") from error
    if not rows:
        raise ValueError(f"{file} has a header and no rows")
    return rows


def _refuse_other_separator(header: str, file: Path) -> None:
    """Raise ValueError for a header line whose columns are separated by something else than commas."""
    names = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
    for separator, name in names.items():
        if separator in header and "," not in header:
            hint = "save it separated by commas"
            if header.startswith("image_name|"):
                hint = "this is Flickr30k's results.csv; use the data set 'flickr30k' for it"
            raise ValueError(f"{file}: its columns are separated by {name}, not commas: {hint}")


def parse_list(top: Any, key: str, file: Path) -> list[Any]:
    """The list under a key of a file's top level; raises ValueError if there is none."""
    if not isinstance(top, dict) or not isinstance(top.get(key), list):
        raise ValueError(f"{file} has no list {key!r} at its top level, but {describe_top_level(top)}")
    return top[key]


def describe_top_level(top: Any) -> str:
    """A short description of a file's top level, for error messages."""
    if isinstance(top, dict):
        keys = ", ".join(list(top)[:6])
        return f"an object with {len(top)} keys: {keys}{', ...' if len(top) > 6 else ''}"
    return f"a list of {len(top)}" if isinstance(top, list) else repr(top)[:60]


def _parse(text: str, source: str) -> Any:
    def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) < len(pairs):
            keys = [key for key, _ in pairs]
            duplicate = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"{source} has the key {duplicate!r} twice in one object")
        return parsed

    try:
        return json.loads(text, object_pairs_hook=reject_duplicate_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{source} is JSON nested too deeply") from error
