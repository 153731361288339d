"""A profile of a few training steps: torch's trace, and the parts that cost the most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from svend import cuda
from svend.training.loop import StepMetrics

# Before these, caches fill and compilers work.
SKIPPED_STEPS = 5
PROFILED_STEPS = 3
LISTED_PARTS = 10
TRACE, PARTS = "trace.json.gz", "parts.txt"


def name_compiled_kernels() -> None:
    """Have what is compiled from now on show under the names of its operations."""
    from torch._inductor import config as inductor  # takes a second: only where it is asked for

    config: Any = inductor
    config.cpp.enable_kernel_profile = True


def profiled_steps(
    steps: Iterator[StepMetrics], remaining_steps: int, folder: Path, report: Callable[[str], None]
) -> Iterator[StepMetrics]:
    """Yield the steps; profile some of them, write trace and table, and report the table.

    What the consumer does between the profiled steps is in the profile too. A run of few steps is
    profiled at its end.
    """
    skipped = max(0, min(SKIPPED_STEPS, remaining_steps - PROFILED_STEPS))
    for _ in range(skipped):
        yield next(steps)
    activities = [ProfilerActivity.CPU]
    if cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    count = min(PROFILED_STEPS, remaining_steps)
    with profile(activities=activities) as profiler:
        for _ in range(count):
            yield next(steps)
    folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(folder / TRACE))
    table = _most_expensive(profiler, count)
    (folder / PARTS).write_text(table + "\n", encoding="utf-8")
    report(table)
    yield from steps


def _most_expensive(profiler: profile, steps: int) -> str:
    """Return a table of parts by the time spent in them and in nothing that they call.

    On the GPU, where that was at work; one may be there and the run on the CPU.
    """
    averages = profiler.key_averages()
    on_cuda = any(event.self_device_time_total > 0 for event in averages)
    parts = [
        (event.self_device_time_total if on_cuda else event.self_cpu_time_total, event)
        for event in averages
    ]
    total = sum(microseconds for microseconds, _ in parts) or 1.0
    parts.sort(key=lambda part: -part[0])
    place = "CUDA" if on_cuda else "CPU"
    lines = [f"{'ms a step':>10} {'share':>6} {'calls':>7}  part ({place}, its own time)"]
    lines += [
        f"{microseconds / 1e3 / steps:10.2f} {microseconds / total:6.1%} "
        f"{event.count / steps:7.0f}  {event.key[:60]}"
        for microseconds, event in parts[:LISTED_PARTS]
    ]
    return "\n".join(lines)
