"""Several processes of one command on this machine, started and watched by torchrun's agent."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from svend.errors import ConfigError
from svend.pipeline.interruption import EXIT_INTERRUPTED

# How often the agent looks whether a process has died, and how long those that are told to end may
# take beyond the grace time in which the first saves.
MONITOR_SECONDS = 0.2
BEYOND_GRACE_SECONDS = 10


def read_processes(text: str) -> int:
    """Return how many processes are asked for. Raises ConfigError for what is no such number."""
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"nproc = {text}: must be a whole number of at least 1")
    return int(text)


def launch(processes: int, arguments: Sequence[str], grace_seconds: float) -> int:
    """Run `python -m svend` with these arguments in so many processes; return the exit code.

    It is the first one's. Where another process dies, the agent ends them all, and the line that
    is printed names it.
    """
    print(f"starting: {processes} processes", flush=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (cores or 1) // processes)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What it would say over many lines, the processes and this function say in one.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=uuid.uuid4().hex,
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
        monitor_interval=MONITOR_SECONDS,
        shutdown_timeout=round(grace_seconds) + BEYOND_GRACE_SECONDS,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "svend", *arguments)
    except SignalException:
        return EXIT_INTERRUPTED  # the first process has said what became of the run
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"error: rank {rank} (process {failure.pid}) was ended by {name}, and the others "
                  "with it; resume=true goes on from what is saved", file=sys.stderr, flush=True)
            return 1
        if rank > 0:
            print(f"error: rank {rank} (process {failure.pid}) ended with exit code "
                  f"{failure.exitcode}, and the others with it", file=sys.stderr, flush=True)
        return int(failure.exitcode)
    return 0
