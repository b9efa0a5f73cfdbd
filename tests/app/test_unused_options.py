"""Every option of every command: it always does something, or where it would not, it is refused by name."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from hones_lens.app.cli import build_parser, main
from hones_lens.app.commands.recorded import CHANGE_NOTHING

FILES = ["--data-file=x.json", "--image-dir=x", "--encoding=cp1252", "--allow-outside"]
FILES += ["--allow-large-pictures", "--on-error=skip"]
WORKERS = ["--engine=ray", "--engine=local", "--worker-threads=2", "--slurm=time=3"]
MACHINES = ["--gpu=a100", "--gpus=2", "--mfu=0.3", "--throughput=9"]
TIMED = [["--plan", "--gpus=2"], ["--plan", "--mfu=0.3"], ["--plan", "--throughput=9", "--gpu=a100"]]
LEARNING = ["--lr=0.1", "--epochs=3", "--patience=2", "--accumulate=2", "--kl-weight=1", "--l2-weight=1"]
LEARNING += ["--clamp=1"]
MODEL = ["--model=tiny-llava", "--device=cpu", "--device-map=cpu", "--dtype=bfloat16", "--plain-greedy"]
DATA = ["--dataset=shapes", "--split=dev", "--limit=3", "--seed=3"]
PICTURE = ["--image=x.png", "--answer=yes", "--prompt=is it red?"]
# What goes before the last option of each case, which then does nothing.
CASES: dict[str, list[list[str]]] = {
    name: [*([one] for one in (*FILES, *WORKERS, *MACHINES)), *TIMED] for name in ("localize", "mask", "demo")
}
CASES["localize"] += [["--stage=heads", "--ratio=0.1"], ["--workers=2", "--slurm=time=3"]]
CASES["steer"] = [[one] for one in (*FILES, *WORKERS, "--negatives=2")]
CASES["steer"] += [["--methods=Base,Grid-Search", one] for one in (*LEARNING, "--draws=3")]
CASES["steer"] += [["--methods=HONES without KL", "--kl-weight=1"], ["--methods=HONES", "--factors=1"]]
CASES["overlap"] = [["a", "b", one] for one in (*MODEL, *DATA, *FILES, *WORKERS, "--workers=2")]
CASES["overlap"] += [["a", "b", "--mask", one] for one in FILES]
CASES["patch"] = [[one] for one in (*WORKERS, *MACHINES)]
CASES["patch"] += [["--corrupt=blur", one] for one in FILES]
CASES["patch"] += [[*PICTURE, "--corrupt=blur", one] for one in (*FILES, *DATA)]
CASES["patch"] += [
    [*PICTURE, "--corrupt=blur", "--raw-prompt", "--task=ocr"],
    ["--corrupt=blur", "--color=red"],
]
CASES["patch"] += [["--by=all", "--groups=image"], ["--by=position", "--box=0,0,9,9"], ["--strength=2"]]
CASES["patch"] += [[one] for one in ("--corrupt-box=0,0,9,9", "--raw-prompt", *PICTURE[1:])]
CASES["patch"] += [[f"{one}=x"] for one in ("--foil", "--corrupted-image", "--corrupted-prompt")]
CASES["patch"] += [["--corrupt=blur", "--kind=color"]]
CASES["reproduce"] = [[one] for one in (*FILES, *WORKERS)]
CASES["evaluate"] = [[one] for one in (*FILES, *WORKERS, "--wait", "--allow-code-change", "--workers=2")]
CASES["data check"] = [["x.csv", "--no-images", one] for one in FILES[1:2] + FILES[3:5]]
CASES["data check"] += [["x.csv", "--no-images", "--model=llava"], ["hf:x/y@test", "--encoding=cp1252"]]
CASES["data check"] += [["shapes", one] for one in FILES[:5]]
CASES["explore"] = [["--out=page.html", "--port=8000"], ["--out=page.html", "--no-browser"], ["--max-size=2"]]
CASES["explore"] += [["--raw-prompt"], ["--prompt=x", "--raw-prompt", "--task=ocr"]]
PIXELS = ["--min-pixels=9999", "--max-pixels=9999"]
for name in ("localize", "mask", "demo", "steer", "patch", "reproduce", "evaluate", "explore"):
    CASES[name] += [["--model=tiny-llava", one] for one in PIXELS]
# What does something whatever else is said; most of it is recorded as what decides numbers.
ALWAYS = {
    "model",
    "device",
    "device_map",
    "dtype",
    "plain_greedy",
    "task",
    "dataset",
    "seed",
    "split",
    "limit",
}
ALWAYS |= {
    "discovery_split",
    "dev_split",
    "discovery_limit",
    "dev_limit",
    "top_k",
    "ratio",
    "ratios",
    "controls",
}
ALWAYS |= {"positions", "prefilter", "race", "heads", "layers", "memory_budget", "workers", "tasks"}
ALWAYS |= {"k", "methods", "neurons", "mask", "runs"}
ALWAYS |= {"image", "prompt", "corrupt", "what", "by", "units", "direction", "metric", "raw", "batch_size"}
ALWAYS |= {"model_name", "quick", "folder", "run_folder", "no_images", "family", "steps", "naming_steps"}
ALWAYS |= {"shape_steps", "threads", "flips", "name", "scale", "tokenizer", "shard_size", "max_size"}


def commands(parser: argparse.ArgumentParser, words: str = "") -> dict[str, argparse.ArgumentParser]:
    """Every command, and action of a command, by its words."""
    inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not inner:
        return {words: parser}
    found: dict[str, argparse.ArgumentParser] = {}
    for action in inner:
        for name, command in action.choices.items():
            found |= commands(command, f"{words} {name}".strip())
    return found


def flag_of(option: str) -> str:
    return option.partition("=")[0]


ALL = [(name, case) for name, cases in CASES.items() for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), ALL, ids=[" ".join([name, *case]) for name, case in ALL])
def test_an_option_that_would_do_nothing_is_refused(
    name: str, case: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for loads in ("hones_lens.model.load_hf_model", "hones_lens.model.load_model"):
        monkeypatch.setattr(loads, None)
    assert main([*name.split(), *case]) == 2
    said = capsys.readouterr().err
    assert flag_of(case[-1]) in said and said.startswith("hones: ") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_every_option_always_does_something_or_has_a_case() -> None:
    for name, parser in commands(build_parser()).items():
        refused = {flag_of(case[-1]) for case in CASES.get(name, [])}
        for action in parser._actions:
            flags = set(action.option_strings)
            known = action.dest in ALWAYS | CHANGE_NOTHING or flags & refused
            assert known, f"{name} {action.option_strings}: does it always do something?"


def test_what_does_something_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules are for the combinations above, and for none of these."""

    class Taken(Exception):
        pass

    def taken(*args: object, **options: object) -> None:
        raise Taken

    for loads in ("hones_lens.app.commands.arguments.model_from", "hones_lens.model.load_hf_model"):
        monkeypatch.setattr(loads, taken)
    for command in ("localize", "mask", "steer", "patch", "evaluate", "explore"):
        monkeypatch.setattr(f"hones_lens.app.commands.{command}.model_from", taken)
    for words in (
        "localize --workers 2 --engine local --worker-threads 3 --ratio 0.1 --out run",
        "localize --stage neurons --ratio 0.1",
        "mask --workers 2 --engine slurm --slurm time=3",
        "steer --methods HONES,Grid-Search --kl-weight 1 --factors 1,2 --lr 0.1",
        "steer --task retrieval --negatives 2 --draws 3",
        "patch --corrupt noise --seed 3 --groups image",
        "evaluate --model tiny-qwen2.5-vl --max-pixels 9999 --min-pixels 99",
        "explore --out page.html --max-size 2",
        "explore --port 8000 --no-browser",
        "check tiny-llava --flips 2 --dtype bfloat16",
    ):
        with pytest.raises(Taken):
            main([*words.split(), "--debug"])
