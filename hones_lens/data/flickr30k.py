"""`flickr30k`: captions of Flickr30k, from any of the files in which they are published.

    flickr_annotations_30k.csv   columns `raw` (five captions, a JSON list), `filename`, `img_id`, ...
    dataset_flickr30k.json       Karpathy's JSON
    results_20130124.token       `1000092795.jpg#0`, a tab and one caption a line (the official file)
    results.csv                  `image_name| comment_number| comment`, one caption a line (Kaggle's)

In Kaggle's file the last separator is missing from one row (`2199200615.jpg| 4   A dog runs ...`); its
caption is read all the same. Quotation marks in the last two files are part of the caption.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

from hones_lens.data import captions
from hones_lens.data.files import load_records
from hones_lens.data.reading import describe_top_level, read_csv, read_text
from hones_lens.data.recognize import read_file_of
from hones_lens.data.records import BadRecord, Format, Record, Row, parse_captions, parse_text

_KAGGLE_HEADER = ["image_name", "comment_number", "comment"]
_TOKEN_LINE = re.compile(r"(?P<image>[^#\t]+)#(?P<number>\d+)\t(?P<caption>.*)")
_KAGGLE_LINE = re.compile(r"(?P<image>[^|]+)\|\s*(?P<number>\d+)\s*[|\s](?P<caption>.*)")


def rows(file: Path, task: str) -> list[Row]:
    """One row per image, from any of the files, which are told apart by their first line."""
    if file.suffix.lower() == ".json":
        return _karpathy_rows(file)
    lines = read_text(file).split("\n")
    if _TOKEN_LINE.fullmatch(lines[0].strip()):
        return _caption_per_line_rows(lines, 1, _TOKEN_LINE)
    if [cell.strip() for cell in lines[0].split("|")] == _KAGGLE_HEADER:
        return _caption_per_line_rows(lines[1:], 2, _KAGGLE_LINE)
    if file.suffix.lower() != ".csv":
        return _karpathy_rows(file)
    cells_by_line = read_csv(file)
    for column in ("raw", "filename"):
        if column not in cells_by_line[0][1]:
            raise ValueError(f"{file} has no column {column!r}, but {', '.join(cells_by_line[0][1])}")
    return [Row(cells["filename"] or f"line {n}", partial(_row, cells)) for n, cells in cells_by_line]


def _karpathy_rows(file: Path) -> list[Row]:
    top = read_file_of(file, "Karpathy's JSON of Flickr30k", "flickr30k")
    if not captions.is_karpathy(top):
        raise ValueError(f"{file} is not Karpathy's JSON: no list 'images', but {describe_top_level(top)}")
    return captions.karpathy_rows(top, file, "filename")


def _row(cells: dict[str, str]) -> Record:
    try:
        raw = json.loads(cells["raw"])
    except json.JSONDecodeError as error:
        raise BadRecord(f"raw is not a JSON list of captions: {error}") from error
    return _record(parse_text(cells["filename"], "filename"), raw)


def _caption_per_line_rows(lines: list[str], first: int, pattern: re.Pattern[str]) -> list[Row]:
    """One row per image, and one per line that is not of the pattern, so that its error can name it.

    Args:
        lines: The lines with captions.
        first: Number of the first of them in the file.
        pattern: Groups `image`, `number` and `caption` of a line.
    """
    by_image: dict[str, dict[int, str]] = {}
    out: list[Row] = []
    for number, line in enumerate(lines, start=first):
        match = pattern.fullmatch(line.strip())
        if match is None:
            if line.strip():
                reason = f"{line.strip()[:60]!r} is not an image, the number of its caption and the caption"
                out.append(Row(f"line {number}", partial(_raise_bad_record, reason)))
            continue
        image_captions = by_image.setdefault(match["image"].strip(), {})
        if int(match["number"]) in image_captions:
            reason = f"caption {match['number']} of {match['image'].strip()} is there twice"
            out.append(Row(f"line {number}", partial(_raise_bad_record, reason)))
        image_captions.setdefault(int(match["number"]), match["caption"])
    for image, numbered in by_image.items():
        out.append(Row(image, partial(_record, image, [numbered[n] for n in sorted(numbered)])))
    return out


def _record(image: str, references: object) -> Record:
    return Record(id=image, image_key=image, files=(image,), references=parse_captions(references))


def _raise_bad_record(reason: str) -> Record:
    raise BadRecord(reason)


FORMAT = Format("flickr30k", captions.TASKS, rows)
load = partial(load_records, FORMAT)
