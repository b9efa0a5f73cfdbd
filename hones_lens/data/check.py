"""`check_data`: what of a data set can be used, before a model is loaded (`hones data check`)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hones_lens.data.files import Examined, Skipped, examine, image_folder, picture_of
from hones_lens.data.images import Picture, clip_box, told
from hones_lens.data.loading import resolve
from hones_lens.data.negatives import N_NEGATIVES, captions_by_image, plain
from hones_lens.data.records import BadRecord, Record
from hones_lens.data.splits import SHARES, split_of

_SHOWN = 5


@dataclass
class TaskCheck:
    """What of a file can be used for one task.

    Attributes:
        usable: How many records can be used.
        unusable: The others, with the reason.
        not_for_task: How many records are not meant for the task, by reason.
        clipped: Records whose box crosses the border of the image; it is clipped there.
        splits: How many of the usable records each split has (with the seed given).
        warnings: What works, but may not be meant.
    """

    usable: int = 0
    unusable: list[Skipped] = field(default_factory=list)
    not_for_task: dict[str, int] = field(default_factory=dict)
    clipped: list[str] = field(default_factory=list)
    splits: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass
class DataCheck:
    """What `check_data` found.

    Attributes:
        name: Name of the data set.
        file: Its annotations.
        tasks: One check for each task.
        images: How many pictures were opened, 0 where they were not to be.
        warnings: What works, but may not be meant, whatever the task.
    """

    name: str
    file: str
    tasks: dict[str, TaskCheck]
    images: int
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there is something to use, and nothing that can't be used."""
        checks = self.tasks.values()
        return any(check.usable for check in checks) and not any(check.unusable for check in checks)

    def to_json(self) -> dict[str, Any]:
        """Everything, for JSON."""
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
            lines += [f"  {name}: {line}" for line in _lines(check)]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        import html

        return f"<pre>{html.escape(str(self))}</pre>"


def _lines(check: TaskCheck) -> list[str]:
    shares = ", ".join(f"{split} {n:,}" for split, n in check.splits.items())
    lines = [f"{check.usable:,} usable" + (f" ({shares})" if check.usable else "")]
    if check.clipped:
        lines.append(f"{len(check.clipped):,} boxes cross the border and are clipped: {_some(check.clipped)}")
    lines += [f"{n:,} {reason}: not for this task" for reason, n in check.not_for_task.items()]
    lines += [f"warning: {warning}" for warning in check.warnings]
    if check.unusable:
        lines.append(f"{len(check.unusable):,} unusable:")
        lines += [f"  {skipped}" for skipped in check.unusable[:_SHOWN]]
        lines += ["  ..."] if len(check.unusable) > _SHOWN else []
    return lines


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def check_data(
    dataset: str | Path,
    task: str | None = None,
    *,
    data_file: str | Path | None = None,
    image_dir: str | Path | None = None,
    seed: int = 3407,
    open_images: bool = True,
    progress: Callable[[list[Record]], Any] = iter,
) -> DataCheck:
    """Check the annotations of a data set, and every picture that they name.

    Args:
        dataset, data_file, image_dir: As for `load_examples`; a data set that is read from files.
        task: Check for this task only (default: every task of the format that the file serves).
        seed: Of the splits that are counted.
        open_images: Read every picture to its end. Without it pictures need not exist.
        progress: Wraps the records while pictures are opened, such as `tqdm`.

    Raises:
        FileNotFoundError, ValueError: A file that is missing or as a whole not of this format.
    """
    fmt, file = resolve(dataset, data_file)
    if file is None:
        raise ValueError(f"data set {fmt.name!r} is read from a file: give data_file")
    folder, _ = image_folder(fmt, file, image_dir)
    pictures = _Pictures(folder) if open_images else None
    checks: dict[str, TaskCheck] = {}
    refused: list[ValueError] = []
    for name in fmt.tasks if task is None else [task]:
        try:
            found = examine(fmt, name, file)
        except ValueError as error:  # as a whole it is not for this task; perhaps for another
            refused.append(error)
        else:
            checks[name] = _check_task(name, found, seed, pictures, progress)
    if not checks:
        raise refused[0]
    if pictures is None:
        return DataCheck(fmt.name, str(file), checks, 0)
    return DataCheck(fmt.name, str(file), checks, len(pictures.seen), pictures.warnings())


