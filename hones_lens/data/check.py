"""`check_data`: which records of a data set are usable, before a model is loaded (`hones data check`)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

from hones_lens.data.files import (
    CheckedRecords,
    SkippedRecord,
    check_records,
    find_record_picture,
    image_folder,
)
from hones_lens.data.images import ImageFolder, Picture, PictureKeywords, clip_box, format_size
from hones_lens.data.loading import resolve
from hones_lens.data.negatives import N_NEGATIVES, group_captions_by_image, normalize_caption
from hones_lens.data.reading import text_encoding
from hones_lens.data.records import BadRecord, Record
from hones_lens.data.splits import SHARES, split_of

_MAX_LISTED = 5


@dataclass
class TaskCheck:
    """Which records of a file can be used for one task.

    Attributes:
        usable: How many records can be used.
        unusable: The records that can't be used, with the reason.
        not_for_task: How many records are not meant for the task, by reason.
        clipped: Ids of records whose box crosses the border of the image, where it is clipped.
        splits: How many of the usable records each split has (with the seed given).
        warnings: Findings that are no errors, but may not be intended.
    """

    usable: int = 0
    unusable: list[SkippedRecord] = field(default_factory=list)
    not_for_task: dict[str, int] = field(default_factory=dict)
    clipped: list[str] = field(default_factory=list)
    splits: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass
class DataCheck:
    """The result of `check_data`.

    Attributes:
        name: Name of the data set.
        file: The annotation file.
        tasks: One check for each task.
        images: How many pictures were opened; 0 with `open_images=False`.
        warnings: Findings that concern all tasks and are no errors.
    """

    name: str
    file: str
    tasks: dict[str, TaskCheck]
    images: int
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether at least one record is usable and none is unusable."""
        checks = self.tasks.values()
        return any(check.usable for check in checks) and not any(check.unusable for check in checks)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        tasks = {}
        for name, check in self.tasks.items():
            unusable = [skipped._asdict() for skipped in check.unusable]
            tasks[name] = {**vars(check), "unusable": unusable}
        return {
            "kind": "data check",
            "name": self.name,
            "file": self.file,
            "ok": self.ok,
            "images": self.images,
            "warnings": self.warnings,
            "tasks": tasks,
        }

    def __str__(self) -> str:
        opened = f"{self.images:,} pictures opened" if self.images else "no picture opened"
        lines = [f"{self.file} ({self.name}): {'ok' if self.ok else 'NOT OK'}, {opened}"]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        for name, check in self.tasks.items():
            lines += [f"  {name}: {line}" for line in _format_task_check(check)]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        import html

        return f"<pre>{html.escape(str(self))}</pre>"


def _format_task_check(check: TaskCheck) -> list[str]:
    shares = ", ".join(f"{split} {n:,}" for split, n in check.splits.items())
    lines = [f"{check.usable:,} usable" + (f" ({shares})" if check.usable else "")]
    if check.clipped:
        lines.append(
            f"{len(check.clipped):,} boxes cross the border and are clipped: {_abbreviate(check.clipped)}"
        )
    lines += [f"{n:,} {reason}: not for this task" for reason, n in check.not_for_task.items()]
    lines += [f"warning: {warning}" for warning in check.warnings]
    if check.unusable:
        lines.append(f"{len(check.unusable):,} unusable:")
        lines += [f"  {skipped}" for skipped in check.unusable[:_MAX_LISTED]]
        lines += ["  ..."] if len(check.unusable) > _MAX_LISTED else []
    return lines


def _abbreviate(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_LISTED]) + (", ..." if len(names) > _MAX_LISTED else "")


def check_data(
    dataset: str | Path,
    task: str | None = None,
    *,
    data_file: str | Path | None = None,
    image_dir: str | Path | None = None,
    seed: int = 3407,
    open_images: bool = True,
    progress: Callable[[list[Record]], Any] = iter,
    encoding: str = "utf-8",
    **allowed: Unpack[PictureKeywords],
) -> DataCheck:
    """Check the annotations of a data set, and every picture that they name.

    Args:
        dataset, data_file, image_dir: As for `load_examples`; a data set that is read from files.
        task: Check for this task only (default: every task of the format that the file serves).
        seed: Seed of the splits whose records are counted.
        open_images: Decode every picture completely. If False, pictures need not exist.
        progress: Wraps the iteration over records while pictures are opened, such as `tqdm`.
        encoding: The encoding of the files' text, as Python names it.
        allowed: `allow_outside`, `allow_large_pictures`, as for `load_examples`.

    Raises:
        FileNotFoundError, ValueError: A file is missing, or is not of this format at all.
    """
    fmt, file = resolve(dataset, data_file)
    if file is None:
        raise ValueError(f"data set {fmt.name!r} is read from a file: give data_file")
    folder = image_folder(fmt, file, image_dir, **allowed)
    pictures = _PictureInspector(replace(folder, must_exist=True)) if open_images else None
    checks: dict[str, TaskCheck] = {}
    errors: list[ValueError] = []
    for name in fmt.tasks if task is None else [task]:
        try:
            with text_encoding(encoding):
                checked = check_records(fmt, name, file)
        except ValueError as error:  # the file may serve another task
            errors.append(error)
        else:
            checks[name] = _check_task(name, checked, seed, pictures, progress)
    if not checks:
        raise errors[0]
    if pictures is None:
        return DataCheck(fmt.name, str(file), checks, 0)
    return DataCheck(fmt.name, str(file), checks, len(pictures.seen), pictures.warnings())


