"""`hones runs`: run folders with their state, share done, last sign of life, and what they found."""

from __future__ import annotations

import argparse
from typing import Any

from hones_lens.app.commands.arguments import write_result
from hones_lens.app.commands.options import add_command


def add(commands: Any) -> None:
    """Add the command to the program's parser."""
    command = add_command(commands, "runs", execute, "run folders: state, share done, last sign of life")
    command.add_argument("folder", nargs="?", default="runs", help="where to look (default: runs)")


def execute(args: argparse.Namespace) -> int:
    """A table of the run folders."""
    from datetime import datetime

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from hones_lens.app.runs.listing import run_states, shown

    states = run_states(args.folder)
    rows = [shown(state, datetime.now()) for state in states]
    if not rows:
        print(f"no run folders in {args.folder}")
    else:
        table = Table(box=None, pad_edge=False)
        for name in rows[0]:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row.values()))
        Console().print(table)
    write_result(args, [{**vars(state), "folder": str(state.folder)} for state in states])
    return 0
