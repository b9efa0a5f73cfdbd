"""The files that a run has finished, checked against the checksums that it recorded."""

from __future__ import annotations

import hashlib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

from hones_lens.app.report.run_settings import FORMAT, read_object, read_settings


class RunFiles:
    """The files of a run folder that its run finished.

    A folder of an earlier version recorded less: its files are taken as they are.

    Args:
        folder: The run folder.

    Raises:
        ValueError: It is not a run folder, or its settings.json or stages.json is damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        settings = read_settings(folder)
        self._checksums: dict[str, str] | None = None
        if settings.get("format") == FORMAT:
            stages = finished_files(self.folder, settings["run"])
            self._checksums = {
                name: checksum for files in stages.values() for name, checksum in files.items()
            }

    def find(self, name: str) -> Path | None:
        """The path of a file, after its checksum was compared; None if the run did not make it.

        Raises:
            ValueError: The file was changed, damaged or deleted, or it is not one that the run finished.
        """
        file = self.folder / name
        if self._checksums is None:
            return file if file.exists() else None
        if name in self._checksums:
            check_file(file, self._checksums[name])
            return file
        if file.exists():
            raise ValueError(
                f"{file} is not one that this run finished: the command that made the folder makes it again; "
                "or it is of another run, and should not be there"
            )
        return None

    def find_all(self, pattern: str) -> list[Path]:
        """As `find`, the files of the folder itself whose names match a pattern such as `lens-*.json`."""
        there = {file.name for file in self.folder.glob(pattern)}
        recorded = {name for name in self._checksums or () if "/" not in name and fnmatch(name, pattern)}
        return [file for name in sorted(there | recorded) if (file := self.find(name)) is not None]

    def require(self, name: str) -> Path:
        """As `find`, for a file that another one names.

        Raises:
            FileNotFoundError: The run did not make it.
        """
        file = self.find(name)
        if file is None:
            raise FileNotFoundError(
                f"{self.folder / name} is not there, though the run has results that need it"
            )
        return file


def verified(file: str | Path) -> Path:
    """A file's path; of a file in a run folder, after its checksum was compared.

    Raises:
        FileNotFoundError: There is none.
        ValueError: The run did not finish it, or it is no longer the one that was written.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there")
    for folder in list(file.absolute().parents)[:2]:  # a file of the run, or in its folder `hones`
        if (folder / "settings.json").is_file():
            return RunFiles(folder).require(file.absolute().relative_to(folder).as_posix())
    return file


def finished_files(folder: Path, run: str) -> dict[str, dict[str, str]]:
    """By finished stage, the checksums of its files.

    Args:
        folder: The run folder.
        run: The identity of the run.

    Raises:
        ValueError: `stages.json` is damaged or of another run.
    """
    file = folder / "stages.json"
    if not file.exists():
        return {}
    saved = read_object(file)
    stages = saved.get("stages")
    if saved.get("run") != run or not _are_checksums(stages):
        raise ValueError(f"{file} is damaged or of another run; choose another --out")
    return cast("dict[str, dict[str, str]]", stages)


def _are_checksums(stages: Any) -> bool:
    return isinstance(stages, dict) and all(
        isinstance(files, dict) and all(isinstance(checksum, str) for checksum in files.values())
        for files in cast("dict[str, Any]", stages).values()
    )


def check_file(file: Path, checksum: str) -> None:
    """Compare a file with the checksum that was recorded when it was written.

    Raises:
        ValueError: It is another one, or not there.
    """
    if not file.exists():
        raise ValueError(f"{file} is not there any more: the command that made the folder makes it again")
    if not file.is_file() or file_hash(file) != checksum:
        raise ValueError(
            f"{file} was changed or damaged since the run wrote it: delete it, and the command that made the "
            "folder makes it again; or choose another --out"
        )


def file_hash(file: Path) -> str:
    """A checksum of a file's content."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=12)).hexdigest()
