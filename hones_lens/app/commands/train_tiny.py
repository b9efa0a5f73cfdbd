"""`hones train-tiny`: a shipped model trained anew on the shapes world."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from hones_lens.app.commands import values
from hones_lens.app.commands.options import add_command

TINY = {"llava": "hones_lens.app.tiny.tiny_llava", "qwen2.5-vl": "hones_lens.app.tiny.tiny_qwen"}


def add(commands: Any) -> None:
    """Add the command to the program's parser."""
    text = "train a shipped model anew on the shapes world"
    command = add_command(commands, "train-tiny", execute, text)
    command.add_argument("family", choices=list(TINY))
    command.add_argument("--out", required=True, help="folder for checkpoints, log and the model")
    command.add_argument(
        "--steps", type=values.positive, help="steps of the first part (default: as the shipped model)"
    )
    command.add_argument("--naming-steps", type=values.natural, help="steps of the second part")
    command.add_argument("--shape-steps", type=values.natural, help="steps of the third part")
    command.add_argument("--seed", type=values.seed, default=0)
    command.add_argument("--threads", type=values.threads, help="CPU threads")


def execute(args: argparse.Namespace) -> int:
    """Train a shipped model anew, and write its card."""
    import torch

    from hones_lens.app.tiny.card import write_card
    from hones_lens.app.tiny.train_tiny import train

    if args.threads:
        torch.set_num_threads(args.threads)
    steps = {name: getattr(args, name) for name in ("steps", "naming_steps", "shape_steps")}
    family = importlib.import_module(TINY[args.family])
    given = {name: n for name, n in steps.items() if n is not None}
    recipe = replace(family.RECIPE, seed=args.seed, **given)
    train(family, Path(args.out), recipe)
    write_card(Path(args.out) / "model", f"tiny-{args.family}", recipe, family.DATASETS)
    print(f"Model: {Path(args.out) / 'model'}")
    return 0
