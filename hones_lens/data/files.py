"""Turns the rows of an annotation file into examples: checks, split, limit, pictures, candidates."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from hones_lens.data.examples import Example, check_on_error
from hones_lens.data.images import ImageFolder, Picture, PictureKeywords, clip_box, find_picture_file
from hones_lens.data.negatives import N_NEGATIVES, hard_negatives
from hones_lens.data.records import BadBox, BadRecord, Format, NotForTask, Record
from hones_lens.data.splits import check_split, select_records, stable_hash
from hones_lens.model import did_you_mean


class SkippedRecord(NamedTuple):
    """A record that can't be used, and the reason."""

    record: str
    reason: str

    def __str__(self) -> str:
        return f"record {self.record}: {self.reason}"


class LoadedExamples(list[Example]):
    """A list of the examples of a file, with the records that were left out.

    Attributes:
        skipped: Unusable records (with `on_error="skip"`; bad boxes of COCO-Text always).
        not_for_task: How many records are not meant for the task, by reason.
        clipped: Ids of the examples whose box crosses the border of its image.
    """

    def __init__(
        self,
        examples: Iterable[Example] = (),
        skipped: Sequence[SkippedRecord] = (),
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
class CheckedRecords:
    """The records of a file for one task, after all checks that need no pictures.

    Attributes:
        records: Records that can be used.
        bad: Records that can't be used.
        left_out: Records with a bad box, of a format that leaves such out whatever `on_error`.
        not_for_task: How many records are not meant for the task, by reason.
        clipped: Ids of records whose box crosses the border of the image.
    """

    records: list[Record] = field(default_factory=list)
    bad: list[SkippedRecord] = field(default_factory=list)
    left_out: list[SkippedRecord] = field(default_factory=list)
    not_for_task: Counter[str] = field(default_factory=Counter)
    clipped: list[str] = field(default_factory=list)


def check_records(fmt: Format, task: str, file: Path) -> CheckedRecords:
    """Check every row of a file for a task.

    Raises:
        FileNotFoundError, ValueError: No such file, not of this format, or a format without this task.
    """
    if task not in fmt.tasks:
        raise ValueError(
            f"data set {fmt.name!r} has no task {task!r}; valid: {', '.join(fmt.tasks)}"
            f"{did_you_mean(task, fmt.tasks)}"
        )
    checked, seen = CheckedRecords(), set()
    for row in fmt.rows(file, task):
        try:
            record = row.parse()
            if record.id in seen:
                raise BadRecord(f"id {record.id} is that of an earlier record too")
            if record.box is not None and record.size is not None and clip_box(record.box, record.size)[1]:
                checked.clipped.append(record.id)
        except NotForTask as reason:
            checked.not_for_task[str(reason)] += 1
        except BadRecord as error:
            tolerated = isinstance(error, BadBox) and fmt.leaves_out_bad_boxes
            skipped = checked.left_out if tolerated else checked.bad
            skipped.append(SkippedRecord(row.label, str(error)))
        else:
            seen.add(record.id)
            checked.records.append(record)
    return checked


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
    **pictures: Unpack[PictureKeywords],
) -> LoadedExamples:
    """Load the examples of one task from one split of a file (`load` of every file format).

    All annotations of the file are checked first, whatever the split. Pictures are opened when an
    example's `image` is first read, but must exist already if an image folder is given.

    Args:
        fmt: The format of the file.
        task: Name of the task.
        split: `discovery`, `dev`, `test`, `all`, or a split file (`splits.read_split_file`).
        limit: Maximum number of examples. A smaller limit gives a prefix of a larger one.
        seed: Seed of the split, of the order within it and of the order of retrieval's candidates.
        data_file: The annotation file.
        image_dir: Folder of the pictures (default: the folder of the annotation file).
        on_error: `raise`, or `skip`: leave out records that can't be used, warn, and list them in the
            result's `skipped`.
        cache_dir: Folder in which hard negatives are cached (default: `negatives.default_cache_dir`).
        pictures: `allow_outside`, `allow_large_pictures`: see `ImageFolder`.

    Raises:
        FileNotFoundError, ValueError: A missing or invalid file or record; the message names it.
    """
    check_on_error(on_error)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    if data_file is None:
        raise ValueError(f"data set {fmt.name!r} is read from a file: give data_file")
    check_split(split)
    file = Path(data_file)
    checked = check_records(fmt, task, file)
    if not checked.records and not checked.bad and not checked.left_out:
        raise ValueError(f"{file} has no {task} records{_format_reasons(checked.not_for_task)}")
    chosen, unknown = select_records(checked.records, split, seed)
    bad = checked.bad + [SkippedRecord(name, f"is in {split}, but not in the data file") for name in unknown]
    if on_error == "raise" and bad:
        raise ValueError(_summarize_skipped(file, bad))
    folder = image_folder(fmt, file, image_dir, **pictures)
    found, missing = _find_pictures(chosen, folder, limit, on_error == "raise")
    if missing and on_error == "raise":
        raise ValueError(_summarize_skipped(file, missing))
    bad += checked.left_out + missing
    if bad:
        warnings.warn(_summarize_skipped(file, bad, "left out"), stacklevel=3)
    if not found:
        raise ValueError(f"{file} has no usable {task} records in split {split!r}")
    out = _examples(fmt, task, found, checked.records, seed, cache_dir, file)
    return LoadedExamples(out, bad, dict(checked.not_for_task))


