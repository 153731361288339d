"""`svend bench recipes`: its options, and what it prints and writes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from svend.errors import UserError
from svend.pipeline.config import (
    DataConfig,
    ModelScale,
    MomentPrecision,
    WeightPrecision,
    get_model_config,
)

NAMES = tuple(f"{w.value}-{m.value}" for w in WeightPrecision for m in MomentPrecision)
BASELINE = NAMES[0]
EXAMPLES = """\
a recipe is named by the precision of its weights and of its moments; fp32-fp32 is always there.

examples:
  python -m svend bench recipes --json recipes.json
  python -m svend bench recipes --recipes bf16-bf16 bf16-int8 --data book.txt --seeds 3
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench recipes`."""
    parser.add_argument("--scale", default="tiny", metavar="NAME", help="(default: tiny)")
    parser.add_argument("--recipes", nargs="+", default=list(NAMES), metavar="NAME",
                        help=f"of {' '.join(NAMES)} (default: all)")
    parser.add_argument("--data", metavar="PATH",
                        help="text or JSON Lines with a field text (default: embedded problems)")
    parser.add_argument("--seeds", type=int, default=2, help="of each (default: 2)")
    parser.add_argument("--steps", type=int, default=100, help="of each run (default: 100)")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a step (default: 4)")
    parser.add_argument("--length", type=int, default=128, help="of a sequence (default: 128)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="(default: 1e-3)")
    parser.add_argument("--eager", action="store_true",
                        help="do not compile the steps of int8 and int4")
    parser.add_argument("--cache-dir", default=DataConfig().cache_dir, metavar="PATH",
                        help="of tokenised data (default: %(default)s)")
    parser.add_argument("--json", metavar="PATH",
                        help="write every result there as it comes; what is there is not run again")
    parser.add_argument("--plot", metavar="PATH", help="draw them there, as .png or .svg")


def run(options: argparse.Namespace) -> int:
    """Train by each recipe beside AdamW in fp32; print what it costs in loss."""
    scales = [scale.value for scale in ModelScale]
    if options.scale not in scales:
        raise UserError(f"--scale {options.scale}: known: {', '.join(scales)}")
    unknown = [name for name in options.recipes if name not in NAMES]
    if unknown:
        raise UserError(f"--recipes {unknown[0]}: known: {', '.join(NAMES)}")
    for name, least in (("seeds", 1), ("steps", 1), ("batch", 1), ("length", 8)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} must be at least {least}")
    if not options.learning_rate > 0:
        raise UserError("--learning-rate must be above 0")
    from rich.console import Console

    from svend.bench import recipes
    from svend.data.corpus import build_corpus

    def report(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    model = get_model_config(ModelScale(options.scale))
    data = Path(options.data).expanduser() if options.data else None
    config = recipes.data_config(data, options.length, options.cache_dir)
    corpus = build_corpus(config, model.vocab_size, 0, report)
    setting = recipes.Setting(
        options.scale, model.hidden_size, model.num_hidden_layers, model.vocab_size, options.steps,
        options.batch, options.length, options.learning_rate, corpus.fingerprint,
    )
    names = [BASELINE, *(name for name in options.recipes if name != BASELINE)]
    results = recipes.run_experiment(
        setting, model, config, corpus, names, options.seeds,
        Path(options.json) if options.json else None, report, compiled=not options.eager,
    )
    Console(width=None if sys.stdout.isatty() else 140).print(
        recipes.recipe_table(setting, results)
    )
    if options.plot:
        recipes.plot_recipes(results, Path(options.plot))
    return 0
