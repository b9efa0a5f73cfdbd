"""`hones patch`: activation patching, between clean and corrupted inputs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hones_lens.app.commands import values
from hones_lens.app.commands.arguments import model_from, opening_from, planned_for, write_plan, write_result
from hones_lens.app.commands.checks import check_against_model, option
from hones_lens.app.commands.options import (
    add_command,
    data_options,
    limit_options,
    memory_option,
    model_options,
    plan_options,
    run_options,
    worker_options,
)
from hones_lens.app.commands.recorded import recorded_options
from hones_lens.app.guard import WrongOption

if TYPE_CHECKING:
    from hones_lens.app.runs.patch import PairsChoice

CORRUPTIONS = ("noise", "blank", "blur", "shuffle", "mean")
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern")
SITES += ("neurons", "deepstack", "vision_z", "vision_neurons")


def add(commands: Any) -> None:
    """Add the command to the program's parser."""
    command = add_command(
        commands, "patch", execute, "put what one input makes into another, and see what changes"
    )
    model_options(command)
    data_options(command)
    add = command.add_argument
    add("--kind", help="which fact counterfactual pairs differ in (default: all in turn)")
    add("--split", default="dev", help="of the pairs or examples (default: dev)")
    add("--limit", type=values.positive, help="how many (default: 64)")
    add("--image", metavar="FILE", help="a picture of your own, with --prompt and --answer")
    for name, what in (("prompt", "what to ask"), ("answer", "what is right"), ("foil", "another answer")):
        add(f"--{name}", help=f"{what} about it")
    add("--raw-prompt", action="store_true", help="ask the prompts as they are, not in the form of --task")
    add("--corrupted-image", metavar="FILE", help="the corrupted picture, on which the foil is right")
    add("--corrupted-prompt", help="the corrupted prompt, of as many tokens")
    add("--corrupt", choices=CORRUPTIONS, help="corrupt the picture, or the examples of a data set")
    add(
        "--strength",
        type=values.above_zero,
        help="of noise, in standard deviations; of blur, its radius in pixels",
    )
    add("--color", help="of blank (default: grey)")
    add("--corrupt-box", type=values.box, metavar="L,T,R,B", help="corrupt there alone")
    add("--what", choices=SITES, default="resid_pre", help="what to patch (default: resid_pre)")
    add("--by", choices=["group", "position", "all"], default="group", help="default: group")
    add("--groups", type=values.several(str), default=(), metavar="A,B", help="default: image,question,last")
    add("--box", type=values.box, action="append", metavar="L,T,R,B", help="a box on the picture as a group")
    limit_options(command, "patch")
    memory_option(command)
    worker_options(command)
    add("--units", type=values.units, help="each, together, numbers, or LAYER.NUMBERs (default: heads each)")
    add("--direction", choices=["denoise", "noise"], default="denoise", help="clean into corrupted, or back")
    add("--metric", choices=["logit_diff", "log_prob", "kl", "task"], help="default: logit_diff with a foil")
    add("--raw", action="store_true", help="the change of the metric instead of its share")
    add("--batch-size", type=values.positive, default=32, help="pairs at a time (default: 32)")
    run_options(command, "run folder (default: runs/MODEL-TASK-patch-…)")
    add("--force", action="store_true", help="patch though the clean run does not prefer the answer")
    plan_options(command)


def execute(args: argparse.Namespace) -> int:
    """Activation patching of one kind of activation, between clean and corrupted inputs."""
    from hones_lens.app.runs import patch as patch_run
    from hones_lens.app.runs.baseline import require_meaning, unpatched_answers
    from hones_lens.interventions import Box

    fields = patch_run.PairsChoice.__dataclass_fields__
    choice = patch_run.PairsChoice(**{name: getattr(args, name) for name in fields})
    with option(""):
        choice.check()
    if args.metric == "task" and (args.image or args.corrupt):
        raise WrongOption("--metric: task needs counterfactual pairs, which know their examples")
    boxes = [Box(*sides) for sides in args.box or ()]
    groups = [*args.groups, *boxes] if args.groups or boxes else None
    options = {"what": args.what, "by": args.by, "groups": groups, "layers": args.layers, "units": args.units}
    options |= {} if args.heads is None else {"heads": args.heads}
    options |= {"direction": args.direction, "raw": args.raw, "batch_size": args.batch_size}
    options["metric"] = args.metric or ("logit_diff" if choice.has_foil else "log_prob")
    if args.plan:
        return _plan(args, choice, options)
    model = model_from(args)
    check_against_model(args, model)
    pairs = choice.load(model)
    with option(""):
        patch_run.check_patches(model, pairs, options)
    source = Path(args.image).stem if args.image else args.task
    default = f"runs/{Path(args.model).name}-{source}-patch-{args.what}-{args.by}-{args.direction}"
    asked = {"opening": opening_from(args, model), **recorded_options(args)}
    run = patch_run.start_patching(model, pairs, args.out or default, choice, options, **asked)
    baseline = unpatched_answers(model, run, pairs, choice, args.batch_size)
    print(*baseline.lines(), sep="\n", end="\n\n")
    if not args.force:
        require_meaning(run, baseline)
    result = patch_run.run_patching(model, run, pairs, options)
    print(result, f"Run: {run.folder}", sep="\n\n")
    write_result(args, result.to_dict())
    return 0


def _plan(args: argparse.Namespace, choice: PairsChoice, options: dict[str, Any]) -> int:
    """Print what it would cost."""
    from hones_lens.app.runs.patch import patched_targets
    from hones_lens.app.runs.plan_patching import plan_patching

    model, machines = planned_for(args)
    bounds = {name: getattr(args, name) for name in ("min_pixels", "max_pixels")}
    with option(""):
        patched_targets(model, options)
    write_plan(args, plan_patching(model, choice, options, machines, args.memory_budget, **bounds))
    return 0