def image_folder(
    fmt: Format, file: Path, image_dir: str | Path | None, **allowed: Unpack[PictureKeywords]
) -> ImageFolder:
    """The folder of the pictures.

    Raises:
        FileNotFoundError: `image_dir` is given and is not a folder.
    """
    if image_dir is None:
        return ImageFolder(file if file.is_dir() else file.parent, fmt.images_beside, **allowed)
    if not Path(image_dir).is_dir():
        raise FileNotFoundError(f"no such folder of images: {image_dir}")
    return ImageFolder(Path(image_dir), **allowed)


def find_record_picture(record: Record, folder: ImageFolder) -> Picture:
    """The picture of a record, with its box.

    Raises:
        BadRecord: The picture must exist and does not, or lies outside the folder; or its size is not
            annotated, and the box lies outside the picture.
    """
    file = find_picture_file(record, folder)
    picture = Picture(record.id, file, record.size, record.box, record.content, folder.most_megapixels)
    if record.box is not None and record.size is None and folder.must_exist:
        clip_box(record.box, picture.header_size())
    return picture


def _find_pictures(
    records: Sequence[Record], folder: ImageFolder, limit: int | None, stop_at_first: bool
) -> tuple[list[tuple[Record, Picture]], list[SkippedRecord]]:
    """The first `limit` records that have a picture, and those skipped before them for lack of one."""
    out: list[tuple[Record, Picture]] = []
    missing: list[SkippedRecord] = []
    for record in records:
        if len(out) == limit or (missing and stop_at_first):
            break
        try:
            out.append((record, find_record_picture(record, folder)))
        except BadRecord as error:
            missing.append(SkippedRecord(record.id, str(error)))
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
    extra_fields: Sequence[dict[str, Any]] = [{} for _ in pictures]
    if task in _EXTRA_FIELDS:
        try:
            extra_fields = _EXTRA_FIELDS[task]([record for record, _ in pictures], pool, seed, cache_dir)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
    return [
        _example(fmt, record, picture, fields)
        for (record, picture), fields in zip(pictures, extra_fields, strict=True)
    ]


def _retrieval_fields(
    records: Sequence[Record], pool: Sequence[Record], seed: int, cache_dir: str | Path | None
) -> list[dict[str, Any]]:
    all_negatives = hard_negatives(records, pool, seed, Path(cache_dir) if cache_dir else None)
    return [
        _insert_positive(record, negatives, seed)
        for record, negatives in zip(records, all_negatives, strict=True)
    ]


def _insert_positive(record: Record, negatives: Sequence[str], seed: int) -> dict[str, Any]:
    """The first caption inserted at a random position among the negatives."""
    position = stable_hash("place", seed, record.id) % (N_NEGATIVES + 1)
    return {
        "candidates": (*negatives[:position], record.references[0], *negatives[position:]),
        "positive": position,
    }


# By task: fields of examples beyond those of the records.
_EXTRA_FIELDS = {"retrieval": _retrieval_fields}


def _example(fmt: Format, record: Record, picture: Picture, fields: dict[str, Any]) -> Example:
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
        **fields,
    )


def _format_reasons(not_for_task: Counter[str]) -> str:
    reasons = ", ".join(f"{n} {reason}" for reason, n in not_for_task.most_common())
    return f" ({reasons})" if reasons else ""


def _summarize_skipped(file: Path, bad: Sequence[SkippedRecord], outcome: str = "can't be used") -> str:
    examples = "; ".join(map(str, bad[:3])) + ("; ..." if len(bad) > 3 else "")
    advice = "" if outcome == "left out" else " (on_error='skip' leaves such records out)"
    count = "1 record" if len(bad) == 1 else f"{len(bad)} records"
    return f"{file}: {count} {outcome}: {examples}{advice}"
