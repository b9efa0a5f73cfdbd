"""`coco`: COCO from HONES's unified JSON (four tasks), or its captions as Karpathy or COCO publish them.

The format is recognised by the file's content: `dataset_coco.json` and `captions_val2014.json` serve
captioning and retrieval. Questions on COCO's images are in `vqav2`, texts in them in `cocotext`. Splits
are drawn over COCO's image ids, so they agree between all of these.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from hones_lens.data import captions, hones
from hones_lens.data.files import load_records
from hones_lens.data.reading import describe_top_level
from hones_lens.data.recognize import read_file_of
from hones_lens.data.records import Format, Row


def rows(file: Path, task: str) -> list[Row]:
    """The rows of any of the three kinds of file."""
    top = read_file_of(file, "HONES's unified JSON or a file of COCO captions", "coco", "hones")
    if hones.is_unified(top):
        return hones.unified_rows(top, file, task)
    if not (captions.is_karpathy(top) or captions.is_coco_captions(top)):
        raise ValueError(
            f"{file} is neither HONES's unified JSON nor a file of COCO captions, "
            f"but {describe_top_level(top)}"
        )
    if task not in captions.TASKS:
        raise ValueError(f"{file} holds captions, nothing for {task}; use vqav2 or cocotext with their files")
    if captions.is_coco_captions(top):
        return captions.coco_captions_rows(top, file)
    return captions.karpathy_rows(top, file, "cocoid")


FORMAT = Format("coco", hones.TASKS, rows)
load = partial(load_records, FORMAT)
