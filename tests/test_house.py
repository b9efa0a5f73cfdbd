"""The shape of the package: ten rooms, small files and functions, and stubs that tell the truth."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import hones_lens

PACKAGE = Path(hones_lens.__file__).parent
ROOMS = {"analysis", "app", "data", "engine", "hones", "interventions", "model", "results", "tasks", "viz"}
MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 450, 60, 10


def modules() -> list[Path]:
    return [file for file in PACKAGE.rglob("*.py") if "__pycache__" not in file.parts]


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function as `room/file.py:name`, methods and inner functions too."""
    for file in modules():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{file.relative_to(PACKAGE).as_posix()}:{node.name}", node


def exports(stub: Path) -> list[tuple[str, str]]:
    """(module, name) of every import in a stub; the names are what the stub offers."""
    tree = ast.parse(stub.read_text(encoding="utf-8"))
    assert all(isinstance(node, ast.ImportFrom) for node in tree.body), stub
    lines = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert all(alias.asname == alias.name for node in lines for alias in node.names), stub
    return [(node.module or "", alias.name) for node in lines for alias in node.names]


def test_the_top_level_is_ten_rooms_and_what_packaging_needs() -> None:
    here = {entry.name for entry in PACKAGE.iterdir()} - {"__pycache__"}
    files = {"__init__.py", "__init__.pyi", "py.typed"}
    assert here == ROOMS | files | {"checkpoints"}
    assert {room for room in ROOMS if (PACKAGE / room / "__init__.py").is_file()} == ROOMS
    assert not list((PACKAGE / "checkpoints").rglob("*.py"))


def test_no_file_is_long() -> None:
    lines = {
        file.relative_to(PACKAGE).as_posix(): len(file.read_text(encoding="utf-8").splitlines())
        for file in modules()
    }
    assert {file for file, count in lines.items() if count > MOST_LINES} == set()


def test_no_function_is_long() -> None:
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions()}
    assert {name for name, length in lengths.items() if length > MOST_FUNCTION_LINES} == set()


def test_no_function_has_many_parameters() -> None:
    """`*args` and `**options` not counted, as ruff counts."""
    counts = {}
    for name, node in functions():
        given = node.args
        plain = [*given.posonlyargs, *given.args, *given.kwonlyargs]
        counts[name] = len([each for each in plain if each.arg not in ("self", "cls")])
    assert {name for name, count in counts.items() if count > MOST_PARAMETERS} == set()


@pytest.mark.parametrize("room", ["", *sorted(ROOMS)])
def test_every_name_of_a_stub_is_there(room: str) -> None:
    package = importlib.import_module(f"hones_lens.{room}".rstrip("."))
    offered = exports(PACKAGE / room / "__init__.pyi")
    for module, name in offered:
        source = importlib.import_module(f"{package.__name__}.{module}")
        assert getattr(package, name) is getattr(source, name)
    names = [name for _, name in offered]
    assert len(set(names)) == len(names) > 0
    assert set(package.__all__) == set(names)


@pytest.mark.parametrize("room", ["", *sorted(ROOMS)])
def test_no_name_of_a_stub_is_a_module_of_its_room(room: str) -> None:
    """Else what the name means would depend on which of the two was imported first."""
    inside = {entry.stem for entry in (PACKAGE / room).iterdir() if entry.suffix == ".py" or entry.is_dir()}
    assert not inside & {name for _, name in exports(PACKAGE / room / "__init__.pyi")}
