"""Crews by name of their engine, and the journals that they fill."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hones_lens.app.runs.folder import Run
from hones_lens.app.runs.journal import Journal
from hones_lens.app.workers.journal import CrewJournal
from hones_lens.app.workers.work import Crew, Order
from hones_lens.model import HookedVLM, require_choice

ENGINES = {"local": ("submitit", "slurm"), "slurm": ("submitit", "slurm"), "ray": ("ray", "ray")}
# What `model_identity` says.
_OF_THE_MODEL = ("weights", "buffers", "config", "tokenizer", "chat_template", "processor")
_OF_THE_MODEL += ("generation_config", "decoding")


@dataclass(frozen=True)
class Hiring:
    """Who is to do a run's units.

    Attributes:
        workers: How many.
        engine: `local`, `ray` or `slurm`.
        threads: Processors of each.
        memory_budget: GB for what each runs at once; None: two fifths of what is free.
        parameters: Of submitit's executor, such as `slurm_partition`.
    """

    workers: int
    engine: str = "local"
    threads: int = 1
    memory_budget: float | None = None
    parameters: Mapping[str, Any] | None = None

    def journals(
        self, model: HookedVLM, name: str, options: Mapping[str, Any]
    ) -> Callable[[Run, str], Journal]:
        """Makes the journal of a run's stage, whose missing units a crew does.

        Args:
            model: The model of the run.
            name, options: How workers load it again, as for `load_model`.

        Raises:
            ValueError: An engine that is not installed, or more workers than GPUs.
        """
        crew = self._crew(gpus=model.cfg.device.type == "cuda")
        path = Path(name)
        source = str(path.resolve()) if path.exists() else name

        def journal(run: Run, stage: str) -> Journal:
            identity = {key: run.settings[key] for key in _OF_THE_MODEL}
            folder = run.path(f"{stage}.parts").resolve()
            order = Order(source, dict(options), identity, folder, run.id, self.threads, self.memory_budget)
            return CrewJournal(run.path(f"{stage}.journal.jsonl"), run.id, crew, order)

        return journal

    def _crew(self, gpus: bool) -> Crew:
        require_choice("engine", self.engine, ENGINES)
        package, extra = ENGINES[self.engine]
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"--engine {self.engine} needs {package}: pip install 'hones-lens[{extra}]'")
        if self.engine == "ray":
            from hones_lens.app.workers.on_ray import RayCrew

            return RayCrew(self.workers, gpus, self.threads)
        from hones_lens.app.workers.submitted import SubmittedCrew, require_slurm

        if self.engine == "slurm":
            require_slurm()
        elif gpus and self.workers > torch.cuda.device_count():
            raise ValueError(f"{self.workers} workers, but {torch.cuda.device_count()} GPUs on this machine")
        return SubmittedCrew(self.workers, self.engine, gpus, self.threads, self.parameters)
