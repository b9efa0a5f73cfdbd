"""`hones random-checkpoint`: a checkpoint of a known model's size, with random weights."""

from __future__ import annotations

import argparse
from typing import Any

from hones_lens.app.commands import values
from hones_lens.app.commands.options import add_command


def add(commands: Any) -> None:
    """Add the command to the program's parser."""
    text = "write a checkpoint of a known model's size, with random weights"
    command = add_command(commands, "random-checkpoint", execute, text)
    command.add_argument("name", metavar="NAME", help="a name of `hones models`")
    command.add_argument(
        "--out", required=True, metavar="DIR", type=values.output_folder, help="new or empty folder"
    )
    command.add_argument(
        "--scale",
        choices=["counts", "true"],
        default="counts",
        help="counts: true numbers of layers, heads, neurons, image tokens and words, with heads 4 wide; "
        "true: true widths too (default: counts)",
    )
    command.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    command.add_argument("--seed", type=values.seed, default=0)
    command.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="folder of the true tokenizer (default: one made up, of the true size)",
    )
    command.add_argument("--shard-size", type=values.above_zero, default=2.0, metavar="GB", help="default: 2")


def execute(args: argparse.Namespace) -> int:
    """A checkpoint of a known model's size, with random weights."""
    import torch

    from hones_lens.app.random_checkpoint.write import write_random_checkpoint

    folder = write_random_checkpoint(
        args.name,
        args.out,
        scale=args.scale,
        dtype=getattr(torch, args.dtype),
        seed=args.seed,
        tokenizer=args.tokenizer,
        shard_gb=args.shard_size,
    )
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"Random checkpoint: {folder}, {size / 1e9:.2f} GB")
    return 0
