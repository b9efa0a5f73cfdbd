"""From the rows of a file to examples: checks, split, limit, pictures, candidates."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hones_lens.data.examples import Example
from hones_lens.data.images import Picture, clip_box, find_picture
from hones_lens.data.negatives import N_NEGATIVES, hard_negatives
from hones_lens.data.records import BadRecord, Format, NotForTask, Record
from hones_lens.data.splits import check_split, draw, members


class Skipped(NamedTuple):
    """A record that can't be used, and why."""

    record: str
    reason: str

    def __str__(self) -> str:
        return f"record {self.record}: {self.reason}"


class Loaded(list[Example]):
    """Examples from a file: a list, which also knows what was left out.

    Attributes:
        skipped: Records that can't be used (with `on_error="skip"`).
        not_for_task: How many records are not meant for the task, by reason.
        clipped: Ids of the examples whose box crosses the border of its image.
    """

    def __init__(
        self,
        examples: Iterable[Example] = (),
        skipped: Sequence[Skipped] = (),
        not_for_task: dict[str, int] | None = None,
    ):
        super().__init__(examples)
        self.skipped = tuple(skipped)
        self.not_for_task = not_for_task or {}

    @property
    def clipped(self) -> list[str]:
        """Ids of the examples whose box crosses the border of its image."""
        return [example.id for example in self if example.facts.get("box_clipped")]


@dataclass
class Examined:
    """The records of a file for one task, checked as far as that goes without pictures."""

    records: list[Record] = field(default_factory=list)
    bad: list[Skipped] = field(default_factory=list)
    not_for_task: Counter[str] = field(default_factory=Counter)
    clipped: list[str] = field(default_factory=list)


def examine(fmt: Format, task: str, file: Path) -> Examined:
    """Check every row of a file for a task.

    Raises:
        FileNotFoundError, ValueError: No such file, or none of this format; names it.
    """
    if task not in fmt.tasks:
        raise ValueError(f"data set {fmt.name!r} has no task {task!r}; valid: {', '.join(fmt.tasks)}")
    found, seen = Examined(), set()
    for row in fmt.rows(file, task):
        try:
            record = row.parse()
            if record.id in seen:
                raise BadRecord(f"id {record.id} is that of an earlier record too")
            if record.box is not None and record.size is not None and clip_box(record.box, record.size)[1]:
                found.clipped.append(record.id)
        except NotForTask as reason:
            found.not_for_task[str(reason)] += 1
        except BadRecord as error:
            found.bad.append(Skipped(row.label, str(error)))
        else:
            seen.add(record.id)
            found.records.append(record)
    return found


