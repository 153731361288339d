"""`svend bench train`: the training step beside the peers'."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from svend.bench.options import (
    SCALES,
    add_json,
    add_number,
    add_plot,
    check_least,
    finish,
    scale_named,
)
from svend.command import Call, Command, complete, tell
from svend.errors import UserError
from svend.pipeline.config import DataConfig, ModelConfig, get_model_config

PEERS = ("svend-eager", "hf-stock", "hf-compiled", "hf-master", "litgpt")


def _add_options(parser: argparse.ArgumentParser) -> None:
    complete(parser.add_argument("--scales", nargs="+", default=["tiny"], metavar="NAME",
                                 help="scales to time (default: tiny)"), SCALES)
    parser.add_argument("--shapes", nargs="+", default=["2x512", "8x512", "2x2048"],
                        metavar="BxT", help="sequences x tokens (default: 2x512 8x512 2x2048)")
    complete(parser.add_argument(
        "--peers", nargs="+", default=None, metavar="NAME",
        help=f"of {', '.join(PEERS)} (default: those that are installed)",
    ), PEERS)
    parser.add_argument("--documents", metavar="PATH",
                        help="GSM8K's records: packed by us, padded by the peers")
    parser.add_argument("--litgpt-python", metavar="PATH", help="the Python that has litgpt")
    add_number(parser, "--rounds", 5, "turns of each")
    add_number(parser, "--steps", 3, "steps in a turn")
    add_json(parser)
    add_plot(parser)


def _run(call: Call) -> int:
    options = call.options
    shapes = [_shape(text) for text in options.shapes]
    models = [(name, get_model_config(scale_named(name))) for name in options.scales]
    check_least(options, 1, "rounds", "steps")
    contestants = ["svend", *_peers(options)]
    tell(f"timing {', '.join(contestants)}: {options.rounds} turns of {options.steps} steps at "
         f"{' '.join(options.shapes)}")
    from svend.bench.report import comparison_table, plot_comparisons
    from svend.bench.train import compare, make_spec, to_json
    from svend.pipeline.console import make_console

    console, comparisons = make_console(), []
    with _documents(options.documents, models[0][1]) as documents:
        for name, model in models:
            for batch_size, length in shapes:
                comparisons.append(compare(
                    name, model, make_spec(model, batch_size, length, documents), contestants,
                    options.litgpt_python or sys.executable, options.rounds, options.steps,
                    tell,
                ))
                console.print(comparison_table(comparisons[-1]))
    if options.json:
        Path(options.json).write_text(to_json(comparisons) + "\n", encoding="utf-8")
    if options.plot:
        plot_comparisons(comparisons, Path(options.plot))
    finish(call, "train")
    return 0


@contextlib.contextmanager
def _documents(path: str | None, model: ModelConfig) -> Iterator[str | None]:
    if path is None:
        yield None
        return
    from svend.bench.train import tokenized_documents

    data = DataConfig(sources=["gsm8k"], mix_ratios={"reasoning": 1.0}, path=path, num_samples=1)
    with tokenized_documents(data, model.vocab_size, lambda _: None) as file:
        yield file


def _peers(options: argparse.Namespace) -> list[str]:
    unknown = [name for name in options.peers or () if name not in PEERS]
    if unknown:
        raise UserError(f"bench: unknown peer '{unknown[0]}'; known: {', '.join(PEERS)}")
    missing = [] if importlib.util.find_spec("transformers") else ["hf"]
    if options.litgpt_python is None and importlib.util.find_spec("litgpt") is None:
        missing.append("litgpt")
    wanted = options.peers or PEERS
    left_out = [name for name in wanted if name.split("-")[0] in missing]
    if left_out and options.peers:
        raise UserError(f"bench: {left_out[0]} is not installed; see svend bench train --help")
    if left_out:
        tell(f"left out, not installed: {', '.join(left_out)}; see svend bench train --help")
    return [name for name in wanted if name not in left_out]


def _shape(text: str) -> tuple[int, int]:
    batch_size, _, length = text.partition("x")
    if not (batch_size.isdigit() and length.isdigit() and int(batch_size) and int(length) > 1):
        raise UserError(f"bench: --shapes {text}: must be such as 8x512")
    return int(batch_size), int(length)


TRAIN = Command(
    name="train",
    summary="the training step",
    description="Time the training step on the same model, tokens and precision as the peers', in "
    "turn.",
    makes="a table for each shape, and what --json and --plot name",
    notes="""\
the peers: pip install -e '.[bench]' for Hugging Face; litgpt in an environment of its own:
  python -m venv .litgpt && .litgpt/bin/pip install torch==2.13.0 litgpt==0.5.13 psutil
  svend bench train --litgpt-python .litgpt/bin/python
""",
    examples=(
        "svend bench train --shapes 2x512 --peers svend-eager --rounds 1",
        "svend bench train --shapes 8x512 --peers hf-stock hf-compiled",
        "svend bench train --documents ../gsm8k/train.jsonl --shapes 4x1024",
    ),
    add_options=_add_options,
    run=_run,
)
