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

    for settings in all_settings().values():
        source = "shipped" if settings.checkpoint else f"Hub: {settings.hub_id}"
        names = ", ".join((settings.name, *settings.aliases))
        share = f"{100 * settings.ratio:g} % of neurons"
        print(f"{names:<28} {settings.family:<12} {settings.top_k:>3} heads, {share}   {source}")
    write_result(args, [vars(settings) for settings in all_settings().values()])
    return 0
