"""What ships: the wheel's files, the command, and versions that fit together."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONFIGS = sorted((ROOT / "model_configs").glob("*.yaml"))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {normal(pin.name): Version(str(pin.specifier).removeprefix("==")) for pin in pins}
    assert len(versions) == len(pins), "a package is pinned twice"
    return versions


def shipped() -> set[str]:
    """Every file that belongs into the wheel, by its name in there."""
    package = {p for p in (ROOT / "hones_lens").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    return {p.relative_to(ROOT).as_posix() for p in package} | {
        f"hones_lens/model_configs/{p.name}" for p in CONFIGS
    }


def _not_of_the_source(folder: str, names: list[str]) -> set[str]:
    top = {".git", ".venv", "runs"} if Path(folder) == ROOT else set()
    return {name for name in names if name in top or name == "__pycache__"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy, so that the build leaves nothing in the checkout.
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, source, ignore=_not_of_the_source)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*build, "--no-build-isolation", "--wheel-dir", str(out), str(source)], check=True)
    (file,) = out.glob("*.whl")
    return file


@pytest.mark.exhaustive
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == shipped()


@pytest.mark.slow
def test_the_wheel_has_its_types(wheel: Path) -> None:
    """The marker of PEP 561, and the stub of every package that has one: names are looked up in them."""
    names = set(zipfile.ZipFile(wheel).namelist())
    stubs = {p.relative_to(ROOT).as_posix() for p in (ROOT / "hones_lens").rglob("*.pyi")}
    assert "hones_lens/__init__.pyi" in stubs and len(stubs) > 5
    assert stubs | {"hones_lens/py.typed"} <= names


@pytest.mark.exhaustive
@pytest.mark.slow
def test_public_names_are_found_in_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import hones_lens\n"
        "print(hones_lens.__file__, hones_lens.localize_heads.__module__)"
    )
    file, module = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout.split()
    assert file == str(tmp_path / "hones_lens" / "__init__.py")
    assert module.startswith("hones_lens.hones.")


@pytest.mark.slow
def test_the_wheel_has_the_licence_and_the_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry_points,) = (n for n in archive.namelist() if n.endswith(".dist-info/entry_points.txt"))
    assert "hones = hones_lens.app.cli:main" in archive.read(entry_points).decode()
    assert any(n.endswith("/licenses/LICENSE") for n in archive.namelist())


@pytest.mark.exhaustive
def test_model_configs_are_found_in_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from hones_lens.model.config import all_settings, settings_folder\n"
        "print(settings_folder(), *all_settings())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout.split()
    assert found == [str(tmp_path / "hones_lens" / "model_configs"), *(p.stem for p in CONFIGS)]


def test_model_configs_are_found_in_the_checkout() -> None:
    config = import_module("hones_lens.model.config")
    assert config.settings_folder() == ROOT / "model_configs"
    assert sorted(config.all_settings()) == [p.stem for p in CONFIGS]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
def test_the_name_of_a_model_config_is_the_name_of_its_file(file: Path) -> None:
    assert yaml.safe_load(file.read_text())["name"] == file.stem


def test_names_and_aliases_of_model_configs_are_unique() -> None:
    settings = [yaml.safe_load(p.read_text()) for p in CONFIGS]
    names = [name for s in settings for name in (s["name"], *s["aliases"])]
    assert len(names) == len(set(names))


def test_the_command_is_there() -> None:
    (command,) = distribution("hones-lens").entry_points.select(group="console_scripts", name="hones")
    assert callable(command.load())


def test_the_installed_version_is_that_of_the_project() -> None:
    assert distribution("hones-lens").version == PROJECT["version"]


def test_every_requirement_is_pinned_to_a_version_it_allows() -> None:
    pins = constraints()
    extras = PROJECT["optional-dependencies"].values()
    for requirement in map(Requirement, [*PROJECT["dependencies"], *(r for e in extras for r in e)]):
        version = pins.get(normal(requirement.name))
        assert version is not None, f"{requirement.name} is missing in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} does not allow {version}"


def test_constraints_are_plain_versions() -> None:
    """No local builds such as +cpu, which only some places have."""
    assert [f"{n}=={v}" for n, v in constraints().items() if v.local] == []
