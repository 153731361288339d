"""Which of the processes of a run this one is, as torchrun or Slurm say."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from svend.errors import ConfigError, one_line

# What Slurm sets for the tasks of a step.
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
FIRST_PORT, PORTS = 20_000, 10_000


@dataclass(frozen=True)
class Place:
    """Process `rank` of `size`, which is number `local_rank` of `local_size` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process decides, and alone talks to tracking store, folders and people."""
        return self.rank == 0


def find_place(environment: Mapping[str, str] = os.environ) -> Place:
    """Return the place that the environment gives this process; alone where it gives none.

    A batch script of Slurm is no task of a step: there, `srun` makes the tasks.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE")
        local_rank = _number(environment, "LOCAL_RANK", rank)
        return _checked(Place(rank, size, local_rank,
                              _number(environment, "LOCAL_WORLD_SIZE", size)))
    if _number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        rank, size, local_rank = (_number(environment, name) for name in SLURM[:3])
        node = _number(environment, "SLURM_NODEID", 0)
        counts = _tasks_per_node(environment)
        if not 0 <= node < len(counts):
            raise ConfigError(
                f"SLURM_NODEID = {node}: SLURM_STEP_TASKS_PER_NODE tells of {len(counts)} "
                "machines; start the processes by srun"
            )
        return _checked(Place(rank, size, local_rank, counts[node]))
    return Place()


def require_alone(what: str) -> None:
    """Raise ConfigError where this process is one of several."""
    size = find_place().size
    if size > 1:
        raise ConfigError(f"{what}, and this is one of {size}; start it without torchrun or srun")


def set_rendezvous(environment: MutableMapping[str, str] = os.environ) -> None:
    """Say where the processes of a Slurm step meet, where nobody has said so.

    That is the first machine of the step, at a port that the job's number gives.
    """
    if "MASTER_ADDR" not in environment:
        nodes = environment.get("SLURM_STEP_NODELIST")
        if nodes is None:
            raise ConfigError(
                "MASTER_ADDR is not set: start the processes by torchrun or srun, or set "
                "MASTER_ADDR and MASTER_PORT to where the first of them can be reached"
            )
        environment["MASTER_ADDR"] = _first_machine(nodes)
    job = _number(environment, "SLURM_JOB_ID", 0) + _number(environment, "SLURM_STEP_ID", 0)
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + job % PORTS))


def _first_machine(nodes: str) -> str:
    """Return the first of a list of machines in Slurm's form, `node[01-04]`."""
    try:
        told = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True
        )
        return told.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise ConfigError(
            f"SLURM_STEP_NODELIST = {nodes}: scontrol does not tell its machines "
            f"({one_line(error)[:160]}); set MASTER_ADDR to the first of them"
        ) from None


def _tasks_per_node(environment: Mapping[str, str]) -> list[int]:
    """Return how many tasks each machine has, of Slurm's form `4(x2),2`."""
    told = environment.get("SLURM_STEP_TASKS_PER_NODE", "1")
    counts: list[int] = []
    for part in told.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ConfigError(
                f"SLURM_STEP_TASKS_PER_NODE = '{told}': must be in Slurm's form, such as 4(x2),2"
            )
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"{name} = '{text}': must be a whole number; torchrun and srun set it"
        ) from None


def _checked(place: Place) -> Place:
    if not (0 <= place.rank < place.size and 0 <= place.local_rank < place.local_size):
        raise ConfigError(
            f"RANK = {place.rank}, WORLD_SIZE = {place.size}, LOCAL_RANK = {place.local_rank}, "
            f"LOCAL_WORLD_SIZE = {place.local_size}: a rank must lie below its size"
        )
    return place
