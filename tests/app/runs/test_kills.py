"""Every command with a run folder, killed at random moments: it goes on to the bytes of an unbroken run."""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.kill_server import KillServer

FEW = ("--limit", "6", "--discovery-limit", "8")
LOCALIZED = ("--top-k", "3", *FEW, "--out", "run")
STEERED = ("--methods", "Base,HONES", "--lr", "5e-2", "--epochs", "1", "--k", "4")
PATCHED = ("--what", "resid_pre", "--layers", "1,2", "--limit", "4", "--batch-size", "2")
COMMANDS = {
    "localize": ("localize", "--stage", "heads", *LOCALIZED),
    "neurons": ("localize", *LOCALIZED),
    "mask": ("mask", "--controls", "2", *LOCALIZED),
    "steer": ("steer", *STEERED, "--neurons", "before/neurons.json", *FEW[:2], "--out", "run"),
    "patch": ("patch", *PATCHED, "--out", "run"),
    "evaluate": ("evaluate", "--task", "vqa", "--limit", "8", "--out", "run"),
    "reproduce": ("reproduce", "--tasks", "vqa,ocr", "--limit", "6", "--controls", "1", "--out", "run"),
}
GOES_ON = ("neurons", "mask")  # in a folder where the command before it has finished
ITS_OWN = ("log.txt", "lock", "lock.json")  # times and processes


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[KillServer, Path]]:
    """A server, and its folder, where the heads and neurons of one run are in `heads` and `before`."""
    folder = tmp_path_factory.mktemp("kills")
    started = KillServer(folder)
    for name, copy in (("localize", "heads"), ("neurons", "before")):
        assert started.run(*COMMANDS[name])["status"] == 0
        shutil.copytree(folder / "run", folder / copy)
    yield started, folder
    started.close()


def begin(folder: Path, name: str) -> None:
    """The folder as the command finds it."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    if name in GOES_ON:
        shutil.copytree(folder / {"neurons": "heads", "mask": "before"}[name], folder / "run")


def files(folder: Path) -> dict[str, bytes]:
    """What a run left."""
    found = (file for file in (folder / "run").rglob("*") if file.is_file() and file.name not in ITS_OWN)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


def unbroken(server: KillServer, folder: Path, name: str) -> tuple[dict[str, bytes], dict, Counter[str]]:
    """Files of a run that nothing kills, what is said of it, and its batches."""
    begin(folder, name)
    answer = server.run(*COMMANDS[name])
    assert answer["status"] == 0, answer["said"]
    return files(folder), answer, Counter(answer["done"])


def check_whole(
    folder: Path, whole: dict[str, bytes], done: Counter[str], once: Counter[str], kills: int
) -> None:
    found = files(folder)
    assert sorted(found) == sorted(whole), "nothing is missing, and nothing half-written is left"
    assert [file for file in whole if found[file] != whole[file]] == []
    assert set(done) == set(once)
    repeated = sum((done - once).values())
    assert repeated <= kills, f"{repeated} batches run again after {kills} kills"


def kill_at_random(server: KillServer, folder: Path, name: str, wanted: int) -> tuple[int, int]:
    """Kill until so many kills were made, each run on top of what the one before it left.

    Returns:
        The number of runs that were finished, and of batches that were run again.
    """
    whole, plain, once = unbroken(server, folder, name)
    chance, kills, finished, again = random.Random(name), 0, 0, 0
    length = plain["seconds"]
    while kills < wanted:
        begin(folder, name)
        done, here = Counter[str](), 0
        while True:
            order: dict[str, float] = {}
            if kills < wanted and kills % 2:
                order = {"seconds": length * chance.uniform(0.05, 0.95)}
            elif kills < wanted:
                order = {"event": chance.randint(1, plain["events"])}
            answer = server.run(*COMMANDS[name], **order)
            done.update(answer["done"])
            if answer["status"] == 0:
                length = length if here else answer["seconds"]  # the first run of all took longer
                break
            assert answer["status"] in (-signal.SIGKILL, -signal.SIGALRM), answer["said"]
            kills, here = kills + 1, here + 1
        check_whole(folder, whole, done, once, here)
        finished, again = finished + 1, again + sum((done - once).values())
    return finished, again


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.by_hand if name == "reproduce" else pytest.mark.exhaustive)
        for name in COMMANDS
    ],
)
def test_a_command_that_is_killed_at_random_ends_as_if_it_were_not(server, name):
    kill_at_random(*server, name, wanted=2)


@pytest.mark.by_hand
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_killed_twenty_times_ends_as_if_it_were_not(server, name):
    finished, again = kill_at_random(*server, name, wanted=20)
    print(f"{name}: 20 kills in {finished} runs, {again} batches run again")


@pytest.mark.by_hand
@pytest.mark.parametrize("name", ["evaluate", "steer"])
def test_a_command_that_is_killed_before_each_change_of_a_file_goes_on(server, name):
    started, folder = server
    whole, plain, once = unbroken(started, folder, name)
    for event in range(1, plain["events"] + 1):
        begin(folder, name)
        killed = started.run(*COMMANDS[name], event=event)
        assert killed["status"] == -signal.SIGKILL
        again = started.run(*COMMANDS[name])
        assert again["status"] == 0, again["said"]
        check_whole(folder, whole, Counter(killed["done"]) + Counter(again["done"]), once, 1)
