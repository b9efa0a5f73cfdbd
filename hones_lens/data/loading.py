"""Data sets: `load_examples` resolves a name or a path. A new data set is a new module in `DATASETS`."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from hones_lens.data.examples import Example, check_on_error
from hones_lens.data.images import PictureKeywords
from hones_lens.data.reading import text_encoding
from hones_lens.model import did_you_mean

if TYPE_CHECKING:
    from hones_lens.data.records import Format

# Module by name. A module that generates its examples has `TASKS` and `load(task, split, limit, seed, *,
# data_file, image_dir)`; one that reads files has a `FORMAT` instead.
DATASETS = {
    "shapes": "hones_lens.data.shapes",
    "shapes-varied": "hones_lens.data.shapes_varied",
    "shapes-shifted": "hones_lens.data.shapes_shifted",
    "hones": "hones_lens.data.hones",
    "coco": "hones_lens.data.coco",
    "vqav2": "hones_lens.data.vqav2",
    "cocotext": "hones_lens.data.cocotext",
    "gqa": "hones_lens.data.gqa",
    "textvqa": "hones_lens.data.textvqa",
    "vizwiz": "hones_lens.data.vizwiz",
    "docvqa": "hones_lens.data.docvqa",
    "pope": "hones_lens.data.pope",
    "flickr30k": "hones_lens.data.flickr30k",
    "own": "hones_lens.data.own",
}
_SUFFIXES = {".json": "hones", ".csv": "own", ".jsonl": "own"}


@cache
def _registered() -> dict[str, str]:
    """The data sets above, then the entry points `hones_lens.datasets` of installed distributions."""
    installed = {entry.name: entry.value for entry in entry_points(group="hones_lens.datasets")}
    return DATASETS | installed | DATASETS


def _module_of(name: str) -> Any:
    """The module of a data set, or None if `name` is not a data set's name (but a path, say)."""
    modules = DATASETS if name in DATASETS else _registered()
    return pkgutil.resolve_name(modules[name]) if name in modules else None


def reads_files(dataset: str | Path) -> bool:
    """Whether a data set's pictures and texts come from files (or the Hub), and are not drawn here."""
    module = _module_of(str(dataset))
    return module is None or hasattr(module, "FORMAT")


def tasks_of(dataset: str | Path, data_file: str | Path | None = None) -> tuple[str, ...]:
    """The tasks that a data set has examples for.

    Raises:
        FileNotFoundError, ValueError: As `load_examples`.
    """
    module = _module_of(str(dataset))
    if module is not None and not hasattr(module, "FORMAT"):
        return module.TASKS
    return resolve(dataset, data_file)[0].tasks


def load_examples(
    dataset: str | Path,
    task: str,
    split: str,
    limit: int | None = None,
    seed: int = 3407,
    *,
    data_file: str | Path | None = None,
    image_dir: str | Path | None = None,
    on_error: str = "raise",
    cache_dir: str | Path | None = None,
    encoding: str = "utf-8",
    **pictures: Unpack[PictureKeywords],
) -> list[Example]:
    """Load the examples of one task from one split of a data set.

    Args:
        dataset: Name of a data set (of `DATASETS`, or of an installed distribution); or a path: HONES's
            unified JSON, your own CSV or JSONL file, or a folder with one such file; or `hf:REPO@SPLIT`
            for one of the Hugging Face Hub.
        task: Name of a task that the data set has (see `tasks_of`): `vqa`, `ocr`, `caption`, `retrieval`;
            `vqa-anls` of DocVQA, `yes-no` of POPE.
        split: `discovery`, `dev` or `test`; no two of them share an image. Of files also `all`, or a
            split file, `FILE.json` or `FILE.json:NAME`, that lists images.
        limit: Maximum number of examples. A smaller limit gives a prefix of a larger one.
        seed: Seed of generated examples; for files, seed of the split and of the order.
        data_file: Annotation file, for data sets that are read from files.
        image_dir: Folder of the images, for data sets that are read from files.
        on_error: For files: `raise` at a record that can't be used, or `skip` it, warn, and list it in
            the result's `skipped`.
        cache_dir: For files: folder in which retrieval's hard negatives are cached (default: the user's
            cache).
        encoding: For files: the encoding of their text, as Python names it, e.g. `cp1252`.
        pictures: For files: `allow_outside=True` also reads pictures that lie outside `image_dir` (named by
            `..`, an absolute path or a link), `allow_large_pictures=True` those above 64 megapixels.

    Returns:
        A list; for files a `files.LoadedExamples`, a list with `skipped`, `not_for_task` and `clipped`.

    Raises:
        FileNotFoundError: A file or folder does not exist.
        ValueError: An unknown data set, task, split, encoding or `on_error`; files given to a data set that
            reads none; a file or a record that can't be used. The message names it.
    """
    check_on_error(on_error)
    files: dict[str, Any] = {"data_file": data_file, "image_dir": image_dir}
    module = _module_of(str(dataset))
    if module is not None and not hasattr(module, "FORMAT"):
        _refuse_for_drawn(dataset, encoding=encoding if encoding != "utf-8" else None, **pictures)
        return module.load(task, split, limit, seed, **files)
    if encoding != "utf-8" and str(dataset).startswith("hf:"):
        raise ValueError(f"{str(dataset)!r} has no text files of its own: encoding={encoding!r} has no use")
    from hones_lens.data.files import load_records

    fmt, files["data_file"] = resolve(dataset, data_file)
    with text_encoding(encoding):
        files |= {"on_error": on_error, "cache_dir": cache_dir, **pictures}
        return load_records(fmt, task, split, limit, seed, **files)


def _refuse_for_drawn(dataset: str | Path, **given: Any) -> None:
    for name, value in given.items():
        if value:
            raise ValueError(
                f"data set {str(dataset)!r} is drawn, not read from files: {name}={value!r} has no use"
            )


def resolve(dataset: str | Path, data_file: str | Path | None = None) -> tuple[Format, Path | None]:
    """The format and the file of a data set that is read from files.

    Raises:
        FileNotFoundError: A path that does not exist.
        ValueError: An unknown or generated data set, or both a path and a data file.
    """
    name = str(dataset)
    module = _module_of(name)
    if module is not None:
        if not hasattr(module, "FORMAT"):
            raise ValueError(f"data set {name!r} is drawn, not read from files")
        return module.FORMAT, None if data_file is None else Path(data_file)
    if data_file is not None:
        raise ValueError(
            f"give {name!r} or data_file {str(data_file)!r}, not both; names: {', '.join(_registered())}"
        )
    if name.startswith("hf:"):
        from hones_lens.data.hub import format_of

        return format_of(name), Path(name)
    return _resolve_path(Path(dataset))


def _resolve_path(path: Path) -> tuple[Format, Path]:
    if path.is_dir():
        from hones_lens.data.own import find_data_file

        path = find_data_file(path, tuple(_SUFFIXES))
    if path.suffix.lower() not in _SUFFIXES:
        names, suffixes = ", ".join(_registered()), ", ".join(_SUFFIXES)
        valid = f"{names}, hf:REPO@SPLIT, or a path to a folder or a {suffixes} file"
        raise ValueError(f"unknown data set {str(path)!r}; valid: {valid}{did_you_mean(path, _registered())}")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    return _module_of(_SUFFIXES[path.suffix.lower()]).FORMAT, path
