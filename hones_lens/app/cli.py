"""The program `hones`. Nothing heavy is imported before a command really runs."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from hones_lens.app.commands import (
    check,
    data,
    demo,
    evaluate,
    explore,
    localize,
    mask,
    models,
    overlap,
    patch,
    report,
    reproduce,
    steer,
    train_tiny,
)
from hones_lens.app.hones_config import is_hones_config, read_options
from hones_lens.model import did_you_mean

# In the order of `hones --help`.
_COMMANDS = (demo, localize, mask, steer, overlap, patch, reproduce)
_COMMANDS += (evaluate, check, data, explore, models, report, train_tiny)
_EXAMPLES = """examples:
  hones demo                                   heads, neurons and masking on the shipped model
  hones demo --task ocr --out runs/ocr
  hones localize --model tiny-llava --task vqa --out runs/vqa
  hones evaluate --model tiny-llava --limit 500
  hones patch --what z --by all --limit 32      which heads carry the changed fact?
  hones check path/to/llava-1.5-7b-hf          is it computed as Hugging Face computes it?
"""


class _Parser(argparse.ArgumentParser):
    """A parser, and its commands' parsers, whose errors name the nearest valid choice."""

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if found:
            message += did_you_mean(found[1], re.findall(r"[^\s',]+", found[2]))
        super().error(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hones`. Exit codes: 0 done, 1 failed (one line says why), 2 wrong usage."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if getattr(args, "config", None):
            _apply_config(args)
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
    parser = _Parser(
        prog="hones",
        description="Find, read and steer circuits in vision–language models.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(debug=False)
    parser.add_argument("--version", action="version", version=f"hones {version('hones-lens')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(commands)
    return parser


def _apply_config(args: argparse.Namespace) -> None:
    """Make the file's values the defaults of the command, so that options given here win."""
    import yaml

    data = yaml.safe_load(Path(args.config).read_text(encoding="utf-8")) or {}
    options = {a.dest: a for a in args.parser._actions if a.dest not in ("help", "config", "debug")}
    if is_hones_config(data):
        hones_options = _hones_options(args, data)
        args.parser.set_defaults(**{k: v for k, v in hones_options.items() if k in options or k == "outputs"})
        return
    for key, value in data.items():
        name = key.replace("-", "_")
        if name not in options:
            closest = difflib.get_close_matches(name, options, n=1)
            hint = f"; did you mean {closest[0]!r}?" if closest else f"; valid: {', '.join(options)}"
            raise ValueError(f"{args.config}: unknown key {key!r}{hint}")
        choices = options[name].choices
        if choices is not None and value not in choices:
            raise ValueError(f"{args.config}: {key} is {value!r}; valid: {', '.join(map(str, choices))}")
        args.parser.set_defaults(**{name: value})


def _hones_options(args: argparse.Namespace, data: dict[str, Any]) -> dict[str, Any]:
    """Options from a configuration of the HONES release; for steering from the data set asked for."""
    steers = args.parser.prog.endswith(" steer")
    dataset = args.dataset if args.dataset != args.parser.get_default("dataset") else None
    if steers and dataset is None:
        dataset = data.get("steering", {}).get("dataset")
    return read_options(data, args.config, dataset, steers=steers)


if __name__ == "__main__":
    sys.exit(main())