class _PictureInspector:
    """Opens each picture once and caches its size, or the error."""

    def __init__(self, folder: ImageFolder):
        self.folder = folder
        self.seen: dict[tuple[str, Any], tuple[tuple[int, int], bool] | str] = {}
        self.images: dict[bytes, str] = {}  # image key by digest of the bytes
        self.duplicates: list[str] = []

    def inspect(self, record: Record) -> tuple[tuple[int, int], bool]:
        """Size in pixels, and whether EXIF turned the picture; raises BadRecord if it can't be read."""
        picture = find_record_picture(record, self.folder)
        key = (str(picture.file), record.content and record.image_key)
        if key not in self.seen:
            self.seen[key] = self._inspect_file(record, replace(picture, size=None, box=None))
        outcome = self.seen[key]
        if isinstance(outcome, str):
            raise BadRecord(outcome)
        return outcome

    def _inspect_file(self, record: Record, picture: Picture) -> tuple[tuple[int, int], bool] | str:
        try:
            size_and_turned = picture.verify()
            content = picture.file.read_bytes() if record.content is None else record.content()
        except (OSError, ValueError) as error:
            return str(error).removeprefix(f"record {record.id}: ")
        first_key = self.images.setdefault(hashlib.blake2b(content).digest(), record.image_key)
        if first_key != record.image_key:
            self.duplicates.append(f"{record.image_key} = {first_key}")
        return size_and_turned

    def warnings(self) -> list[str]:
        """Warnings that concern all tasks."""
        out = []
        if not self.seen:
            out.append(f"no picture lies in {self.folder.path}: name its folder, or check without pictures")
        if self.duplicates:
            names = _abbreviate(self.duplicates)
            out.append(f"the same picture under two names, so that splits may share it: {names}")
        return out


def _check_task(
    task: str,
    checked: CheckedRecords,
    seed: int,
    pictures: _PictureInspector | None,
    progress: Callable[..., Any],
) -> TaskCheck:
    check = TaskCheck(unusable=checked.bad, not_for_task=dict(checked.not_for_task), clipped=checked.clipped)
    usable = checked.records
    if pictures is not None:
        usable = _records_with_usable_pictures(progress(checked.records), pictures, check)
    check.usable = len(usable)
    split_counts = Counter(split_of(record.image_key, seed) for record in usable)
    check.splits = {split: split_counts[split] for split in SHARES}
    check.warnings += [f"left out: {skipped}" for skipped in checked.left_out]
    if usable and min(check.splits.values()) == 0:
        check.warnings.append("too few images for a record in every split")
    if task in _EXTRA_CHECKS:
        _EXTRA_CHECKS[task](checked.records, check)
    return check


def _records_with_usable_pictures(
    records: Any, pictures: _PictureInspector, check: TaskCheck
) -> list[Record]:
    usable, other_size, turned = [], [], set()
    for record in records:
        try:
            size, was_turned = pictures.inspect(record)
            if record.box is not None and record.size is None and clip_box(record.box, size)[1]:
                check.clipped.append(record.id)
            if record.size not in (None, size):
                other_size.append(record.id)
                if record.box is not None:
                    actual_size, annotated_size = format_size(size), format_size(record.size)
                    raise BadRecord(
                        f"bbox is for a picture of {annotated_size}, but the picture is {actual_size}"
                    )
        except BadRecord as error:
            check.unusable.append(SkippedRecord(record.id, str(error)))
            continue
        if was_turned:
            turned.add(record.image_key)
        usable.append(record)
    if other_size:
        check.warnings.append(
            f"{len(other_size):,} pictures are not of their annotated size: {_abbreviate(other_size)}"
        )
    if turned:
        check.warnings.append(
            f"{len(turned):,} pictures are turned upright by EXIF: {_abbreviate(sorted(turned))}"
        )
    return usable


def _check_negatives(records: Sequence[Record], check: TaskCheck) -> None:
    """Mark records as unusable for which there are too few captions of other images."""
    normalized_captions = {
        image: {normalize_caption(caption) for caption in captions}
        for image, captions in group_captions_by_image(records).items()
    }
    n_texts = len(set().union(*normalized_captions.values()))
    too_few_negatives = {
        r.id for r in records if n_texts - len(normalized_captions[r.image_key]) < N_NEGATIVES
    }
    already_unusable = {skipped.record for skipped in check.unusable}
    for name in sorted(too_few_negatives - already_unusable):
        reason = f"has fewer than the {N_NEGATIVES} captions of other images that retrieval needs"
        check.unusable.append(SkippedRecord(name, reason))
        check.usable -= 1


# By task: checks beyond those of a record's fields.
_EXTRA_CHECKS: dict[str, Callable[[Sequence[Record], TaskCheck], None]] = {"retrieval": _check_negatives}
