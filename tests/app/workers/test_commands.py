"""Commands with `--workers` leave the files that they leave without, byte by byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hones_lens.app.cli import main

SIZES = ("--limit", "70", "--discovery-limit", "8")
OVERLAPPING = ("overlap", "shared/vqa", "shared/ocr", "--mask", "--limit", "66")
STEERED = ("steer", "--neurons", "shared/vqa/neurons.json", "--methods", "Base,Grid-Search,HONES")
STEERED = (*STEERED, "--lr", "5e-2", "--epochs", "1", "--factors", "0.5,2", "--k", "4", "--patience", "1")
# With the stages whose units workers must have done.
COMMANDS = {
    "ranking": (("localize", "--task", "retrieval", "--limit", "9", "--stage", "heads"), ("heads",)),
    "race": (("localize", "--race", "0.05", "--limit", "70", "--stage", "heads"), ("heads",)),
    "mask": (  # and all that `localize` does
        ("mask", "--top-k", "3", "--controls", "2", *SIZES),
        ("heads", "heads-held-out", "neurons", "masking"),
    ),
    "patch": (("patch", "--what", "resid_pre", "--layers", "1,2", "--limit", "60"), ("patch",)),
    "evaluate": (("evaluate", "--task", "vqa", "--limit", "70"), ("evaluate-vqa",)),
    "steer": ((*STEERED, "--limit", "12"), ("steering/shapes/steering",)),
    "overlap": (OVERLAPPING, ("groups-vqa", "groups-ocr")),
    "reproduce": (
        ("reproduce", "--tasks", "vqa,ocr", "--limit", "6", "--controls", "1"),
        (
            *("vqa/heads", "vqa/heads-held-out", "vqa/neurons", "vqa/masking", "vqa/others"),
            *("vqa/steering/shapes/steering", "vqa/steering/shapes-shifted/steering"),
            *("vqa/steering/shapes/on-shapes-shifted", "ocr/heads", "across/groups-vqa", "across/groups-ocr"),
            "across/side-effects-on-shapes",
        ),
    ),
}
# Minutes each, where processes must start and little is measured.
LONG = ("ranking", "race", "steer", "overlap", "reproduce")
CASES = [
    pytest.param(name, marks=pytest.mark.by_hand if name in LONG else pytest.mark.exhaustive)
    for name in COMMANDS
]
ITS_OWN = ("log.txt", "lock", "lock.json")  # times and processes


@pytest.fixture(autouse=True)
def same_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """All run folders have one identity, and the command as many threads as a worker."""
    ids = SimpleNamespace(uuid4=lambda: SimpleNamespace(hex="0" * 32))
    monkeypatch.setattr("hones_lens.app.runs.folder.uuid", ids)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def files(folder: Path) -> dict[str, bytes]:
    found = (file for file in folder.rglob("*") if file.is_file() and file.name not in ITS_OWN)
    names = {file.relative_to(folder): file for file in found}
    kept = {name: file for name, file in names.items() if not any(p.endswith(".parts") for p in name.parts)}
    return {name.as_posix(): file.read_bytes() for name, file in sorted(kept.items())}


@pytest.mark.parametrize("name", CASES)
def test_a_command_leaves_the_same_files_with_workers_as_without(name: str) -> None:
    command, stages = COMMANDS[name]
    for task in ("vqa", "ocr") if name in ("overlap", "steer") else ():
        few = ["--task", task, "--limit", "6", "--top-k", "3"]
        assert main(["localize", *few, "--out", f"shared/{task}"]) == 0
    assert main([*command, "--out", "alone"]) == 0
    assert main([*command, "--out", "together", "--workers", "2", "--engine", "local"]) == 0
    alone, together = files(Path("alone")), files(Path("together"))
    assert list(alone) == list(together)
    assert [file for file in alone if alone[file] != together[file]] == []
    for stage in stages:
        folder = Path("together", f"{stage}.parts")
        assert list(folder.glob("*.parquet")), f"workers did nothing of {stage}"
    jobs = list(Path("together").rglob("*_submitted.pkl"))
    assert len(jobs) <= 2 or name == "reproduce", "a worker stays for all stages"
