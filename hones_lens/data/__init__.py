"""Data sets: `load_examples` resolves a name; one more data set is one more file."""

from __future__ import annotations

import importlib
from pathlib import Path

from hones_lens.data.examples import Example
from hones_lens.data.pairs import CounterfactualPair, counterfactual_pairs

DATASETS = {
    "shapes": "hones_lens.data.shapes",
    "shapes-varied": "hones_lens.data.shapes_varied",
}


def load_examples(
    dataset: str,
    task: str,
    split: str,
    limit: int | None = None,
    seed: int = 3407,
    *,
    data_file: str | Path | None = None,
    image_dir: str | Path | None = None,
) -> list[Example]:
    """Load the examples of one task from one split of a data set.

    Args:
        dataset: Name of a data set (`DATASETS`).
        task: `vqa`, `ocr`, `caption` or `retrieval`.
        split: `discovery`, `dev` or `test`; no two of them share an image.
        limit: At most so many examples. A smaller limit gives a prefix of a larger one.
        seed: Which examples, where a data set draws them.
        data_file: Annotations, for data sets that are read from files.
        image_dir: Folder of the images, for data sets that are read from files.

    Raises:
        ValueError: An unknown data set, task or split; files given to a data set that reads none.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}; valid: {', '.join(DATASETS)}")
    module = importlib.import_module(DATASETS[dataset])
    return module.load(task, split, limit, seed, data_file=data_file, image_dir=image_dir)


__all__ = ["DATASETS", "CounterfactualPair", "Example", "counterfactual_pairs", "load_examples"]
