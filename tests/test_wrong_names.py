"""Names that are typed wrong: the nearest valid one is said."""

from __future__ import annotations

import sys
import webbrowser
from functools import cache
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

import hones_lens as hl
from hones_lens.analysis.patching.metrics import as_metric
from hones_lens.analysis.patching.sites import SITES, as_patch_site, targets_of
from hones_lens.app.cli import main
from hones_lens.data.splits import check_split
from hones_lens.hones.attribution.attribute import load_ranking
from hones_lens.interventions.hooks import replace_with_other_heads_mean
from hones_lens.model.answers import at_positions
from hones_lens.model.choices import require_choice
from hones_lens.model.families import load_family
from hones_lens.model.loading import resolve
from hones_lens.model.names import did_you_mean
from hones_lens.results.labelled import Labelled


def test_the_nearest_name_is_said_and_none_where_none_is_near() -> None:
    assert did_you_mean("vqq", ["ocr", "vqa"]) == "; did you mean 'vqa'?"
    assert did_you_mean("Tiny-LLaVA", ["tiny-llava"]) == "; did you mean 'tiny-llava'?"
    assert did_you_mean("chess", ["ocr", "vqa"]) == did_you_mean("", ["vqa"]) == ""


@cache
def model() -> hl.HookedVLM:
    return hl.HookedVLM.from_pretrained("tiny-llava")


def test_a_model_without_processor_options_says_so() -> None:
    for option in ("max_pixels", "none"):
        with pytest.raises(ValueError, match=f"processor option of 'tiny-llava': '{option}'; valid: none$"):
            hl.HookedVLM.from_pretrained("tiny-llava", **{option: 99})


def test_wrong_names_in_python() -> None:
    for call, meant in (
        (lambda: resolve("tiny-lava"), "tiny-llava"),
        (lambda: hl.load_task("captions"), "caption"),
        (lambda: hl.load_examples("shape", "vqa", "test"), "shapes"),
        (lambda: load_ranking("mean_activations"), "mean_activation"),
        (lambda: as_patch_site("resid_pres"), "resid_pre"),
        (lambda: hl.load_examples("shapes", "caption", "tset"), "test"),
        (lambda: hl.load_examples("shapes-shifted", "vqa", "dve"), "dev"),
        (lambda: hl.load_examples("shapes", "capton", "test"), "caption"),
        (lambda: hl.load_examples("gqa", "vqaa", "all", data_file="q.json"), "vqa"),
        (lambda: check_split("discovry"), "discovery"),
        (lambda: hl.counterfactual_pairs("vqa", "colr"), "color"),
        (lambda: hl.counterfactual_pairs("captions"), "caption"),
        (lambda: load_family("lava"), "llava"),
        (lambda: as_metric("logit_dif"), "logit_diff"),
        (lambda: require_choice("positions", "lst", ("all", "last")), "last"),
        (lambda: replace_with_other_heads_mean(0, 0, "lst"), "last"),
        (lambda: at_positions(model().prepare(None, "a", answers=["b"]), "al"), "all"),
        (lambda: targets_of(SITES["z"], model().cfg, units="eahc"), "each"),
        (lambda: hl.HookedVLM.from_pretrained("tiny-qwen2.5-vl", max_pixel=99), "max_pixels"),
    ):
        with pytest.raises(ValueError, match=f"did you mean '{meant}'\\?"):
            call()


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["localise"], "localize"),
        (["demo", "--task", "vqaa"], "vqa"),
        (["patch", "--what", "neuron"], "neurons"),
        (["demo", "--taks", "vqa"], "--task"),
        (["evaluate", "--datset=shapes"], "--dataset"),
        (["data", "check", "x.json", "--imagedir", "y"], "--image-dir"),
    ],
)
def test_wrong_names_in_the_shell(argv: list[str], meant: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and f"did you mean '{meant}'?" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"hones {version('hones-lens')}\n"


def test_a_figure_shows_itself_in_a_script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    Labelled("values", torch.ones(3), ("layer",)).plot().show()
    file = Path(capsys.readouterr().out.removeprefix("Figure: ").strip())
    assert opened == [file.as_uri()] and "<svg" in file.read_text(encoding="utf-8")
    assert not plt.get_fignums()
