"""`svend bench train`: its options, and what it prints and writes."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from svend.errors import ConfigError, UserError
from svend.pipeline.config import DataConfig, ModelConfig, ModelScale, get_model_config

PEERS = ("svend-eager", "hf-stock", "hf-compiled", "hf-master", "litgpt")
EXAMPLES = """\
svend is timed against the peers on the same model, tokens and precision, in turn.

examples:
  python -m svend bench train
  python -m svend bench train --shapes 8x512 --peers hf-stock hf-compiled
  python -m svend bench train --documents ../gsm8k/train.jsonl --shapes 4x1024

the peers: pip install -e '.[bench]' for Hugging Face; litgpt in an environment of its own:
  python -m venv .litgpt && .litgpt/bin/pip install torch==2.13.0 litgpt==0.5.13 psutil
  python -m svend bench train --litgpt-python .litgpt/bin/python
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench train`."""
    parser.add_argument("--scales", nargs="+", default=["tiny"], metavar="NAME",
                        help="scales to time (default: tiny)")
    parser.add_argument("--shapes", nargs="+", default=["2x512", "8x512", "2x2048"],
                        metavar="BxT", help="sequences x tokens (default: 2x512 8x512 2x2048)")
    parser.add_argument("--peers", nargs="+", default=None, metavar="NAME",
                        help=f"of {', '.join(PEERS)} (default: those that are installed)")
    parser.add_argument("--documents", metavar="PATH",
                        help="GSM8K's records: packed by us, padded by the peers")
    parser.add_argument("--litgpt-python", metavar="PATH", help="the Python that has litgpt")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default: 5)")
    parser.add_argument("--steps", type=int, default=3, help="steps in a turn (default: 3)")
    parser.add_argument("--json", metavar="PATH", help="write all figures there")
    parser.add_argument("--plot", metavar="PATH", help="draw them there, as .png or .svg")


def add_scaling_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench scaling`."""
    parser.add_argument("--scale", default="tiny", metavar="NAME",
                        help="the model that is varied (default: tiny)")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--json", metavar="PATH", help="write all figures there")
    parser.add_argument("--plot", metavar="PATH", help="draw them there, as .png or .svg")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench data`."""
    parser.add_argument("--megabytes", type=int, default=200, help="of input (default: 200)")
    parser.add_argument("--processes", type=int, default=2, help="that tokenise (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: 3)")
    parser.add_argument("--alone", action="store_true", help="without datasets.map")
    parser.add_argument("--json", metavar="PATH", help="write all figures there")


def add_generate_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench generate`."""
    parser.add_argument("--scale", default="tiny", metavar="NAME",
                        help="the model, with weights drawn at random (default: tiny)")
    parser.add_argument("--model", metavar="URI",
                        help="a version of the registry instead, on whose held-out text the loss "
                             "of accuracy by int8 is measured")
    parser.add_argument("--prompts", type=int, default=256, help="ragged ones (default: 256)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: 3)")
    parser.add_argument("--peers", nargs="+", default=["hf bf16", "hf fp32"], metavar="NAME",
                        help="of 'hf bf16' 'hf fp32' (default: both)")
    parser.add_argument("--json", metavar="PATH", help="write all figures there")
    parser.add_argument("--plot", metavar="PATH", help="draw them there, as .png or .svg")


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench memory`."""
    parser.add_argument("--fake", action="store_true",
                        help="all scales with their own settings, on tensors without storage")
    parser.add_argument("--scales", nargs="+", default=None, metavar="NAME",
                        help="of --fake (default: all seven)")


def run_memory(options: argparse.Namespace) -> int:
    """Print predicted beside real peak memory.

    Returns 1 where a prediction is off by more than 10%, or a run holds more than its plan says.
    """
    if options.scales and not options.fake:
        raise UserError("bench memory: --scales is for --fake")
    scales = [_scale(name) for name in options.scales or [scale.value for scale in ModelScale]]
    from rich.console import Console

    from svend.bench.memory_check import MemoryCheck, judge, memory_table

    def report(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    checks: list[MemoryCheck] = []
    in_runs: list[MemoryCheck] = []
    if options.fake:
        from svend.bench.fake_memory import check_scale

        for scale in scales:
            report(scale.value)
            checks.append(check_scale(scale))
        title, real = "Peak memory, predicted and tracked on fake tensors", "tracked"
    else:
        from svend.bench.memory import measure_peaks

        for check, in_run in measure_peaks(report):
            checks.append(check)
            in_runs.append(in_run)
        title, real = "Peak memory, predicted and measured on CPU", "measured"
    Console(width=132).print(memory_table(title, real, checks, in_runs))
    passed, told = judge(checks, in_runs)
    print(told)
    return 0 if passed else 1


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench serve`."""
    parser.add_argument("--model", metavar="URI", help="left out: random weights at the scale")
    parser.add_argument("--scale", default="tiny", metavar="NAME", help="(tiny)")
    parser.add_argument("--clients", type=int, default=32, metavar="N", help="at once (32)")
    parser.add_argument("--requests", type=int, default=4, metavar="N", help="of each (4)")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="an answer (64)")
    parser.add_argument("--lanes", type=int, default=16, metavar="N", help="of the server (16)")


