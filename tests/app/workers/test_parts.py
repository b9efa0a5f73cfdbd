from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hones_lens.app.workers.parts import part_file, read_part, write_part
from hones_lens.engine import Done, Unit

UNIT = Unit("heads/0-64/1", ("arm", "example"), (3, 2), lambda model: DONE, 6)
DONE = Done(np.random.default_rng(0).normal(size=(3, 2, 4)), {"forked": 7})


def test_a_part_is_read_as_it_was_written_and_pandas_reads_it_too(tmp_path: Path) -> None:
    file = part_file(tmp_path, UNIT)
    write_part(file, UNIT, DONE, "run")
    found = read_part(file, UNIT, "run")
    assert np.array_equal(found.values, DONE.values) and found.counts == {"forked": 7}
    table = pd.read_parquet(file)
    assert table[["arm", "example"]].to_numpy().tolist() == [[a, e] for a in range(3) for e in range(2)]
    assert np.array_equal(np.stack(table["values"]), DONE.values.reshape(6, 4))
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "run", "unit", "shape", *range(0, 60, 7)])
def test_a_part_that_is_not_what_was_written_is_refused_by_name(tmp_path: Path, damage: str | int) -> None:
    file = part_file(tmp_path, UNIT)
    write_part(file, UNIT, DONE, "run")
    content, run, unit = file.read_bytes(), "run", UNIT
    if isinstance(damage, int):
        at = len(content) * damage // 60
        file.write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
    elif damage in ("cut", "empty", "text"):
        file.write_bytes({"cut": content[:-9], "empty": b"", "text": b"{}"}[damage])
    elif damage == "run":
        run = "another"
    else:
        name, shape = ("heads/0-64/2", (3, 2)) if damage == "unit" else (UNIT.name, (2, 3))
        unit = Unit(name, UNIT.axes, shape, UNIT.work, 6)
    try:
        found = read_part(file, unit, run)
    except ValueError as error:
        assert str(file) in str(error) and "delete it" in str(error)
    else:  # a byte that says nothing, such as of the file's statistics
        assert isinstance(damage, int) and np.array_equal(found.values, DONE.values)


@pytest.mark.parametrize("wrong", ["nan", "shape"])
def test_what_can_not_be_a_result_is_not_written(tmp_path: Path, wrong: str) -> None:
    values = DONE.values[:2] if wrong == "shape" else np.where(DONE.values > 1, np.nan, DONE.values)
    with pytest.raises(ValueError, match="unit heads/0-64/1: values"):
        write_part(part_file(tmp_path, UNIT), UNIT, Done(values), "run")
    assert not list(tmp_path.iterdir())
