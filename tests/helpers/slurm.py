"""Slurm on this machine alone: one controller and one node, started for a test and stopped after it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
_SETTINGS = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmctldPort={port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def is_installed() -> bool:
    """Whether Debian's slurmctld, slurmd and munge are here, and may be started (by root alone)."""
    return os.geteuid() == 0 and all(shutil.which(program) for program in PROGRAMS)


@contextmanager
def running(folder: Path) -> Iterator[None]:
    """Slurm, which commands inside find by SLURM_CONF."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    ports = {name: _free_port() for name in ("port", "node_port")}
    settings = folder / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    settings.write_text(_SETTINGS.format(host=host, folder=folder, **ports))
    munge = {"key-file": key, "socket": folder / "munge.socket", "log-file": folder / "munge.log"}
    munge |= {"pid-file": folder / "munge.pid", "seed-file": folder / "munge.seed"}
    commands = [
        ["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in munge.items())],
        ["slurmctld", "-D", "-f", str(settings)],
        ["slurmd", "-D", "-f", str(settings), "-N", host],
    ]
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(settings)
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            with open(folder / f"{command[0]}.out", "wb") as out:
                started.append(subprocess.Popen(command, stdout=out, stderr=out))
            time.sleep(1)
        _wait_until_idle(folder)
        yield
    finally:
        _wait_until_empty()
        for process in reversed(started):
            process.terminate()
            process.wait(20)
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _wait_until_empty() -> None:
    """Let jobs end: what is stopped before them leaves them behind."""
    queue = ["squeue", "--noheader", "--format=%i"]
    for attempt in range(60):
        jobs = subprocess.run(queue, capture_output=True, text=True).stdout.split()
        if not jobs:
            return
        if attempt == 30:
            subprocess.run(["scancel", *jobs], capture_output=True)
        time.sleep(0.5)


def _wait_until_idle(folder: Path) -> None:
    for _ in range(60):
        told = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True)
        if told.stdout.strip() == "idle":
            return
        time.sleep(0.5)
    raise RuntimeError(f"Slurm does not start; its logs are in {folder}")