def run_serve(options: argparse.Namespace) -> int:
    """Drive a server with many clients, and print what they waited for."""
    for name in ("clients", "requests", "max_tokens", "lanes"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name.replace('_', '-')} = {getattr(options, name)}: must be 1 or "
                              "more")
    if options.scale not in [scale.value for scale in ModelScale]:
        raise ConfigError(f"scale = {options.scale}: must be one of "
                          f"{', '.join(scale.value for scale in ModelScale)}")
    print("starting: loading torch and mlflow", flush=True)
    from svend.bench.serve import drive, load_served, result_table
    from svend.pipeline.report import make_console

    served = load_served(options.model, ModelScale(options.scale))
    answers, seconds = drive(
        served, clients=options.clients, requests=options.requests,
        max_tokens=options.max_tokens, lanes=options.lanes,
    )
    make_console().print(result_table(
        served, answers, seconds, clients=options.clients, lanes=options.lanes
    ))
    return 0 if all(answer.status == "200" for answer in answers) else 1


def run_generate(options: argparse.Namespace) -> int:
    """Time decoding beside Hugging Face's; print a table for each workload."""
    if min(options.prompts, options.rounds) < 1:
        raise UserError("bench: --prompts and --rounds must be at least 1")
    unknown = [name for name in options.peers if name not in ("hf bf16", "hf fp32")]
    if unknown:
        raise UserError(f"bench: unknown peer '{unknown[0]}'; known: 'hf bf16' and 'hf fp32'")
    if importlib.util.find_spec("transformers") is None:
        raise UserError("bench: transformers is not installed; pip install -e '.[bench]'")
    scale = _scale(options.scale)
    from rich.console import Console

    from svend.bench.generate import (
        compare,
        comparison_table,
        describe_quantization,
        load_model,
        make_workloads,
        plot_comparisons,
        to_json,
    )

    def report(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    console = Console()
    model, texts = load_model(scale, options.model, report)
    console.print(describe_quantization(model, texts))
    workloads = make_workloads(model.config.vocab_size, options.prompts)
    comparisons = compare(model, workloads, options.peers, options.rounds, report)
    for comparison in comparisons:
        console.print(comparison_table(comparison))
    if options.json:
        Path(options.json).write_text(to_json(comparisons) + "\n", encoding="utf-8")
    if options.plot:
        plot_comparisons(comparisons, Path(options.plot))
    return 0


def run_data(options: argparse.Namespace) -> int:
    """Time tokenising beside `datasets.map`; print a table."""
    if min(options.megabytes, options.processes, options.rounds) < 1:
        raise UserError("bench: --megabytes, --processes and --rounds must be at least 1")
    from rich.console import Console

    from svend.bench.data import CONTESTANTS, measure_tokenising, to_json, tokenising_table

    size, turns = measure_tokenising(
        options.megabytes, options.processes, options.rounds,
        ["svend"] if options.alone else list(CONTESTANTS),
        lambda text: print(text, file=sys.stderr, flush=True),
    )
    Console().print(tokenising_table(size, options.processes, turns))
    if options.json:
        figures = to_json(size, options.processes, turns)
        Path(options.json).write_text(figures + "\n", encoding="utf-8")
    return 0


def run_scaling(options: argparse.Namespace) -> int:
    """Time our own step at many sizes; print a table."""
    model = get_model_config(_scale(options.scale))
    from rich.console import Console

    from svend.bench.scaling import measure_scaling, plot_scaling, scaling_table, to_json

    points = measure_scaling(
        model, not options.eager, lambda text: print(text, file=sys.stderr, flush=True)
    )
    Console().print(scaling_table(points))
    if options.json:
        Path(options.json).write_text(to_json(points) + "\n", encoding="utf-8")
    if options.plot:
        plot_scaling(points, Path(options.plot))
    return 0


def run(options: argparse.Namespace) -> int:
    """Time what is asked for; print a table for each shape."""
    shapes = [_shape(text) for text in options.shapes]
    models = [(name, get_model_config(_scale(name))) for name in options.scales]
    if options.rounds < 1 or options.steps < 1:
        raise UserError("bench: --rounds and --steps must be at least 1")
    contestants = ["svend", *_peers(options)]
    from rich.console import Console

    from svend.bench.report import comparison_table, plot_comparisons
    from svend.bench.train import compare, make_spec, to_json

    console, comparisons = Console(), []
    with _documents(options.documents, models[0][1]) as documents:
        for name, model in models:
            for batch_size, length in shapes:
                comparisons.append(compare(
                    name, model, make_spec(model, batch_size, length, documents), contestants,
                    options.litgpt_python or sys.executable, options.rounds, options.steps,
                    lambda text: print(text, file=sys.stderr, flush=True),
                ))
                console.print(comparison_table(comparisons[-1]))
    if options.json:
        Path(options.json).write_text(to_json(comparisons) + "\n", encoding="utf-8")
    if options.plot:
        plot_comparisons(comparisons, Path(options.plot))
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
        print(f"left out, not installed: {', '.join(left_out)}; see svend bench train --help")
    return [name for name in wanted if name not in left_out]


def _scale(name: str) -> ModelScale:
    known = [scale.value for scale in ModelScale]
    if name not in known:
        raise UserError(f"bench: unknown scale '{name}'; known: {', '.join(known)}")
    return ModelScale(name)


def _shape(text: str) -> tuple[int, int]:
    batch_size, _, length = text.partition("x")
    if not (batch_size.isdigit() and length.isdigit() and int(batch_size) and int(length) > 1):
        raise UserError(f"bench: --shapes {text}: must be such as 8x512")
    return int(batch_size), int(length)
