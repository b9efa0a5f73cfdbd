"""`coco`: COCO from HONES's unified JSON (four tasks), or its captions as Karpathy or COCO publish them.

The file's content decides: `dataset_coco.json` and `captions_val2014.json` serve captions and retrieval.
Questions on COCO's images are `vqav2`, the texts in them `cocotext`. Splits are drawn over COCO's image
ids, so they agree between all of these.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from hones_lens.data import captions, hones
from hones_lens.data.files import load_records
from hones_lens.data.reading import outline, read_json
from hones_lens.data.records import Format, Row


def rows(file: Path, task: str) -> list[Row]:
    """The rows of any of the three kinds of file."""
    top = read_json(file)
    if hones.is_unified(top):
        return hones.rows_of(top, file, task)
    if not (captions.is_karpathy(top) or captions.is_official(top)):
        raise ValueError(
            f"{file} is neither HONES's unified JSON nor a file of COCO captions, but {outline(top)}"
        )
    if task not in captions.TASKS:
        raise ValueError(f"{file} holds captions, nothing for {task}; use vqav2 or cocotext with their files")
    if captions.is_official(top):
        return captions.official_rows(top, file)
    return captions.karpathy_rows(top, file, "cocoid")


FORMAT = Format("coco", hones.TASKS, rows)
load = partial(load_records, FORMAT)
