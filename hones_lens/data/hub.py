"""`hf:REPO[:CONFIG]@SPLIT`: a data set of the Hugging Face Hub, or a local folder in place of REPO.

Needs the package `datasets`. The columns are those of `own`, and the picture must be in the column
`image`. Images are identified by `image_id`, `img_id` or `filename`, else by their bytes. A data set whose
pictures and questions are in two configs (such as GQA's) can't be read: use its official files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hones_lens.data.own import COLUMNS, FIELDS, require_columns, require_task_fields
from hones_lens.data.records import BadRecord, Format, Record, Row, parse_id

PREFIX = "hf:"
_NAME = re.compile(r"hf:(?P<repo>[^:@]+)(:(?P<config>[^:@]+))?@(?P<split>[^@]+)")
_IDS = ("question_id", "questionId", "id")
_IMAGE_IDS = ("image_id", "img_id", "filename")


def format_of(name: str) -> Format:
    """The format of a data set on the Hub.

    Raises:
        ValueError: The name is not `hf:REPO[:CONFIG]@SPLIT`.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name!r} must be hf:REPO@SPLIT or hf:REPO:CONFIG@SPLIT, such as hf:lmms-lab/textvqa@validation"
        )
    return Format(name, tuple(COLUMNS), lambda file, task: _rows(match, task), images_beside=True)


def _rows(match: re.Match[str], task: str) -> list[Row]:
    data = _dataset(match)
    if "image" not in data.column_names:
        raise ValueError(f"{match[0]} has no column image, but {', '.join(data.column_names)}")
    require_columns(set(data.column_names), task, match[0])
    parse, texts = partial(_parse, data=data, task=task, repo=match["repo"]), data.remove_columns("image")
    return [Row(f"number {i + 1}", partial(parse, raw, i)) for i, raw in enumerate(texts)]


def _dataset(match: re.Match[str]) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{match[0]} needs the package datasets: pip install datasets") from error
    try:
        data = datasets.load_dataset(match["repo"], match["config"], split=match["split"])
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{match[0]} can't be loaded (is the Hub in reach?): {error}") from error
    return data.cast_column("image", datasets.Image(decode=False))


def _parse(raw: Mapping[str, Any], index: int, data: Any, task: str, repo: str) -> Record:
    row = {key: value for key, value in raw.items() if value not in (None, "")}
    require_task_fields(row, task)
    content = partial(_bytes, data, index, Path(repo))
    if any(key in row for key in _IMAGE_IDS):
        image = parse_id(row, *_IMAGE_IDS)
    else:
        image = hashlib.blake2b(content(), digest_size=12).hexdigest()
    answers = row.get("answers")
    if isinstance(answers, list):
        row["answers"] = [a.get("answer") if isinstance(a, dict) else a for a in answers]
    return Record(
        id=parse_id(row, *_IDS) if any(key in row for key in _IDS) else f"number {index + 1}",
        image_key=image,
        files=(f"image of row {index + 1}",),
        content=content,
        kind=str(row.get("answer_type") or ""),
        **FIELDS[task](row),
    )


def _bytes(data: Any, index: int, repo: Path) -> bytes:
    """The picture of a row.

    Raises:
        BadRecord: None, or one in a file outside the folder of the data set and the Hub's caches.
    """
    image = data[index]["image"]
    if image is None:
        raise BadRecord("has no image")
    if image["bytes"] is not None:
        return image["bytes"]
    from datasets import config

    file, roots = Path(image["path"]), [Path(config.HF_CACHE_HOME), Path(config.HF_DATASETS_CACHE)]
    roots += [repo] if repo.is_dir() else []
    if not any(file.resolve().is_relative_to(root.resolve()) for root in roots):
        raise BadRecord(f"its image {file} lies outside the data set: {', '.join(map(str, roots))}")
    return file.read_bytes()
