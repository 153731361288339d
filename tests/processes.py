"""Processes that run one function together, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from svend.ranks import find_place
from svend.training.parallel import Ranks, join_ranks, leave_ranks
from tests.servers import free_port

P = ParamSpec("P")
T = TypeVar("T")
# Imported once, in the process that all are forked from.
PRELOADED = ["torch.distributed.tensor", "torch.distributed.fsdp", "tests.test_training"]
PATIENCE_SECONDS = 300


def run_together(
    function: Callable[Concatenate[Ranks, P], T], size: int, *args: P.args, **kwargs: P.kwargs
) -> list[T]:
    """Return what each of `size` processes got of a function of a module, by rank.

    None for one that was killed.
    """
    return started_by("torchrun", function, size, *args, **kwargs)


def started_by(
    starter: str, function: Callable[Concatenate[Ranks, P], T], size: int, *args: P.args,
    **kwargs: P.kwargs,
) -> list[T]:
    """Do the same in processes that were told their places by `torchrun` or `slurm`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port = free_port()
    ends, processes = [], []
    for rank in range(size):
        here, there = context.Pipe()
        process = context.Process(
            target=_take_part, args=(there, rank, size, port, starter, function, args, kwargs)
        )
        process.start()
        there.close()
        ends.append(here)
        processes.append(process)
    results: list[Any] = []
    failures = []
    for rank, end in enumerate(ends):
        assert end.poll(PATIENCE_SECONDS), f"rank {rank} does not answer"
        try:
            succeeded, result = pickle.loads(end.recv_bytes())
        except EOFError:
            succeeded, result = True, None  # killed, as a test may want
        results.append(result)
        if not succeeded:
            failures.append(f"rank {rank}: {result}")
    for process in processes:
        process.join(PATIENCE_SECONDS)
    assert not failures, "\n".join(failures)
    return results


def _of_torchrun(rank: int, size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }


def _of_slurm(rank: int, size: int, port: int) -> dict[str, str]:
    return {
        "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(size), "SLURM_LOCALID": str(rank),
        "SLURM_STEP_TASKS_PER_NODE": str(size), "SLURM_NODEID": "0", "SLURM_JOB_ID": str(port),
        "SLURM_STEP_ID": "0", "MASTER_ADDR": "127.0.0.1",
    }


STARTERS = {"torchrun": _of_torchrun, "slurm": _of_slurm}


def _take_part(
    end: Connection, rank: int, size: int, port: int, starter: str, function: Callable[..., Any],
    args: tuple[Any, ...], kwargs: dict[str, Any],
) -> None:
    os.environ.update(STARTERS[starter](rank, size, port))
    torch.set_num_threads(1)
    try:
        ranks = join_ranks(find_place(), torch.device("cpu"), PATIENCE_SECONDS / 2)
        # By value: shared memory would be gone with this process.
        end.send_bytes(pickle.dumps((True, function(ranks, *args, **kwargs))))
    except BaseException:  # noqa: BLE001 - told to the test, whatever it is
        end.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        leave_ranks()
