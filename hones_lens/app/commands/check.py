"""`hones check`: whether a checkpoint is computed as Hugging Face computes it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from hones_lens.app.commands import values
from hones_lens.app.commands.arguments import write_result
from hones_lens.app.commands.options import add_command, model_options
from hones_lens.app.guard import WrongOption

if TYPE_CHECKING:
    from hones_lens.app.checks.dtype_flips import DtypeFlips


def add(commands: Any) -> None:
    """Add the command to the program's parser."""
    text = "prove that a checkpoint is computed as Hugging Face computes it"
    command = add_command(commands, "check", execute, text)
    command.add_argument("model_name", metavar="MODEL", help="name, folder or Hub id")
    model_options(command, named=False)
    command.add_argument(
        "--quick", action="store_true", help="one prompt, and hooks in the first, middle and last layer"
    )
    command.add_argument(
        "--flips",
        type=values.positive,
        metavar="N",
        help="also count, on N examples of every task, what in a localization of all heads differs from "
        "float32 in --dtype (default: bfloat16)",
    )


def execute(args: argparse.Namespace) -> int:
    """Whether a checkpoint is computed as Hugging Face computes it."""
    import torch

    from hones_lens.app.checks.parity import check_model
    from hones_lens.model import hook_hf_model, load_hf_model

    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.flips is not None and dtype is torch.float32:
        raise WrongOption("--flips compares another type with float32; give --dtype bfloat16 or float16")
    options = {"plain_greedy": args.plain_greedy, "device_map": args.device_map}
    hf_model, processor = load_hf_model(args.model_name, args.device, dtype, **options)
    hooked = hook_hf_model(hf_model, processor)
    hooked.set_unembed_in_float32(False)  # logits are rounded as Hugging Face's
    checks = check_model(hooked, hf_model, quick=args.quick)
    for check in checks:
        print(f"{'ok  ' if check.passed else 'FAIL'} {check.name}: {check.figure}")
    flips = [] if args.flips is None else _flips(args, dtype or torch.bfloat16)
    write_result(args, [vars(result) for result in (*checks, *flips)])
    return 0 if all(check.passed for check in checks) else 1


def _flips(args: argparse.Namespace, dtype: Any) -> list[DtypeFlips]:
    """What a localization gives in another type than float32, task by task, as it comes."""
    import torch

    from hones_lens.app.checks.dtype_flips import dtype_flips
    from hones_lens.data import load_examples, tasks_of
    from hones_lens.model import load_model

    exact, other = (
        load_model(
            *(args.model_name, args.device, kind), plain_greedy=args.plain_greedy, device_map=args.device_map
        )
        for kind in (torch.float32, dtype)
    )
    results = []
    for task in tasks_of("shapes"):
        results.append(
            dtype_flips(exact, other, task, load_examples("shapes", task, "discovery", args.flips))
        )
        print(results[-1])
    return results
