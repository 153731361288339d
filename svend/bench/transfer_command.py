"""`svend bench transfer`: whether the best learning rate transfers to other sizes."""

from __future__ import annotations

import argparse
from pathlib import Path

from svend.bench.options import (
    OPTIMIZERS,
    PARAMETRISATIONS,
    RESULTS_HELP,
    add_json,
    add_number,
    add_optimizer,
    add_plot,
    check_least,
    check_names,
    check_widths,
    finish,
)
from svend.command import Call, Command, complete, tell, tell_loading
from svend.errors import UserError
from svend.pipeline.config import Device, Precision

DEVICES = (Device.CPU.value, Device.CUDA.value)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, nargs="+", metavar="PATH",
                        help="text or JSON Lines of any schema, on which a tokenizer is trained")
    complete(parser.add_argument(
        "--parametrisations", nargs="+", default=list(PARAMETRISATIONS), metavar="NAME",
        help=f"of {' '.join(PARAMETRISATIONS)} (default: both)",
    ), PARAMETRISATIONS)
    add_optimizer(parser)
    parser.add_argument("--widths", nargs="+", type=int, default=[64, 128, 256], metavar="N",
                        help="multiples of --head-size (default: 64 128 256)")
    parser.add_argument("--depths", nargs="+", type=int, default=[2, 8], metavar="N",
                        help="layers (default: 2 8)")
    add_number(parser, "--head-size", 32, "of every model")
    add_number(parser, "--init-std", 0.02, "of the initial weights, completep's at its base")
    add_number(parser, "--lowest", 5e-4, "the lowest learning rate")
    add_number(parser, "--rates", 6, "how many")
    add_number(parser, "--factor", 2.0, "between them")
    add_number(parser, "--seeds", 3, "of each")
    add_number(parser, "--steps", 160, "of each run")
    add_number(parser, "--batch", 8, "sequences in a step")
    add_number(parser, "--length", 64, "of a sequence")
    add_number(parser, "--vocabulary", 1024, "entries")
    add_number(parser, "--processes", 1,
               "runs at once, of one thread each; on one GPU they wait for one another")
    complete(parser.add_argument(
        "--device", default=Device.CPU.value, metavar="NAME",
        help="cpu, in fp32, or cuda, in what the card multiplies fast (default: cpu)",
    ), DEVICES)
    add_json(parser, RESULTS_HELP)
    add_plot(parser)


def _run(call: Call) -> int:
    """Train models of several sizes at several rates; print where each is best."""
    options = call.options
    check_names("optimizer", [options.optimizer], OPTIMIZERS)
    check_names("parametrisations", options.parametrisations, PARAMETRISATIONS)
    check_names("device", [options.device], DEVICES)
    check_least(options, 1, "depths", "seeds", "steps", "batch", "processes")
    check_least(options, 3, "rates")
    check_least(options, 8, "length", "head_size")
    check_least(options, 300, "vocabulary")
    check_widths(options.widths, options.head_size)
    if not (options.lowest > 0 and options.init_std > 0 and options.factor > 1):
        raise UserError("--lowest and --init-std must be above 0, and --factor above 1")
    tell_loading("torch")
    from svend.bench import transfer
    from svend.bench.transfer_report import (
        curves_of,
        describe_shifts,
        plot_transfer,
        shifts_of,
        transfer_table,
    )
    from svend.data.records import file_digest
    from svend.device import resolve_device, resolve_precision
    from svend.pipeline.console import make_console

    data = [Path(path).expanduser() for path in options.data]
    device = resolve_device(Device(options.device))
    # On a CPU the same everywhere, whether it multiplies in bf16 or not.
    precision = Precision.FP32 if device.type == "cpu" else Precision.AUTO
    setting = transfer.Setting(
        options.optimizer, options.widths[0], options.depths[0], options.head_size,
        options.init_std, options.vocabulary, options.batch, options.length, options.steps,
        device.type, resolve_precision(precision, device).value, "+".join(map(file_digest, data)),
    )
    cases = transfer.plan_cases(
        options.parametrisations, options.widths, options.depths,
        transfer.learning_rates(options.lowest, options.rates, options.factor), options.seeds,
    )
    tell(f"training {len(cases)} models, {options.processes} at a time, {options.steps} steps each")
    results = transfer.run_experiment(
        setting, cases, data, Path(options.json) if options.json else None, options.processes,
        tell,
    )
    curves = curves_of(results)
    console = make_console(pipe_width=180)
    console.print(transfer_table(curves))
    for line in describe_shifts(shifts_of(curves)):
        console.print(line, soft_wrap=True)
    if options.plot:
        plot_transfer(curves, Path(options.plot))
    finish(call, "transfer")
    return 0


TRANSFER = Command(
    name="transfer",
    summary="whether the best learning rate transfers to other sizes",
    description="Train models of several widths and depths at several learning rates. Widths vary "
    "at the first depth, depths at the first width; both firsts are CompleteP's base.",
    makes="a table, and what --json and --plot name",
    examples=(
        "svend bench transfer --data svend/evaluation/judge_sample.jsonl --widths 32 64 --steps 10",
        "svend bench transfer --data ../gsm8k/train.jsonl --json transfer.json",
        "svend bench transfer --data book.txt --optimizer muon --widths 64 256 --seeds 1",
        "svend bench transfer --data a.jsonl b.txt --device cuda --head-size 64 --widths 256 512",
    ),
    add_options=_add_options,
    run=_run,
)
