"""`hones data check`: what of a data set can be used, and what is wrong with the rest."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from hones_lens.app.commands import values
from hones_lens.app.commands.arguments import write_result
from hones_lens.app.commands.options import add_command, reading_options
from hones_lens.tasks import task_names

_SHOWN = 10  # faults of a task


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
    check.add_argument(
        "--model",
        help="also ask whether each prompt fits into the context of this model (name, folder, Hub id)",
    )


def execute(args: argparse.Namespace) -> int:
    """What of a data set can be used, and what is wrong with the rest."""
    from tqdm import tqdm

    from hones_lens.data import check_data

    reading = {"data_file": args.data_file, "image_dir": args.image_dir, "encoding": args.encoding}
    reading |= {"allow_outside": args.allow_outside, "allow_large_pictures": args.allow_large_pictures}
    options = {"seed": args.seed, "open_images": not args.no_images, "progress": tqdm}
    check = check_data(args.dataset, args.task, **options, **reading)
    print(check)
    result, faults = check.to_json(), dict[str, list[Any]]()
    if args.model:
        faults = _faults(args, [name for name, found in check.tasks.items() if found.usable], reading)
        result["ok"] = check.ok and not any(faults.values())
        result["unfit"] = {
            "model": args.model,
            "tasks": {name: [fault._asdict() for fault in found] for name, found in faults.items()},
        }
    write_result(args, result)
    return 0 if result["ok"] else 1


def _faults(args: argparse.Namespace, tasks: Sequence[str], reading: dict[str, Any]) -> dict[str, list[Any]]:
    """What the model can't be asked, by task; says so."""
    import warnings

    from hones_lens.data import load_examples
    from hones_lens.engine import find_faults
    from hones_lens.model import load_model

    model, faults = load_model(args.model), dict[str, list[Any]]()
    for task in tasks:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is left out was said above
            examples = load_examples(args.dataset, task, "all", None, args.seed, on_error="skip", **reading)
        faults[task] = find_faults(model, task, examples)
        print(f"  {task}: {len(faults[task]):,} of {len(examples):,} examples can't be asked of {args.model}")
        for fault in faults[task][:_SHOWN]:
            print(f"    {fault}")
    return faults
