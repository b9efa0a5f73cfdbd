"""Full disks and folders that can't be written: one line that names the file, and nothing is believed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.kill_server import KillServer

from hones_lens.app.cli import main

EVALUATE = ("evaluate", "--task", "vqa", "--limit", "8", "--out", "run")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[KillServer, Path]]:
    folder = tmp_path_factory.mktemp("disks")
    started = KillServer(folder)
    yield started, folder
    started.close()


@pytest.mark.exhaustive
def test_a_disk_that_fills_up_anywhere_ends_in_one_line_and_spoils_nothing(server):
    """No file may be larger than so many bytes: too few for each of the files in turn."""
    started, folder = server
    plain = started.run(*EVALUATE)
    assert plain["status"] == 0, plain["said"]
    whole = {file.name: file.read_bytes() for file in (folder / "run").iterdir()}
    sizes = sorted({len(content) for content in whole.values()})
    named: set[str] = set()
    for size in [1, *(size - 1 for size in sizes if size > 1)]:
        for file in (folder / "run").iterdir():
            file.unlink()
        full = started.run(*EVALUATE, largest=size)
        said = full["said"].replace("\r", "\n").splitlines()[-1]
        assert full["status"] == 1 and "File too large" in said and "fault" not in said, full["said"]
        named |= {name for name in whole if f"run/{name}" in said}
        assert any(f"run/{name}" in said for name in whole), said
        again = started.run(*EVALUATE)
        assert again["status"] == 0, again["said"]
        for name in ("evaluate-vqa.json", "evaluate-vqa.journal.jsonl", "settings.json", "stages.json"):
            assert (folder / "run" / name).read_bytes() == whole[name], name
        assert sorted(file.name for file in (folder / "run").iterdir()) == sorted(whole)
    assert {"settings.json", "evaluate-vqa.json"} <= named


# Even root can't write there.
@pytest.mark.by_hand
@pytest.mark.parametrize("out", ["/proc/run", "/sys/kernel/run"])
def test_a_folder_that_can_t_be_made_is_refused_by_name(out, capsys, tmp_path):
    if not Path(out).parent.is_dir():
        pytest.skip("there is no such folder on this system")
    with pytest.raises(SystemExit) as stop:
        code = main(["evaluate", "--task", "vqa", "--limit", "2", "--out", out])
        raise SystemExit(code)
    said = capsys.readouterr().err
    assert stop.value.code in (1, 2) and out in said.splitlines()[-1] and "fault" not in said