class _Pictures:
    """Opens each picture once, and remembers what it found."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seen: dict[tuple[str, Any], tuple[tuple[int, int], bool] | str] = {}
        self.images: dict[bytes, str] = {}  # by their bytes
        self.twins: list[str] = []

    def look(self, record: Record) -> tuple[tuple[int, int], bool]:
        """Size in pixels, and whether EXIF turned the picture; BadRecord if it is no good."""
        picture = picture_of(record, self.folder, must_exist=True)
        key = (str(picture.file), record.content and record.image_key)
        if key not in self.seen:
            self.seen[key] = self._open(record, picture.file)
        found = self.seen[key]
        if isinstance(found, str):
            raise BadRecord(found)
        return found

    def _open(self, record: Record, file: Path) -> tuple[tuple[int, int], bool] | str:
        try:
            found = Picture(record.id, file, content=record.content).verify()
            content = file.read_bytes() if record.content is None else record.content()
        except (OSError, ValueError) as error:
            return str(error).removeprefix(f"record {record.id}: ")
        twin = self.images.setdefault(hashlib.blake2b(content).digest(), record.image_key)
        if twin != record.image_key:
            self.twins.append(f"{record.image_key} = {twin}")
        return found

    def warnings(self) -> list[str]:
        """What holds for all tasks."""
        out = []
        if not self.seen:
            out.append(f"no picture lies in {self.folder}: name its folder, or check without pictures")
        if self.twins:
            out.append(f"the same picture under two names, so that splits may share it: {_some(self.twins)}")
        return out


def _check_task(
    task: str, found: Examined, seed: int, pictures: _Pictures | None, progress: Callable[..., Any]
) -> TaskCheck:
    check = TaskCheck(unusable=found.bad, not_for_task=dict(found.not_for_task), clipped=found.clipped)
    usable = found.records
    if pictures is not None:
        usable = _with_good_pictures(progress(found.records), pictures, check)
    check.usable = len(usable)
    drawn = Counter(split_of(record.image_key, seed) for record in usable)
    check.splits = {split: drawn[split] for split in SHARES}
    if usable and min(check.splits.values()) == 0:
        check.warnings.append("too few images for a record in every split")
    if task in _ALSO:
        _ALSO[task](found.records, check)
    return check


def _with_good_pictures(records: Any, pictures: _Pictures, check: TaskCheck) -> list[Record]:
    good, other_size, turned = [], [], set()
    for record in records:
        try:
            size, was_turned = pictures.look(record)
            if record.box is not None and record.size is None and clip_box(record.box, size)[1]:
                check.clipped.append(record.id)
            if record.size not in (None, size):
                other_size.append(record.id)
                if record.box is not None:
                    is_, said = told(size), told(record.size)
                    raise BadRecord(f"bbox is for a picture of {said}, but the picture is {is_}")
        except BadRecord as error:
            check.unusable.append(Skipped(record.id, str(error)))
            continue
        if was_turned:
            turned.add(record.image_key)
        good.append(record)
    if other_size:
        check.warnings.append(
            f"{len(other_size):,} pictures are not of their annotated size: {_some(other_size)}"
        )
    if turned:
        check.warnings.append(f"{len(turned):,} pictures are turned upright by EXIF: {_some(sorted(turned))}")
    return good


def _check_negatives(records: Sequence[Record], check: TaskCheck) -> None:
    """Note records for which there are too few captions of other images."""
    own = captions_by_image(records)
    plain_own = {image: {plain(caption) for caption in captions} for image, captions in own.items()}
    n_texts = len(set().union(*plain_own.values()))
    short = {r.id for r in records if n_texts - len(plain_own[r.image_key]) < N_NEGATIVES}
    listed = {skipped.record for skipped in check.unusable}
    for name in sorted(short - listed):
        reason = f"has fewer than the {N_NEGATIVES} captions of other images that retrieval needs"
        check.unusable.append(Skipped(name, reason))
        check.usable -= 1


# What a task needs beyond its fields.
_ALSO: dict[str, Callable[[Sequence[Record], TaskCheck], None]] = {"retrieval": _check_negatives}
