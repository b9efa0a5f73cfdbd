"""Reading annotation files. Every error names the file."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any


def read_text(file: Path) -> str:
    """The text of a file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Empty, a folder, or not UTF-8.
    """
    if not file.exists():
        raise FileNotFoundError(f"no such file: {file}")
    if file.is_dir():
        raise ValueError(f"{file} is a folder, not a file")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{file} is empty")
    return text


def read_json(file: Path) -> Any:
    """The JSON of a file, in which no object has one key twice."""
    return _parse(read_text(file), str(file))


def read_jsonl(file: Path) -> list[tuple[int, Any]]:
    """Line numbers and values of a file with one JSON value a line; empty lines are passed over."""
    lines = enumerate(read_text(file).split("\n"), start=1)
    return [(n, _parse(line, f"{file}, line {n},")) for n, line in lines if line.strip()]


def read_csv(file: Path) -> list[tuple[int, dict[str, str]]]:
    """Line numbers (of a row's end) and cells by column of a file with a header line.

    Raises:
        ValueError: No rows, a column without a name or with another's, or a row of another length.
    """
    reader = csv.reader(io.StringIO(read_text(file), newline=""), strict=True)
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


def list_under(top: Any, key: str, file: Path) -> list[Any]:
    """The list under a key of a file's top level."""
    if not isinstance(top, dict) or not isinstance(top.get(key), list):
        raise ValueError(f"{file} has no list {key!r} at its top level, but {outline(top)}")
    return top[key]


def outline(top: Any) -> str:
    """What a file's top level is, for errors."""
    if isinstance(top, dict):
        keys = ", ".join(list(top)[:6])
        return f"an object with {len(top)} keys: {keys}{', ...' if len(top) > 6 else ''}"
    return f"a list of {len(top)}" if isinstance(top, list) else repr(top)[:60]


def _parse(text: str, where: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"{where} has the key {twice!r} twice in one object")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{where} is JSON nested too deeply") from error
