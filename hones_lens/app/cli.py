"""The program `hones`. Nothing heavy is imported before a command really runs."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
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
    random_checkpoint,
    report,
    reproduce,
    runs,
    steer,
    train_tiny,
)
from hones_lens.app.commands.checks import check_options, option
from hones_lens.app.commands.unused import check_unused
from hones_lens.app.config_file import apply_config
from hones_lens.app.guard import guarded
from hones_lens.model import did_you_mean

# In the order of `hones --help`.
_COMMANDS = (demo, localize, mask, steer, overlap, patch, reproduce)
_COMMANDS += (evaluate, check, data, explore, models, runs, report, train_tiny, random_checkpoint)
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

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As `argparse`'s; options that the command does not have are told by the command itself."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command = getattr(parsed, "parser", self)
            options = [name for action in command._actions for name in action.option_strings]
            meant = "".join(did_you_mean(word.split("=")[0], options) for word in unknown if word[:2] == "--")
            command.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return parsed

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if found:
            message += did_you_mean(found[1], re.findall(r"[^\s',]+", found[2]))
        super().error(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hones`.

    Exit codes: 0 done; 1 failed (one line says why); 2 wrong usage; 128 plus its number after a signal.
    """
    parser = build_parser()
    args = parser.parse_args(argv)

    def run() -> int | None:
        chosen, given = args, _given(argv)
        if getattr(args, "config", None):
            with option(""):
                given |= apply_config(args)
            chosen = parser.parse_args(argv)
        check_unused(chosen, given)
        check_options(chosen)
        if getattr(chosen, "memory_budget", None) is None:
            return chosen.run(chosen)
        from hones_lens.model import bounded_by

        with bounded_by(chosen.memory_budget):
            return chosen.run(chosen)

    return guarded(run, argv, args.debug)


def _given(argv: Sequence[str] | None) -> set[str]:
    """Names of the options that are said on the command line."""
    parser = build_parser()
    for command in _leaves(parser):
        for action in command._actions:
            action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))


def _leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of the commands, and of the actions of a command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from (command, *_leaves(command))


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


if __name__ == "__main__":
    sys.exit(main())
