"""`hones report`: one HTML page of one or more run folders."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hones_lens.app.commands import values
from hones_lens.app.commands.options import add_command


def add(commands: Any) -> None:
    """Add the command to the program's parser."""
    command = add_command(commands, "report", execute, "one HTML page of one or more run folders")
    command.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    command.add_argument(
        "--out",
        metavar="FILE",
        type=values.output_file,
        help="the page to write (default: report.html in the first RUN)",
    )
    text = "size of the page at most, though headline numbers are always in it (default: as it comes)"
    command.add_argument("--max-size", type=values.above_zero, metavar="MB", help=text)


def execute(args: argparse.Namespace) -> int:
    """One page of several runs."""
    from hones_lens.app.report.report import write_report
    from hones_lens.app.report.run_folder import read_view

    out = Path(args.out or Path(args.runs[0]) / "report.html")
    most = None if args.max_size is None else round(args.max_size * 1e6)
    page = write_report(out, [read_view(run) for run in args.runs], most_bytes=most)
    print(f"Report: {page.resolve()}, {page.stat().st_size / 1e6:.2f} MB")
    return 0
