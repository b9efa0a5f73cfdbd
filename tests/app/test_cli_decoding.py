"""Commands on a checkpoint whose generation config changes greedy decoding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hones_lens import HookedVLM, checkpoint_path
from hones_lens.app.cli import main

SAYS = "greedy, repetition_penalty=1.3"


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """tiny-llava with a repetition penalty and what sampling reads."""
    folder = tmp_path / "penalised"
    shutil.copytree(checkpoint_path("tiny-llava"), folder)
    file = folder / "generation_config.json"
    settings = {**json.loads(file.read_text()), "repetition_penalty": 1.3, "do_sample": True, "top_k": 1}
    settings.pop("_from_model_config")
    file.write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.exhaustive
def test_check_compares_and_says_the_decoding(checkpoint: str, capsys) -> None:
    for options, decoding in (([], SAYS), (["--plain-greedy"], "greedy")):
        assert main(["check", checkpoint, "--dtype", "bfloat16", *options]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "greedy tokens equal" in line]
        assert line.partition("decoding: ")[2].partition(";")[0] == decoding


def test_loading_reads_the_config_or_leaves_it_out(checkpoint: str) -> None:
    assert str(HookedVLM.from_pretrained(checkpoint).decoding) == SAYS
    plain = HookedVLM.from_pretrained(checkpoint, plain_greedy=True)
    assert str(plain.decoding) == "greedy" and not plain.decoding.settings
    assert plain.cfg.eos_token_ids == HookedVLM.from_pretrained(checkpoint).cfg.eos_token_ids == (2,)


def test_a_run_and_its_report_say_the_decoding(checkpoint: str, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    command = ["localize", "--model", checkpoint, "--stage", "heads", "--limit", "2", "--out", str(run)]
    assert main(command) == 0
    assert f"generation config says: {SAYS}" in capsys.readouterr().out
    assert json.loads((run / "settings.json").read_text())["settings"]["decoding"] == SAYS
    assert main([*command, "--plain-greedy"]) == 1
    assert f"decoding: '{SAYS}' there, 'greedy' now" in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(tmp_path / "r.html")]) == 0
    assert SAYS in (tmp_path / "r.html").read_text()


def test_a_setting_that_is_not_handled_stops_a_command_by_name(checkpoint: str, capsys) -> None:
    file = Path(checkpoint) / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_beams": 3}))
    evaluate = ["evaluate", "--model", checkpoint, "--task", "vqa", "--limit", "2"]
    assert main(evaluate) == 1
    assert "sets num_beams=3, which is not handled" in capsys.readouterr().err
    assert main([*evaluate, "--plain-greedy"]) == 0
