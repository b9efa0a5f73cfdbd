"""What of a command's options a run folder records: all of them, but for two short lists."""

from __future__ import annotations

import argparse
from typing import Any

# Options that change no number of a run.
CHANGE_NOTHING = {"help", "debug", "config", "json", "out", "wait", "allow_code_change", "force", "stage"}
CHANGE_NOTHING |= {"plan", "gpu", "gpus", "mfu", "throughput", "memory_budget"}
CHANGE_NOTHING |= {"workers", "engine", "worker_threads", "slurm"}
# Options that select what a run folder records by itself: names and hashes of model, examples and neurons.
SELECT = {"model", "device", "device_map", "dtype", "plain_greedy", "min_pixels", "max_pixels"}
SELECT |= {"task", "dataset", "data_file", "image_dir", "encoding", "allow_outside", "allow_large_pictures"}
SELECT |= {"split", "discovery_split", "dev_split", "limit", "discovery_limit", "dev_limit", "seed"}
SELECT |= {"on_error", "neurons", "runs"}


def recorded_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a command by name, as far as a run folder has to record them."""
    names = [action.dest for action in args.parser._actions]
    return {name: getattr(args, name) for name in names if name not in CHANGE_NOTHING | SELECT}
