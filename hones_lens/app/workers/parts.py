"""Parts of a stage's result: one Parquet file a unit of work; a part that is there is done."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hones_lens.engine import Done, Unit
from hones_lens.results import replaced_atomically

_ABOUT = b"hones_lens"


def part_file(folder: Path, unit: Unit) -> Path:
    """Where the part of a unit lies."""
    return folder / (unit.name.replace("/", "_") + ".parquet")


def write_part(file: Path, unit: Unit, done: Done, run: str) -> None:
    """Write what came of a unit: complete, and on the disk, or not at all.

    Rows have the place along each axis of the unit, and all that was kept there in the column `values`.

    Args:
        file: Where it lies.
        unit, done: What was done, and what came of it.
        run: The identity of the run folder.

    Raises:
        ValueError: Values of another shape than the unit's, or that are not finite.
    """
    values = np.ascontiguousarray(done.values, dtype=np.float64)
    if values.shape[:-1] != unit.shape:
        raise ValueError(f"unit {unit.name}: values of the shape {values.shape[:-1]}, not {unit.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"unit {unit.name}: values that are not finite")
    places = np.indices(unit.shape, dtype=np.int32).reshape(len(unit.shape), -1)
    columns = {axis: pa.array(place) for axis, place in zip(unit.axes, places, strict=True)}
    columns["values"] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[-1])
    about = {"run": run, "unit": unit.name, "shape": list(values.shape), "counts": done.counts}
    about["checksum"] = _checksum(about, values)
    table = pa.table(columns).replace_schema_metadata({_ABOUT: json.dumps(about)})
    with replaced_atomically(file) as partial:
        pq.write_table(table, partial, compression="zstd")


def read_part(file: Path, unit: Unit, run: str) -> Done:
    """What came of a unit.

    Raises:
        ValueError: A file that is damaged, or of another run or unit; names it.
    """
    try:
        table = pq.read_table(file)
        about = json.loads((table.schema.metadata or {})[_ABOUT])
        values = table["values"].combine_chunks().flatten().to_numpy().reshape(about["shape"])
        checksum = about.pop("checksum")
        if (about["run"], about["unit"], values.shape[:-1]) != (run, unit.name, unit.shape):
            raise ValueError(f"it is of run {about['run']}, unit {about['unit']}, shape {about['shape']}")
        if checksum != _checksum(about, values):
            raise ValueError("another checksum")
    except (OSError, pa.ArrowException, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged, or of another run or stage ({error}); delete it to compute it again"
        ) from error
    return Done(values, about["counts"])


def _checksum(about: dict[str, object], values: np.ndarray) -> str:
    digest = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=12)
    digest.update(values.tobytes())
    return digest.hexdigest()
