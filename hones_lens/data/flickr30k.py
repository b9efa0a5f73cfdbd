"""`flickr30k`: captions of Flickr30k.

Files: `flickr_annotations_30k.csv`, with the columns `raw` (five captions, a JSON list), `filename`,
`img_id`, `sentids` and `split`; or Karpathy's `dataset_flickr30k.json`.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from hones_lens.data import captions
from hones_lens.data.files import load_records
from hones_lens.data.reading import describe_top_level, read_csv, read_json
from hones_lens.data.recognize import refuse_other_format
from hones_lens.data.records import BadRecord, Format, Record, Row, parse_captions, parse_text


def rows(file: Path, task: str) -> list[Row]:
    """One row per image, from either kind of file."""
    if file.suffix.lower() != ".csv":
        top = read_json(file)
        refuse_other_format(top, file, "Karpathy's JSON of Flickr30k", "flickr30k")
        if not captions.is_karpathy(top):
            raise ValueError(
                f"{file} is not Karpathy's JSON: no list 'images', but {describe_top_level(top)}"
            )
        return captions.karpathy_rows(top, file, "filename")
    lines = read_csv(file)
    for column in ("raw", "filename"):
        if column not in lines[0][1]:
            raise ValueError(f"{file} has no column {column!r}, but {', '.join(lines[0][1])}")
    return [Row(cells["filename"] or f"line {n}", partial(_row, cells)) for n, cells in lines]


def _row(cells: dict[str, str]) -> Record:
    name = parse_text(cells["filename"], "filename")
    try:
        raw = json.loads(cells["raw"])
    except json.JSONDecodeError as error:
        raise BadRecord(f"raw is not a JSON list of captions: {error}") from error
    return Record(id=name, image_key=name, files=(name,), references=parse_captions(raw))


FORMAT = Format("flickr30k", captions.TASKS, rows)
load = partial(load_records, FORMAT)
