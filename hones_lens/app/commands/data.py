"""`hones data check`: what of a data set can be used, and what is wrong with the rest."""

from __future__ import annotations

import argparse
from typing import Any

from hones_lens.app.commands import values
from hones_lens.app.commands.arguments import write_result
from hones_lens.app.commands.options import add_command, reading_options
from hones_lens.tasks import task_names


def add(commands: Any) -> None:
    """Add the command to the program's parser."""
    data = commands.add_parser("data", help="look at data sets", description="Look at data sets.")
    actions = data.add_subparsers(title="actions", metavar="ACTION", required=True)
    check = add_command(actions, "check", execute, "what of a data set can be used, and what is wrong")
    check.add_argument("dataset", metavar="DATA", help="a name, or a file or folder")
    check.add_argument("--task", choices=task_names(), help="default: all that the data set serves")
    check.add_argument("--data-file", help="annotations, where DATA is a name")
    check.add_argument("--image-dir", help="images (default: where the annotations lie)")
    reading_options(check)
    check.add_argument("--seed", type=values.seed, default=3407, help="of the splits that are counted")
    check.add_argument("--no-images", action="store_true", help="do not open the pictures")


def execute(args: argparse.Namespace) -> int:
    """What of a data set can be used, and what is wrong with the rest."""
    from tqdm import tqdm

    from hones_lens.data import check_data

    check = check_data(
        args.dataset,
        args.task,
        data_file=args.data_file,
        image_dir=args.image_dir,
        seed=args.seed,
        open_images=not args.no_images,
        progress=tqdm,
        encoding=args.encoding,
        allow_outside=args.allow_outside,
        allow_large_pictures=args.allow_large_pictures,
    )
    print(check)
    write_result(args, check.to_json())
    return 0 if check.ok else 1
