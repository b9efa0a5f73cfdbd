"""Splits over images: no two of `discovery`, `dev` and `test` share one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from hones_lens.data.reading import outline, read_json
from hones_lens.data.records import Record

SPLITS = ("discovery", "dev", "test", "all")
SHARES = {"discovery": 0.7, "dev": 0.1, "test": 0.2}
_ENTRIES = ("image_ids", "file_names", "images", "ids")
_FILE = re.compile(r"(?P<file>.+\.json)(?::(?P<name>[\w-]+))?", re.DOTALL)


def draw(*key: object) -> int:
    """A number below 2**64 that depends on the key alone, and looks random."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")


def split_of(image_key: str, seed: int) -> str:
    """The split of an image: a function of its id and the seed, whatever file it is found in.

    So the files of one family (questions, captions and texts on COCO's images) agree. Different seeds
    give different splits: work with one seed where results are to be held apart.
    """
    place = draw("split", seed, image_key) / 2**64
    if place < SHARES["discovery"]:
        return "discovery"
    return "dev" if place < SHARES["discovery"] + SHARES["dev"] else "test"


def check_split(split: str) -> None:
    """Raise ValueError for a split that is none, listing the valid ones."""
    if split not in SPLITS and not _FILE.fullmatch(split):
        raise ValueError(
            f"unknown split {split!r}; valid: {', '.join(SPLITS)}, or a .json file that lists images"
        )


def members(records: Sequence[Record], split: str, seed: int) -> tuple[list[Record], list[str]]:
    """The records of a split.

    `all` keeps the order of the file; otherwise the order is drawn with the seed, so that the first few
    are a fair sample.

    Returns:
        The records, and what a split file lists that none of them has.

    Raises:
        ValueError: An unknown split, or a split file that is none.
    """
    check_split(split)
    if split == "all":
        return list(records), []
    missing: list[str] = []
    if split in SPLITS:
        chosen = [r for r in records if split_of(r.image_key, seed) == split]
    else:
        wanted = read_split_file(split)
        chosen = [r for r in records if not wanted.isdisjoint(_names(r))]
        missing = sorted(wanted.difference(*map(_names, chosen)))
    return sorted(chosen, key=lambda r: draw("order", seed, r.id)), missing


def _names(record: Record) -> set[str]:
    """All that a split file may call a record's image."""
    return {record.image_key, *record.files, *(PurePosixPath(file).name for file in record.files)}


def read_split_file(split: str) -> set[str]:
    """Image ids or file names of a split file, `FILE.json` or `FILE.json:NAME`.

    The file holds a list; or an object with the list under `image_ids`, `file_names`, `images` or `ids`;
    or, with `:NAME`, an object of several such splits, none of which may share an image with another.
    Entries are ids of images, file names, or objects with `image_id` or `file_name`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No such split in the file, splits that share an image, or an entry that is none.
    """
    match = _FILE.fullmatch(split)
    if match is None:
        raise ValueError(f"{split!r} is no split file")
    file, name = Path(match["file"]), match["name"]
    top = read_json(file)
    if name is None:
        return _entries(top, file)
    if not isinstance(top, dict) or name not in top:
        found = ", ".join(top) if isinstance(top, dict) else outline(top)
        raise ValueError(f"{file} has no split {name!r}; it has: {found}")
    several = {key: _entries(top[key], file) for key in {name, *SHARES} & top.keys()}
    for key, entries in several.items():
        shared = several[name] & entries
        if key != name and shared:
            raise ValueError(f"{file}: splits {name!r} and {key!r} share image {min(shared)}")
    return several[name]


def _entries(found: Any, file: Path) -> set[str]:
    if isinstance(found, dict):
        keys = [key for key in _ENTRIES if key in found]
        if len(keys) != 1:
            hint = f"give {file}:NAME for one of its splits" if not keys else "it must be one of them"
            raise ValueError(
                f"{file}: a split needs a list or one key of {', '.join(_ENTRIES)}, "
                f"but is {outline(found)}; {hint}"
            )
        found = found[keys[0]]
    if not isinstance(found, list) or not found:
        raise ValueError(f"{file}: a split must be a list that is not empty, not {outline(found)}")
    return {_entry(entry, i, file) for i, entry in enumerate(found)}


def _entry(entry: Any, index: int, file: Path) -> str:
    if isinstance(entry, dict):
        entry = next((entry[key] for key in ("image_id", "file_name", "id") if key in entry), None)
    if isinstance(entry, bool) or not isinstance(entry, int | str):
        raise ValueError(f"{file}: entry {index + 1} is neither an image's id nor a file name")
    return str(entry)
