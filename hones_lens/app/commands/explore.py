"""`hones explore`: one prompt to click through."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from hones_lens.app.commands import values
from hones_lens.app.commands.arguments import model_from
from hones_lens.app.commands.checks import option
from hones_lens.app.commands.options import add_command, model_options
from hones_lens.tasks import task_names

if TYPE_CHECKING:
    from hones_lens.app.explorer.views import ExplorerViews


def add(commands: Any) -> None:
    """Add the command to the program's parser."""
    command = add_command(commands, "explore", execute, "click through one prompt's heads and neurons")
    add = command.add_argument
    add("--image", metavar="FILE", help="a picture (default: one of the shapes world, with its question)")
    add("--prompt", help="what to ask (default: of a picture alone, for a description)")
    text = "in whose form it is asked (default: vqa; without --prompt, caption)"
    add("--task", choices=task_names(), help=text)
    add("--raw-prompt", action="store_true", help="ask the prompt as it is, not in the form of a task")
    add("--run", metavar="RUN", dest="run_folder", help="colour the heads by the scores of this run folder")
    add("--port", type=values.port, default=0, help="of the server on 127.0.0.1 (default: one that is free)")
    add("--no-browser", action="store_true", help="only say where the page is")
    add("--out", metavar="FILE", type=values.output_file, help="write a page to keep instead of serving one")
    text = "size of that page at most, though the first view is always in it (default: 0.95)"
    add("--max-size", type=values.above_zero, metavar="MB", help=text)
    model_options(command)


def execute(args: argparse.Namespace) -> int:
    """One prompt to click through: as a page of a local server, or in a file."""
    from hones_lens.app.explorer import serve
    from hones_lens.app.explorer.page import write_page

    if args.out:
        views, most = _views(args), None if args.max_size is None else round(args.max_size * 1e6)
        page = write_page(views, views.start(), args.out, most)
        print(f"Page: {page.resolve()}, {page.stat().st_size / 1e6:.2f} MB")
        return 0
    with serve.open_listener(args.port) as listener:
        serve.run(_views(args), listener, browser=not args.no_browser)
    return 0


def _views(args: argparse.Namespace) -> ExplorerViews:
    from hones_lens.app.explorer.serve import picture_and_prompt
    from hones_lens.app.explorer.views import ExplorerViews
    from hones_lens.app.report.run_files import RunFiles
    from hones_lens.hones import HeadScores

    given = (args.image, args.prompt, args.task)
    with option(""):
        picture, prompt = picture_and_prompt(*given, raw_prompt=args.raw_prompt)
    heads = None
    if args.run_folder:
        heads = HeadScores.load(RunFiles(args.run_folder).require("heads.json"))
    model = model_from(args)
    if heads is not None and heads.model_name != model.cfg.model_name:
        raise ValueError(f"{args.run_folder} has heads of {heads.model_name}, not of {model.cfg.model_name}")
    views = ExplorerViews(model, picture, prompt, heads)
    print(f"prompt: {prompt!r}\nthe model answers {views.text(()).strip()!r}", flush=True)
    return views
