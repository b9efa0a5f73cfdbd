"""Possible paths of a COCO image: users keep the sets of 2014 or 2017, in one folder or in several."""

from __future__ import annotations

import re

_NAME = re.compile(r"COCO_(?P<subset>[a-z]+2014|[a-z]+2015)_(?P<number>\d{12}\.jpg)")


def coco_image_paths(file_name: str) -> tuple[str, ...]:
    """Paths relative to the image folder, to be tried in this order.

    `COCO_val2014_000000000042.jpg` is looked for under that name, in the folder `val2014`, and under its
    name of 2017, `000000000042.jpg`. Any other name is taken as it is.
    """
    match = _NAME.fullmatch(file_name.rsplit("/", 1)[-1])
    if match is None:
        return (file_name,)
    name = match[0]
    paths = (file_name, name, f"{match['subset']}/{name}", match["number"])
    return tuple(dict.fromkeys(paths))


def coco_image_id(file_name: str) -> str:
    """COCO's id of an image, from its file name of 2014 or 2017; empty if the name is no such one."""
    match = re.fullmatch(r"(COCO_[a-z]+\d{4}_)?(?P<number>\d{12})\.jpg", file_name.rsplit("/", 1)[-1])
    return str(int(match["number"])) if match else ""