def load_records(
    fmt: Format,
    task: str,
    split: str,
    limit: int | None = None,
    seed: int = 3407,
    *,
    data_file: str | Path | None = None,
    image_dir: str | Path | None = None,
    on_error: str = "raise",
    cache_dir: str | Path | None = None,
) -> Loaded:
    """The examples of one task from one split of a file; `load` of every format ends here.

    Every annotation of the file is checked first, whatever the split. Pictures are opened when an
    example's `image` is asked for, but each must exist now, where an image folder is given.

    Args:
        fmt, task: What to read.
        split: `discovery`, `dev`, `test`, `all`, or a split file (`splits.read_split_file`).
        limit: At most so many examples. A smaller limit gives a prefix of a larger one.
        seed: Draws the split, the order within it and the order of retrieval's candidates.
        data_file: The annotations.
        image_dir: Folder of the pictures (default: where the annotations lie).
        on_error: `raise`, or `skip`: leave out records that can't be used, warn, and list them in the
            result's `skipped`.
        cache_dir: Where hard negatives are kept (default: `negatives.default_cache_dir`).

    Raises:
        FileNotFoundError, ValueError: What is missing or wrong, with file and record.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', not {on_error!r}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    if data_file is None:
        raise ValueError(f"data set {fmt.name!r} is read from a file: give data_file")
    check_split(split)
    file = Path(data_file)
    found = examine(fmt, task, file)
    if not found.records and not found.bad:
        raise ValueError(f"{file} has no {task} records{_reasons(found.not_for_task)}")
    chosen, unknown = members(found.records, split, seed)
    bad = found.bad + [Skipped(name, f"is in {split}, but not in the data file") for name in unknown]
    if on_error == "raise" and bad:
        raise ValueError(_complaint(file, bad))
    folder, must_exist = image_folder(fmt, file, image_dir)
    pictures, missing = _with_pictures(chosen, folder, must_exist, limit, on_error == "raise")
    if missing and on_error == "raise":
        raise ValueError(_complaint(file, missing))
    bad += missing
    if bad:
        warnings.warn(_complaint(file, bad, "left out"), stacklevel=3)
    if not pictures:
        raise ValueError(f"{file} has no usable {task} records in split {split!r}")
    out = _examples(fmt, task, pictures, found.records, seed, cache_dir, file)
    return Loaded(out, bad, dict(found.not_for_task))


def image_folder(fmt: Format, file: Path, image_dir: str | Path | None) -> tuple[Path, bool]:
    """The folder of the pictures, and whether they must be there.

    Raises:
        FileNotFoundError: A folder is given and is none.
    """
    if image_dir is None:
        return (file if file.is_dir() else file.parent), fmt.images_beside
    if not Path(image_dir).is_dir():
        raise FileNotFoundError(f"no such folder of images: {image_dir}")
    return Path(image_dir), True


def picture_of(record: Record, folder: Path, must_exist: bool) -> Picture:
    """The picture of a record, with its box.

    Raises:
        BadRecord: The picture must exist and does not; or the file alone knows its size, and the box lies
            outside.
    """
    place = find_picture(record, folder, must_exist)
    picture = Picture(record.id, place, record.size, record.box, record.content)
    if record.box is not None and record.size is None and must_exist:
        clip_box(record.box, picture.header_size())
    return picture


def _with_pictures(
    records: Sequence[Record], folder: Path, must_exist: bool, limit: int | None, stop: bool
) -> tuple[list[tuple[Record, Picture]], list[Skipped]]:
    """The first `limit` records that have a picture, and the ones passed over on the way."""
    out: list[tuple[Record, Picture]] = []
    missing: list[Skipped] = []
    for record in records:
        if len(out) == limit or (missing and stop):
            break
        try:
            out.append((record, picture_of(record, folder, must_exist)))
        except BadRecord as error:
            missing.append(Skipped(record.id, str(error)))
    return out, missing


def _examples(
    fmt: Format,
    task: str,
    pictures: Sequence[tuple[Record, Picture]],
    pool: Sequence[Record],
    seed: int,
    cache_dir: str | Path | None,
    file: Path,
) -> list[Example]:
    extras: Sequence[dict[str, Any]] = [{} for _ in pictures]
    if task in _EXTRAS:
        try:
            extras = _EXTRAS[task]([record for record, _ in pictures], pool, seed, cache_dir)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    return [
        _example(fmt, record, picture, extra)
        for (record, picture), extra in zip(pictures, extras, strict=True)
    ]


def _candidates(
    records: Sequence[Record], pool: Sequence[Record], seed: int, cache_dir: str | Path | None
) -> list[dict[str, Any]]:
    found = hard_negatives(records, pool, seed, Path(cache_dir) if cache_dir else None)
    return [_mixed(record, negatives, seed) for record, negatives in zip(records, found, strict=True)]


def _mixed(record: Record, negatives: Sequence[str], seed: int) -> dict[str, Any]:
    """The first caption at a drawn place among the false ones."""
    place = draw("place", seed, record.id) % (N_NEGATIVES + 1)
    return {"candidates": (*negatives[:place], record.references[0], *negatives[place:]), "positive": place}


# What a task needs beyond the fields of its records.
_EXTRAS = {"retrieval": _candidates}


def _example(fmt: Format, record: Record, picture: Picture, extra: dict[str, Any]) -> Example:
    facts: dict[str, Any] = {"image_id": record.image_key, "file": str(picture.file)}
    if record.box is not None:
        size = record.size or (picture.header_size() if picture.content or picture.file.exists() else None)
        facts |= {"box": record.box, "box_clipped": size is not None and clip_box(record.box, size)[1]}
    return Example(
        id=f"{fmt.name}/{record.id}",
        image_source=picture,
        question=record.question,
        answers=record.answers,
        text=record.text,
        references=record.references,
        kind=record.kind or "all",
        facts=facts,
        **extra,
    )


def _reasons(not_for_task: Counter[str]) -> str:
    told = ", ".join(f"{n} {reason}" for reason, n in not_for_task.most_common())
    return f" ({told})" if told else ""


def _complaint(file: Path, bad: Sequence[Skipped], done: str = "can't be used") -> str:
    told = "; ".join(map(str, bad[:3])) + ("; ..." if len(bad) > 3 else "")
    advice = "" if done == "left out" else " (on_error='skip' leaves such records out)"
    count = "1 record" if len(bad) == 1 else f"{len(bad)} records"
    return f"{file}: {count} {done}: {told}{advice}"
