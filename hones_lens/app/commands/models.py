"""`hones models`: the models that are known by name."""

from __future__ import annotations

import argparse
from typing import Any

from hones_lens.app.commands.arguments import write_result
from hones_lens.app.commands.options import add_command


def add(commands: Any) -> None:
    """Add the command to the program's parser."""
    add_command(commands, "models", execute, "models that are known by name")


def execute(args: argparse.Namespace) -> int:
    """The models that are known by name."""
    from hones_lens.model import all_settings

    for s in all_settings().values():
        where = "shipped" if s.checkpoint else f"Hub: {s.hub_id}"
        names = ", ".join((s.name, *s.aliases))
        print(f"{names:<28} {s.family:<12} {s.top_k:>3} heads, {100 * s.ratio:g} % of neurons   {where}")
    write_result(args, [vars(s) for s in all_settings().values()])
    return 0
