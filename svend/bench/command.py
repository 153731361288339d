"""`svend bench`: the benchmarks, and the report on a GPU."""

from __future__ import annotations

from svend.bench import (
    data_command,
    faults_command,
    generate_command,
    gpu_report_command,
    memory_command,
    recipes_command,
    scaling_command,
    serve_command,
    train_command,
    transfer_command,
)
from svend.command import Command

BENCH = Command(
    name="bench",
    summary="time training and tokenising beside their peers; report on a GPU",
    description="Benchmarks, beside what one would use instead; `svend bench KIND --help` lists "
    "what a kind takes. With --gpu-report none of them, but a report on a CUDA device: the card, "
    "attention, compilation, the loss kernel, losses against the CPU's, save and resume, "
    "low-memory optimizers, float8, and memory and speed of each scale that fits. Its exit code is "
    "1 if a figure is outside its bounds or a part failed; docs/gpu.md says what it measures.",
    makes="tables; the report makes report.md and report.json",
    examples=(
        "svend bench train --shapes 2x512 --rounds 1",
        "svend bench --gpu-report",
        "svend bench --gpu-report --rehearse",
    ),
    add_options=gpu_report_command.add_options,
    check=gpu_report_command.check_kind,
    run=gpu_report_command.run,
    kinds=(
        train_command.TRAIN, scaling_command.SCALING, data_command.DATA,
        generate_command.GENERATE, memory_command.MEMORY, serve_command.SERVE,
        transfer_command.TRANSFER, recipes_command.RECIPES, faults_command.FAULTS,
    ),
)
