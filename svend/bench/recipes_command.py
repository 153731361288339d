"""`svend bench recipes`: its options, and what it prints and writes."""

from __future__ import annotations

import argparse
from pathlib import Path

from svend.bench.options import (
    RESULTS_HELP,
    SCALES,
    add_json,
    add_number,
    add_plot,
    add_scale,
    check_least,
    check_names,
    finish,
)
from svend.command import Call, Command, complete, tell, tell_loading
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


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_scale(parser, "the model")
    complete(parser.add_argument("--recipes", nargs="+", default=list(NAMES), metavar="NAME",
                                 help=f"of {' '.join(NAMES)} (default: all)"), NAMES)
    parser.add_argument("--data", metavar="PATH",
                        help="text or JSON Lines with a field text (default: embedded problems)")
    add_number(parser, "--seeds", 2, "of each")
    add_number(parser, "--steps", 100, "of each run")
    add_number(parser, "--batch", 4, "sequences in a step")
    add_number(parser, "--length", 128, "of a sequence")
    add_number(parser, "--learning-rate", 1e-3, "of every recipe")
    parser.add_argument("--eager", action="store_true",
                        help="do not compile the steps of int8 and int4")
    parser.add_argument("--cache-dir", default=DataConfig().cache_dir, metavar="PATH",
                        help="of tokenised data (default: %(default)s)")
    add_json(parser, RESULTS_HELP)
    add_plot(parser)


def _run(call: Call) -> int:
    """Train by each recipe beside AdamW in fp32; print what it costs in loss."""
    options = call.options
    check_names("scale", [options.scale], SCALES)
    check_names("recipes", options.recipes, NAMES)
    check_least(options, 1, "seeds", "steps", "batch")
    check_least(options, 8, "length")
    if not options.learning_rate > 0:
        raise UserError("--learning-rate must be above 0")
    tell_loading("torch")
    from svend.bench import recipes
    from svend.data.corpus import build_corpus
    from svend.pipeline.console import make_console

    model = get_model_config(ModelScale(options.scale))
    data = Path(options.data).expanduser() if options.data else None
    config = recipes.data_config(data, options.length, options.cache_dir)
    corpus = build_corpus(config, model.vocab_size, 0, tell)
    setting = recipes.Setting(
        options.scale, model.hidden_size, model.num_hidden_layers, model.vocab_size, options.steps,
        options.batch, options.length, options.learning_rate, corpus.fingerprint,
    )
    names = [BASELINE, *(name for name in options.recipes if name != BASELINE)]
    tell(f"training {len(names)} recipes, {options.seeds} seeds each, {options.steps} steps each")
    results = recipes.run_experiment(
        setting, model, config, corpus, names, options.seeds,
        Path(options.json) if options.json else None, tell, compiled=not options.eager,
    )
    make_console(pipe_width=140).print(recipes.recipe_table(setting, results))
    if options.plot:
        recipes.plot_recipes(results, Path(options.plot))
    finish(call, "recipes")
    return 0


RECIPES = Command(
    name="recipes",
    summary="what low-memory recipes cost in loss, beside AdamW in fp32",
    description="Train by each recipe from the same seeds on the same data as AdamW in fp32. A "
    "recipe is named by the precision of its weights and of its moments; fp32-fp32 is always "
    "there.",
    makes="a table, and what --json and --plot name",
    examples=(
        "svend bench recipes --recipes bf16-bf16 --seeds 1 --steps 10",
        "svend bench recipes --json recipes.json",
        "svend bench recipes --recipes bf16-bf16 bf16-int8 --data book.txt --seeds 3",
    ),
    add_options=_add_options,
    run=_run,
)
