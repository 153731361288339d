"""`svend bench generate`: decoding, beside Hugging Face's."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from svend.bench.options import (
    add_json,
    add_number,
    add_plot,
    add_scale,
    check_least,
    finish,
    scale_named,
)
from svend.command import Call, Command, complete, tell, tell_loading
from svend.errors import UserError

PEERS = ("hf bf16", "hf fp32")


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_scale(parser, "the model, with weights drawn at random")
    parser.add_argument("--model", metavar="URI",
                        help="a version of the registry instead, on whose held-out text the loss "
                             "of accuracy by int8 is measured")
    add_number(parser, "--prompts", 256, "ragged ones")
    add_number(parser, "--rounds", 3, "turns of each")
    complete(parser.add_argument("--peers", nargs="+", default=list(PEERS), metavar="NAME",
                                 help="of 'hf bf16' 'hf fp32' (default: both)"), PEERS)
    add_json(parser)
    add_plot(parser)


def _run(call: Call) -> int:
    options = call.options
    check_least(options, 1, "prompts", "rounds")
    unknown = [name for name in options.peers if name not in PEERS]
    if unknown:
        raise UserError(f"bench: unknown peer '{unknown[0]}'; known: 'hf bf16' and 'hf fp32'")
    if importlib.util.find_spec("transformers") is None:
        raise UserError("bench: transformers is not installed; pip install -e '.[bench]'")
    scale = scale_named(options.scale)
    tell_loading("torch and transformers")
    from svend.bench.generate import (
        compare,
        comparison_table,
        describe_quantization,
        load_model,
        make_workloads,
        plot_comparisons,
        to_json,
    )
    from svend.pipeline.console import make_console

    console = make_console()
    model, texts = load_model(scale, options.model, tell)
    console.print(describe_quantization(model, texts))
    tell(f"timing {options.prompts} prompts, {options.rounds} turns each, beside "
         f"{', '.join(options.peers)}")
    workloads = make_workloads(model.config.vocab_size, options.prompts)
    comparisons = compare(model, workloads, options.peers, options.rounds, tell)
    for comparison in comparisons:
        console.print(comparison_table(comparison))
    if options.json:
        Path(options.json).write_text(to_json(comparisons) + "\n", encoding="utf-8")
    if options.plot:
        plot_comparisons(comparisons, Path(options.plot))
    finish(call, "generate")
    return 0


GENERATE = Command(
    name="generate",
    summary="decoding, beside Hugging Face's generate",
    description="Time decoding beside Hugging Face's generate with the same weights.",
    makes="a table for each workload, and what --json and --plot name",
    examples=(
        "svend bench generate --prompts 16 --rounds 1 --peers 'hf fp32'",
        "svend bench generate --model models:/svend-tiny-50m@standard --json generate.json",
    ),
    add_options=_add_options,
    run=_run,
)
