"""The program `hones`. Nothing heavy is imported before a command really runs."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hones_lens.app import commands as do
from hones_lens.app.commands import TINY
from hones_lens.app.hones_config import is_hones_config, read_options
from hones_lens.tasks import task_names

_EXAMPLES = """examples:
  hones demo                                   heads, neurons and masking on the shipped model
  hones demo --task ocr --out runs/ocr
  hones localize --model tiny-llava --task vqa --out runs/vqa
  hones evaluate --model tiny-llava --limit 500
  hones patch --what z --by all --limit 32      which heads carry the changed fact?
  hones check path/to/llava-1.5-7b-hf          is it computed as Hugging Face computes it?
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hones`. Exit codes: 0 done, 1 failed (one line says why), 2 wrong usage."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if getattr(args, "config", None):
            _take_config(args)
            args = parser.parse_args(argv)
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("hones: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError, FloatingPointError, ImportError) as error:
        if args.debug:
            raise
        print(f"hones: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """Every command with its options."""
    parser = argparse.ArgumentParser(
        prog="hones",
        description="Find, read and steer circuits in vision–language models.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _stage(commands, "demo", do.demo, "heads, neurons, masking and a report, on a shipped model")
    localize = _stage(
        commands, "localize", do.localize, "critical heads, and the neurons they feed (H1 to H3)"
    )
    localize.add_argument("--stage", choices=["heads", "neurons", "all"], default="all", help="default: all")
    _stage(commands, "mask", do.mask, "mask a run's neurons beside matched random sets (H4)")
    _steer(commands)
    _overlap(commands)
    _patch(commands)
    _reproduce(commands)
    evaluate = _add(commands, "evaluate", do.evaluate, "metrics of a model, with intervals")
    _model_options(evaluate)
    _data_options(evaluate)
    evaluate.add_argument("--split", default="test", help="which examples (default: test)")
    evaluate.add_argument("--limit", type=int, help="how many examples a task (default: 1000; retrieval 100)")
    check = _add(
        commands, "check", do.check, "prove that a checkpoint is computed as Hugging Face computes it"
    )
    check.add_argument("model_name", metavar="MODEL", help="name, folder or Hub id")
    _model_options(check, named=False)
    check.add_argument(
        "--flips",
        type=int,
        metavar="N",
        help="also count, on N examples of every task, what in a localization of all heads differs from "
        "float32 in --dtype (default: bfloat16)",
    )
    _data(commands)
    _explore(commands)
    _add(commands, "models", do.models, "models that are known by name")
    report = _add(commands, "report", do.report, "one HTML page of one or more run folders")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    report.add_argument(
        "--out", metavar="FILE", help="the page to write (default: report.html in the first RUN)"
    )
    train = _add(commands, "train-tiny", do.train_tiny, "train a shipped model anew on the shapes world")
    train.add_argument("family", choices=list(TINY))
    train.add_argument("--out", required=True, help="folder for checkpoints, log and the model")
    train.add_argument("--steps", type=int, help="steps of the first part (default: as the shipped model)")
    train.add_argument("--naming-steps", type=int, help="steps of the second part")
    train.add_argument("--shape-steps", type=int, help="steps of the third part")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--threads", type=int, help="CPU threads")
    return parser


def _add(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.set_defaults(run=run, parser=command)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    if name not in ("report", "train-tiny", "explore"):
        command.add_argument("--json", metavar="FILE", help="also write the result here")
    return command


def _stage(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command = _add(commands, name, run, text)
    _model_options(command)
    _data_options(command)
    _split_options(command)
    command.add_argument("--top-k", type=int, help="critical heads (default: model_configs/)")
    command.add_argument("--ratio", type=float, help="share of neurons (default: model_configs/)")
    command.add_argument("--controls", type=int, default=20, help="matched random sets (default: 20)")
    command.add_argument(
        "--positions",
        choices=["all", "last"],
        default="all",
        help="last: replace heads only from the end of the prompt on (default: all)",
    )
    command.add_argument(
        "--prefilter", type=int, metavar="M", help="measure only the M heads that attribution patching likes"
    )
    command.add_argument(
        "--race", type=float, metavar="EPSILON", help="race heads: right up to EPSILON with probability 0.95"
    )
    command.add_argument("--memory-budget", type=float, metavar="GB", help="default: half of what is free")
    command.add_argument("--plan", action="store_true", help="say what would be done and stop")
    return command


def _split_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", metavar="DIR", help="run folder (default: runs/MODEL-TASK)")
    command.set_defaults(outputs=None)
    command.add_argument("--limit", type=int, help="how many examples of each split")
    command.add_argument("--discovery-limit", type=int, help="how many discovery examples, if not --limit")
    command.add_argument("--dev-limit", type=int, help="how many dev examples, if not --limit")
    for split, use in (("discovery", "heads and neurons are found"), ("dev", "scales are learned")):
        command.add_argument(
            f"--{split}-split", default=split, metavar="SPLIT", help=f"where {use} (default: {split})"
        )
    command.add_argument("--split", default="test", help="where results are measured (default: test)")


def _steer(commands: Any) -> None:
    command = _add(commands, "steer", do.steer, "learn scales for a run's neurons, beside all controls (H5)")
    _model_options(command)
    _data_options(command)
    _split_options(command)
    add = command.add_argument
    add("--neurons", metavar="FILE", help="neurons.json or HONES's file (default: that of the run folder)")
    add("--k", type=int, help="how many of them (default: all that are selected)")
    add("--methods", type=_names, metavar="A,B", help="default: all six")
    add("--lr", type=_numbers, default=(5e-4, 5e-3, 5e-2), help="among these (default: 5e-4,5e-3,5e-2)")
    add("--epochs", type=_integers, default=(2, 8), help="among these (default: 2,8)")
    add("--factors", type=_numbers, default=(0.5, 0.75, 1.0, 1.25, 1.5, 2.0), help="of the grid search")
    add("--draws", type=int, default=5, help="random sets (default: 5)")
    add("--patience", type=int, help="stop after so many epochs without a better dev metric (default: never)")
    for name, kind in (("accumulate", int), ("kl-weight", float), ("l2-weight", float), ("clamp", float)):
        add(f"--{name}", type=kind, help="default: HONES's")
    add("--negatives", type=int, help="wrong candidates an example of retrieval")


def _overlap(commands: Any) -> None:
    command = _add(commands, "overlap", do.overlap, "neurons that the tasks of several runs share (H6)")
    command.add_argument("runs", nargs="+", metavar="RUN", help="run folders of one model, one a task")
    command.add_argument(
        "--mask", action="store_true", help="mask each group, measure every task, and read the logit lens"
    )
    command.add_argument("--out", metavar="DIR", help="run folder (default: runs/MODEL-overlap[-masked])")
    command.add_argument("--model", help="where the model is, if not where its name says")
    command.add_argument("--limit", type=int, help="how many examples to measure on")
    command.add_argument("--split", default="test", help="where results are measured (default: test)")
    _model_options(command, named=False)
    _file_options(command)
    nothing = ("min_pixels", "max_pixels", "discovery_limit", "dev_limit")
    command.set_defaults(discovery_split="discovery", dev_split="dev", **dict.fromkeys(nothing))


def _patch(commands: Any) -> None:
    command = _add(commands, "patch", do.patch, "put what one input makes into another, and see what changes")
    _model_options(command)
    _data_options(command)
    add = command.add_argument
    add("--kind", help="which fact counterfactual pairs differ in (default: all in turn)")
    add("--split", default="dev", help="of the pairs or examples (default: dev)")
    add("--limit", type=int, help="how many (default: 64)")
    add("--image", metavar="FILE", help="a picture of your own, with --prompt and --answer")
    for name, what in (("prompt", "what to ask"), ("answer", "what is right"), ("foil", "another answer")):
        add(f"--{name}", help=f"{what} about it")
    add("--corrupted-image", metavar="FILE", help="the corrupted picture, on which the foil is right")
    add("--corrupted-prompt", help="the corrupted prompt, of as many tokens")
    add("--corrupt", choices=do.CORRUPTIONS, help="corrupt the picture, or the examples of a data set")
    add("--strength", type=float, help="of noise, in standard deviations; of blur, its radius in pixels")
    add("--color", help="of blank (default: grey)")
    add("--corrupt-box", type=_box, metavar="L,T,R,B", help="corrupt there alone")
    add("--what", choices=do.SITES, default="resid_pre", help="what to patch (default: resid_pre)")
    add("--by", choices=["group", "position", "all"], default="group", help="default: group")
    add("--groups", type=_names, default=(), metavar="A,B", help="default: image,question,last")
    add("--box", type=_box, action="append", metavar="L,T,R,B", help="a box on the picture as a group")
    add("--layers", type=_integers, metavar="A,B", help="default: all")
    add("--units", type=_units, help="each, together, numbers, or LAYER.NUMBERs (default: heads each)")
    add("--direction", choices=["denoise", "noise"], default="denoise", help="clean into corrupted, or back")
    add("--metric", choices=["logit_diff", "log_prob", "kl", "task"], help="default: logit_diff with a foil")
    add("--raw", action="store_true", help="the change of the metric instead of its share")
    add("--batch-size", type=int, default=32, help="pairs at a time (default: 32)")
    add("--out", metavar="DIR", help="run folder (default: runs/MODEL-TASK-patch-…)")
    add("--plan", action="store_true", help="say what would be done and stop")


def _reproduce(commands: Any) -> None:
    command = _add(commands, "reproduce", do.reproduce, "all stages on all tasks, and tables as in the paper")
    _model_options(command)
    _file_options(command)
    _split_options(command)
    command.add_argument("--tasks", type=_names, metavar="A,B", help="default: all that the data set has")
    command.add_argument("--ratios", type=_numbers, default=(0.01, 0.05), help="shares of neurons to mask")
    command.add_argument("--controls", type=int, default=20, help="matched random sets (default: 20)")


def _explore(commands: Any) -> None:
    command = _add(commands, "explore", do.explore, "click through one prompt's heads and neurons")
    add = command.add_argument
    add("--image", metavar="FILE", help="a picture (default: one of the shapes world, with its question)")
    add("--prompt", help="what to ask (default: for a description)")
    add("--run", metavar="RUN", dest="run_folder", help="colour the heads by the scores of this run folder")
    add("--port", type=int, default=0, help="of the server on 127.0.0.1 (default: one that is free)")
    add("--no-browser", action="store_true", help="only say where the page is")
    add("--out", metavar="FILE", help="write a page to keep instead of serving one")
    _model_options(command)


def _data(commands: Any) -> None:
    data = commands.add_parser("data", help="look at data sets", description="Look at data sets.")
    actions = data.add_subparsers(title="actions", metavar="ACTION", required=True)
    check = _add(actions, "check", do.data_check, "what of a data set can be used, and what is wrong")
    check.add_argument("dataset", metavar="DATA", help="a name, or a file or folder")
    check.add_argument("--task", choices=task_names(), help="default: all that the data set serves")
    check.add_argument("--data-file", help="annotations, where DATA is a name")
    check.add_argument("--image-dir", help="images (default: where the annotations lie)")
    check.add_argument("--seed", type=int, default=3407, help="of the splits that are counted")
    check.add_argument("--no-images", action="store_true", help="do not open the pictures")


def _box(text: str) -> tuple[float, float, float, float]:
    left, top, right, bottom = _numbers(text)
    return left, top, right, bottom


def _units(text: str) -> str | tuple[int, ...] | tuple[tuple[int, int], ...]:
    parts = _names(text)
    if parts and all("." in part for part in parts):
        pairs = (part.split(".") for part in parts)
        return tuple((int(layer), int(index)) for layer, index in pairs)
    return text if text in ("each", "together") else _integers(text)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in _names(text))


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in _names(text))


def _model_options(command: argparse.ArgumentParser, named: bool = True) -> None:
    if named:
        command.add_argument(
            "--model", default="tiny-llava", help="name, folder or Hub id (default: tiny-llava)"
        )
        command.add_argument("--config", metavar="YAML", help="options from a file; those given here win")
    command.add_argument("--device", help="default: the GPU if there is one")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    if named:
        for name in ("min", "max"):
            command.add_argument(f"--{name}-pixels", type=int, help="of a picture, for models that resize it")


def _data_options(command: argparse.ArgumentParser) -> None:
    names = task_names()
    if command.prog.endswith(" evaluate"):
        names, default, told = (*names, "all"), "all", "all that the data set has"
    else:
        default = told = "vqa"
    command.add_argument("--task", choices=names, default=default, help=f"default: {told}")
    _file_options(command)


def _file_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dataset", default="shapes", help="name, file or folder (default: shapes)")
    command.add_argument("--data-file", help="annotations, for data sets read from files")
    command.add_argument("--image-dir", help="images, for data sets read from files")
    command.add_argument("--seed", type=int, default=3407)
    command.add_argument(
        "--on-error", choices=["raise", "skip"], default="raise", help="at a record that can't be used"
    )


def _take_config(args: argparse.Namespace) -> None:
    """Make the file's values the defaults of the command, so that options given here win."""
    import yaml

    data = yaml.safe_load(Path(args.config).read_text(encoding="utf-8")) or {}
    options = {a.dest: a for a in args.parser._actions if a.dest not in ("help", "config", "debug")}
    if is_hones_config(data):
        found = _of_hones(args, data)
        args.parser.set_defaults(**{k: v for k, v in found.items() if k in options or k == "outputs"})
        return
    for key, value in data.items():
        name = key.replace("-", "_")
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; valid: {', '.join(options)}"
            raise ValueError(f"{args.config}: unknown key {key!r}{hint}")
        choices = options[name].choices
        if choices is not None and value not in choices:
            raise ValueError(f"{args.config}: {key} is {value!r}; valid: {', '.join(map(str, choices))}")
        args.parser.set_defaults(**{name: value})


def _of_hones(args: argparse.Namespace, data: dict[str, Any]) -> dict[str, Any]:
    """Options from a configuration of the HONES release; for steering from the data set asked for."""
    steers = args.parser.prog.endswith(" steer")
    asked = args.dataset if args.dataset != args.parser.get_default("dataset") else None
    if steers and asked is None:
        asked = data.get("steering", {}).get("dataset")
    return read_options(data, args.config, asked, steers=steers)


if __name__ == "__main__":
    sys.exit(main())
