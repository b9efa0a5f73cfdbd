"""Splits over images: no two of `discovery`, `dev` and `test` share one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from hones_lens.data.reading import describe_top_level, read_json
from hones_lens.data.records import Record
from hones_lens.model import did_you_mean

SPLITS = ("discovery", "dev", "test", "all")
SHARES = {"discovery": 0.7, "dev": 0.1, "test": 0.2}
_ENTRY_KEYS = ("image_ids", "file_names", "images", "ids")
_SPLIT_FILE = re.compile(r"(?P<file>.+\.json)(?::(?P<name>[\w-]+))?", re.DOTALL)


def stable_hash(*key: object) -> int:
    """A pseudo-random number below 2**64 that is a function of the key alone."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")


def split_of(image_key: str, seed: int) -> str:
    """The split of an image: a function of its id and the seed, whatever file lists it.

    So files on the same images (questions, captions and texts on COCO's) agree. Different seeds give
    different splits: use one seed wherever selection and evaluation must not share images.
    """
    fraction = stable_hash("split", seed, image_key) / 2**64
    if fraction < SHARES["discovery"]:
        return "discovery"
    return "dev" if fraction < SHARES["discovery"] + SHARES["dev"] else "test"


def check_split(split: str) -> None:
    """Raise ValueError for an unknown split; the message lists the valid ones."""
    if split not in SPLITS and not _SPLIT_FILE.fullmatch(split):
        raise ValueError(
            f"unknown split {split!r}; valid: {', '.join(SPLITS)}, or a .json file that lists images"
            f"{did_you_mean(split, SPLITS)}"
        )


def select_records(records: Sequence[Record], split: str, seed: int) -> tuple[list[Record], list[str]]:
    """The records of a split.

    `all` keeps the order of the file; otherwise the order is random with the seed, so that a prefix is a
    fair sample.

    Returns:
        The records, and the entries of a split file that match no record.

    Raises:
        ValueError: An unknown split, or an invalid split file.
    """
    check_split(split)
    if split == "all":
        return list(records), []
    missing: list[str] = []
    if split in SPLITS:
        chosen = [r for r in records if split_of(r.image_key, seed) == split]
    else:
        wanted = read_split_file(split)
        chosen = [r for r in records if not wanted.isdisjoint(_image_names(r))]
        missing = sorted(wanted.difference(*map(_image_names, chosen)))
    return sorted(chosen, key=lambda r: stable_hash("order", seed, r.id)), missing


def _image_names(record: Record) -> set[str]:
    """All names under which a split file may list a record's image."""
    return {record.image_key, *record.files, *(PurePosixPath(file).name for file in record.files)}


def read_split_file(split: str) -> set[str]:
    """Image ids or file names of a split file, `FILE.json` or `FILE.json:NAME`.

    The file holds a list; or an object with the list under `image_ids`, `file_names`, `images` or `ids`;
    or, with `:NAME`, an object of several such splits, none of which may share an image with another.
    Entries are ids of images, file names, or objects with `image_id` or `file_name`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: No such split in the file, splits that share an image, or an invalid entry.
    """
    match = _SPLIT_FILE.fullmatch(split)
    if match is None:
        raise ValueError(f"{split!r} is no split file")
    file, name = Path(match["file"]), match["name"]
    top = read_json(file)
    if name is None:
        return _parse_entries(top, file)
    if not isinstance(top, dict) or name not in top:
        available = ", ".join(top) if isinstance(top, dict) else describe_top_level(top)
        raise ValueError(f"{file} has no split {name!r}; it has: {available}")
    splits = {key: _parse_entries(top[key], file) for key in {name, *SHARES} & top.keys()}
    for key, entries in splits.items():
        shared = splits[name] & entries
        if key != name and shared:
            raise ValueError(f"{file}: splits {name!r} and {key!r} share image {min(shared)}")
    return splits[name]


def _parse_entries(value: Any, file: Path) -> set[str]:
    if isinstance(value, dict):
        keys = [key for key in _ENTRY_KEYS if key in value]
        if len(keys) != 1:
            hint = f"give {file}:NAME for one of its splits" if not keys else "it must be one of them"
            raise ValueError(
                f"{file}: a split needs a list or one key of {', '.join(_ENTRY_KEYS)}, "
                f"but is {describe_top_level(value)}; {hint}"
            )
        value = value[keys[0]]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{file}: a split must be a list that is not empty, not {describe_top_level(value)}")
    return {_parse_entry(entry, i, file) for i, entry in enumerate(value)}


def _parse_entry(entry: Any, index: int, file: Path) -> str:
    if isinstance(entry, dict):
        entry = next((entry[key] for key in ("image_id", "file_name", "id") if key in entry), None)
    if isinstance(entry, bool) or not isinstance(entry, int | str):
        raise ValueError(f"{file}: entry {index + 1} is neither an image's id nor a file name")
    return str(entry)
