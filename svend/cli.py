"""The command line: parse, load the configuration, call one function below."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from svend import __version__
from svend.bench import (
    chaos_command,
    faults_command,
    gpu_report_command,
    parametrisation_command,
    recipes_command,
)
from svend.bench import command as bench_command
from svend.errors import ConfigError, Interrupted, RankLost, UserError, one_line
from svend.pipeline import exchange_command, plan_command, sync_command
from svend.pipeline.compare import command as compare_command
from svend.pipeline.config import (
    BENCHMARK_NAMES,
    PipelineConfig,
    group_members,
    load_config,
    print_scale_comparison,
)
from svend.pipeline.interruption import EXIT_INTERRUPTED
from svend.pipeline.ladder import command as ladder_command
from svend.pipeline.ladder import predict_command
from svend.pipeline.launcher import launch, read_processes
from svend.pipeline.promotion import command as promotion_command
from svend.pipeline.sweep import command as sweep_command
from svend.ranks import find_place
from svend.serving import command as serve_command

OVERRIDE_HELP = """\
any value of the configuration can be set by its dotted key, such as
  --training.learning_rate 1e-4   --training.max_steps 500   --data.path ../gsm8k
(data. is short for training.data.); conf/config.yaml lists the keys.

examples:
  python -m svend train
  python -m svend train --scale small --training.learning_rate 1e-4
  python -m svend train --data gsm8k --data.path ../gsm8k
  python -m svend train --resume
  python -m svend validate --scale small
  python -m svend plan --scale xl --hparams hparams.yaml --training.max_steps 10000
  python -m svend plan --scale flagship --gpu a100-80gb
"""
EVALUATE_HELP = """\
the settings are those that the version was trained with; any can be overridden, such as
  --evaluation.problems 1000   --gates.confidence 0.95
  --evaluation.paths '{gsm8k: ../gsm8k, tool_accuracy: ../bfcl}'

examples:
  python -m svend evaluate --model models:/svend-tiny-50m@standard
  python -m svend evaluate --model models:/svend-tiny-50m/3 --benchmarks gsm8k,tool_accuracy
"""
GROUP_HELP = {
    "scale": "rung of the ladder",
    "data": "data recipe",
    "gates": "gate set",
    "preset": "size of the run; the scale's own where left out",
}
# Which do something, end well or raise, and take no override.
SHOWN = {
    "history": promotion_command.run_history, "lineage": promotion_command.run_lineage,
    "export": exchange_command.run_export, "import": exchange_command.run_import,
    "sync": sync_command.run, "predict": predict_command.run, "compare": compare_command.run,
}
WITHOUT_CONFIG = ("chaos", "scales", "bench", "coordcheck", "audit", *SHOWN)
# What several processes can do together.
SHARED = ("train", "ladder")
ON_A_VERSION = ("evaluate", "promote", "serve")
EXIT_USER_ERROR = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    code = _code_of(arguments)
    parallel = sys.modules.get("svend.training.parallel")
    if parallel is not None and parallel.has_given_up():
        # Not waiting for processes that wait for this one, or for a save whose parts do not come.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _code_of(arguments: Sequence[str] | None) -> int:
    try:
        known, rest = _parser().parse_known_args(arguments)
        return _run(known, rest, list(sys.argv[2:] if arguments is None else arguments[1:]))
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Exception as error:
        # Not imported where nothing has talked to a store: that takes a second.
        told = sys.modules.get("svend.tracking.store_errors")
        line = None if told is None else told.as_user_error(error)
        if line is None:
            raise
        print(f"error: {one_line(line)}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("error: interrupted before the run began", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(known: argparse.Namespace, rest: Sequence[str], arguments: Sequence[str]) -> int:
    """Run a command; `arguments` are those behind its name."""
    if known.command in WITHOUT_CONFIG:
        return _run_without_config(known, rest)
    if known.command in ON_A_VERSION:
        return _on_a_version(known, rest)
    if known.command == "sweep":
        return _sweep(known, rest, arguments)
    if known.command in SHARED:
        code = _share(known, rest, arguments)
        if code is not None:
            return code
    if known.command == "ladder":
        return _ladder(known, rest)
    return _run_pipeline(known, rest)


def _share(
    known: argparse.Namespace, rest: Sequence[str], arguments: Sequence[str]
) -> int | None:
    """Start the processes of a command, or do the share of one that is not the first.

    None for a process that is to run the command: alone, or as the first.
    """
    place, processes = find_place(), read_processes(known.nproc)
    if place.size > 1:
        # Read where torch is imported: what it would say over many lines is said in one.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    looks = list(rest[:1]) == ["status"] or getattr(known, "dry_run", "false") == "true"
    if looks or (place.leads and (place.size > 1 or processes == 1)):
        return None
    # Here, what does not fit is said once, and at once.
    config = _shared_config(known, rest)
    if place.size == 1:
        return launch(processes, [known.command, *arguments], config.grace_seconds)
    from svend.pipeline.runner import follow_runs

    try:
        follow_runs(config, once=known.command == "train")
    except RankLost:
        return EXIT_USER_ERROR  # the first has died, or has said which one did
    except Exception as error:  # noqa: BLE001 - told in one line: the first says what comes of it
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        print(f"error: rank {place.rank}: {kind}{one_line(error)}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    return 0


def _shared_config(known: argparse.Namespace, rest: Sequence[str]) -> PipelineConfig:
    overrides = _config_overrides(known, rest)
    if known.command == "train":
        return load_config(_groups(known), overrides)
    ladder = ladder_command.load(known, _groups(known), overrides)
    return ladder.rungs[ladder.config.start]


def _groups(known: argparse.Namespace) -> dict[str, str]:
    return {name: getattr(known, name) for name in GROUP_HELP if getattr(known, name)}


def _config_overrides(known: argparse.Namespace, rest: Sequence[str]) -> list[tuple[str, str]]:
    """Return what the command line sets of the configuration."""
    overrides = _overrides(rest)
    if getattr(known, "profile", None) is not None:
        overrides.append(("training.profile", known.profile))
    return overrides


def _run_without_config(known: argparse.Namespace, rest: Sequence[str]) -> int:
    if known.command == "chaos":
        chaos_command.run(known, _overrides(rest))
        return 0
    name = known.command
    if name == "bench":
        gpu_report_command.check_kind(known)
        name = f"bench {known.kind or '--gpu-report'}"
    if rest:
        raise ConfigError(f"{name} takes no option {rest[0]}; see --help")
    if known.command == "scales":
        print_scale_comparison()
        return 0
    if known.command == "audit":
        return promotion_command.run_audit(known)
    if known.command in SHOWN:
        try:
            SHOWN[known.command](known)
        except UserError as error:
            _end_joined_run(error)
            raise
        return 0
    measured = {
        "coordcheck": parametrisation_command.run_coordcheck,
        "bench train": bench_command.run,
        "bench scaling": bench_command.run_scaling,
        "bench data": bench_command.run_data,
        "bench generate": bench_command.run_generate,
        "bench memory": bench_command.run_memory,
        "bench serve": bench_command.run_serve,
        "bench transfer": parametrisation_command.run_transfer,
        "bench faults": faults_command.run,
        "bench recipes": recipes_command.run,
        "bench --gpu-report": gpu_report_command.run,
    }
    return measured[name](known)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other mistake is said."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="svend", description="Train decoder-only reasoning models, gated at every rung."
    )
    parser.add_argument("--version", action="version", version=f"svend {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    train = _config_command(
        commands, "train", "train one scale as a tracked run",
        "Train one scale as a tracked run: plan, train, gate, save, register.",
    )
    plan_command.add_options(_config_command(
        commands, "plan", "print what a run would do, without doing it",
        "Print the plan of a run: parameters, tokens, FLOPs, memory, and what becomes of a sweep's "
        "values (--hparams FILE). No weights are made and nothing is measured; data are read only "
        "where training.max_steps is not set. With --gpu: memory by part, time, and the settings "
        "that fit, on GPUs that need not be here; no data are read.",
    ))
    _config_command(
        commands, "validate", "try what breaks runs, before one begins",
        "Check device, memory, disk, data, tokenizer, tracking store, a first step and a "
        "checkpoint, at the real shape; a line for each, with what to do where one fails.",
    )
    train.add_argument(
        "--resume", nargs="?", const="true", default="false", metavar="true|false|force",
        help="go on with the newest unfinished run of this experiment and scale",
    )
    _add_nproc(train)
    train.add_argument(
        "--force-resume", action="store_true",
        help="resume also where settings, data or tokenizer are others; put on record in the run",
    )
    train.add_argument(
        "--profile", nargs="?", const="true", metavar="true|false",
        help="trace three steps, and list the ten most expensive parts",
    )
    evaluate = commands.add_parser(
        "evaluate", help="measure benchmarks on a registered version",
        description="Measure benchmarks on a version of the registry, decide the gates that they "
        "suffice for, and record both with every sample.",
        epilog=EVALUATE_HELP, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    evaluate.add_argument("--model", required=True, metavar="URI",
                          help="models:/NAME/VERSION or models:/NAME@ALIAS")
    evaluate.add_argument("--benchmarks", default="accuracy,tool_accuracy", metavar="NAME,NAME",
                          help=f"of {', '.join(BENCHMARK_NAMES)}; NAME_sample: 200 at most")
    sweep = _config_command(
        commands, "sweep", "search hyperparameters at small scale",
        "Search hyperparameters at small scale: trials below one run, confirmed on fresh seeds. "
        "Stopped or killed, the same command goes on.", sweep_command.HELP,
    )
    sweep_command.add_options(sweep)
    ladder = _config_command(
        commands, "ladder", "climb from scale to scale, each predicted before it is trained",
        "Climb from scale to scale: a run per rung below one run, its loss predicted before its "
        "first step, a verdict before the next begins. Stopped or killed, the same command goes "
        "on.", ladder_command.HELP,
    )
    ladder_command.add_options(ladder)
    _add_nproc(ladder)
    for name, summary, description, epilog, add_options in (
        ("promote", "move a version up the levels, with evidence",
         "Have a version of the registry climb, level by level, each decided by its gates on that "
         "very version and put on record. Where one fails nothing moves, and the exit code is 1.",
         promotion_command.PROMOTE_HELP, promotion_command.add_promote_options),
        ("export", "write a version for other libraries",
         "Write a version of the registry as a folder that transformers reads.",
         exchange_command.EXPORT_HELP, exchange_command.add_export_options),
        ("import", "make a start of a Hugging Face folder",
         "Make a checkpoint to begin a run with of a Llama-family folder.",
         exchange_command.IMPORT_HELP, exchange_command.add_import_options),
        ("predict", "the loss of a model to come, from a table of losses",
         "Fit the scaling law L(N, D) on a table of losses, predict with an interval, and say how "
         "far each size would have been missed.",
         predict_command.HELP, predict_command.add_options),
        ("sync", "tell the tracking store what it missed",
         "Send the tracking store what runs could not, for it was down or they were killed.",
         sync_command.HELP, sync_command.add_options),
        ("compare", "one report of runs or ladders",
         "Hold runs beside one another, or the rungs of ladders: losses, fit, predictions and what "
         "came true, gates, planned and measured, benchmarks, cost.",
         compare_command.HELP, compare_command.add_options),
        ("chaos", "kill runs and see whether they end the same",
         "Train a small run, kill and resume it, and compare with one that never was killed.",
         chaos_command.HELP, chaos_command.add_options),
        ("serve", "answer chats by a registered version",
         "Serve a version by OpenAI's chat completions: streaming, a bearer token, limits, a "
         "bounded queue.", serve_command.HELP, serve_command.add_options),
        ("history", "every move of a registered model",
         "Print every move of a registered model: when, by whom, from, to, by what verdict, why.",
         promotion_command.HISTORY_HELP, promotion_command.add_history_options),
        ("audit", "check that every alias is backed by a verdict",
         "Walk the registry, and name every alias that is not backed by a verdict on its weights "
         "and every record that was tampered with.",
         promotion_command.AUDIT_HELP, promotion_command.add_audit_options),
        ("lineage", "from a version to everything that made it",
         "Print what made a version: run, config, commit, data, tokenizer, parents, verdicts.",
         promotion_command.LINEAGE_HELP, promotion_command.add_lineage_options),
    ):
        add_options(commands.add_parser(
            name, help=summary, description=description, epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        ))
    bench = commands.add_parser(
        "bench", help="time training and tokenising beside their peers; report on a GPU",
        description="Benchmarks, beside what one would use instead.",
        epilog=gpu_report_command.EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    gpu_report_command.add_options(bench)
    kinds = bench.add_subparsers(dest="kind", metavar="kind")
    bench_command.add_options(kinds.add_parser(
        "train", help="the training step", description="Time the training step.",
        epilog=bench_command.EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    ))
    bench_command.add_scaling_options(kinds.add_parser(
        "scaling", help="speed and memory against batch, length and layers",
        description="Time Svend's own training step alone, at many batches, lengths and depths.",
        allow_abbrev=False,
    ))
    bench_command.add_data_options(kinds.add_parser(
        "data", help="tokenising, beside datasets.map",
        description="Time tokenising a file made on the spot, beside datasets.map.",
        allow_abbrev=False,
    ))
    bench_command.add_generate_options(kinds.add_parser(
        "generate", help="decoding, beside Hugging Face's generate",
        description="Time decoding beside Hugging Face's generate with the same weights.",
        allow_abbrev=False,
    ))
    bench_command.add_memory_options(kinds.add_parser(
        "memory", help="the plan's peak memory, beside what is taken",
        description="Hold the predicted peak memory against what processes take, or, with --fake, "
        "against what PyTorch's tracker counts at every scale. Exit code 1 above 10%.",
        allow_abbrev=False,
    ))
    bench_command.add_serve_options(kinds.add_parser(
        "serve", help="the server, with many clients at once",
        description="Drive a server with many clients at once; say what they waited for.",
        allow_abbrev=False,
    ))
    parametrisation_command.add_transfer_options(kinds.add_parser(
        "transfer", help="whether the best learning rate transfers to other sizes",
        description="Train models of several widths and depths at several learning rates.",
        epilog=parametrisation_command.TRANSFER_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    ))
    recipes_command.add_options(kinds.add_parser(
        "recipes", help="what low-memory recipes cost in loss, beside AdamW in fp32",
        description="Train by each recipe from the same seeds on the same data as AdamW in fp32.",
        epilog=recipes_command.EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    ))
    faults_command.add_options(kinds.add_parser(
        "faults", help="ladders with planted faults, and healthy ones",
        description="Climb small ladders, healthy and with a planted fault; say which are stopped.",
        epilog=faults_command.EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    ))
    parametrisation_command.add_coordcheck_options(commands.add_parser(
        "coordcheck", help="whether activations keep their size as models grow",
        description="Train small models of growing width and depth for a few steps, and show the "
        "sizes of their activations.",
        epilog=parametrisation_command.COORDCHECK_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    ))
    commands.add_parser("scales", help="print the seven scales",
                        description="Print the seven scales, each figure from its config.")
    return parser


def _add_nproc(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nproc", default="1", metavar="N",
        help="processes on this machine, one per GPU, that share each step (1); under torchrun or "
             "srun, which start them, leave it out",
    )


def _config_command(
    commands: argparse._SubParsersAction[_Parser], name: str, summary: str, description: str,
    epilog: str = OVERRIDE_HELP,
) -> _Parser:
    """Add a command that takes the configuration's groups and overrides."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for group, text in GROUP_HELP.items():
        # The members are checked with the rest of the configuration, which names them.
        parser.add_argument(f"--{group}", metavar="NAME",
                            help=f"{text}: {', '.join(group_members(group))}")
    return parser


def _on_a_version(known: argparse.Namespace, rest: Sequence[str]) -> int:
    """Run a command that takes a version of the registry, and overrides of its config."""
    try:
        overrides = _overrides(rest)
        if known.command == "promote":
            promotion_command.run_promote(known, overrides)
        elif known.command == "serve":
            serve_command.run(known, overrides)
        else:
            names = [name.strip() for name in known.benchmarks.split(",") if name.strip()]
            print("starting: loading torch and mlflow", flush=True)
            from svend.pipeline.version_evaluation import evaluate_version

            evaluate_version(known.model, names, overrides)
    except UserError as error:
        _end_joined_run(error)
        raise
    return 0


def _sweep(known: argparse.Namespace, rest: Sequence[str], arguments: Sequence[str]) -> int:
    try:
        groups = _groups(known)
        sweep_command.run(known, groups, _overrides(rest), arguments)
    except UserError as error:
        if not known.join:
            _end_joined_run(error)
        raise
    except Interrupted as interruption:
        print(f"error: {one_line(interruption)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _ladder(known: argparse.Namespace, rest: Sequence[str]) -> int:
    try:
        groups = _groups(known)
        status = list(rest[:1]) == ["status"]
        reason = ladder_command.run(known, groups, _overrides(rest[status:]), status=status)
    except UserError as error:
        _end_joined_run(error)
        raise
    except Interrupted as interruption:
        print(f"error: {one_line(interruption)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    if reason is None:
        return 0
    print(f"error: {one_line(reason)}", file=sys.stderr)
    return EXIT_USER_ERROR


def _end_joined_run(error: UserError) -> None:
    """Have the run that `mlflow run` made, if it made one, say why it failed."""
    if "MLFLOW_RUN_ID" in os.environ:
        from svend.tracking.runs import end_joined_run

        end_joined_run("FAILED", str(error))


def _run_pipeline(known: argparse.Namespace, rest: Sequence[str]) -> int:
    try:
        groups = _groups(known)
        resume = getattr(known, "resume", "false")
        if getattr(known, "force_resume", False):
            resume = "force"
        if resume not in ("true", "false", "force"):
            raise ConfigError(f"resume = {resume}: must be true, false or force")
        overrides = _config_overrides(known, rest)
        if known.command == "plan":
            if known.gpu is not None:
                plan_command.run(known, groups, overrides)
                return 0
            plan_command.refuse_without_gpu(known)
        config = load_config(groups, overrides)
        print("starting: loading torch and mlflow", flush=True)
        from svend.pipeline.runner import ScaleRunner

        begins_with: list[tuple[str, str]] = []
        if config.init_from is not None:
            from svend.pipeline.init_from import find_starting_point

            start = find_starting_point(config.init_from)
            begins_with = start.settings(config.training.data.cache_dir)
            # By its address: an alias may mean another version tomorrow.
            overrides = [*overrides, ("init_from", start.place)]
            config = load_config(groups, [*begins_with, *overrides])
        if config.hparams is not None:
            from svend.pipeline.hyperparameters import (
                fetch_hyperparameters,
                locate_hyperparameters,
            )

            address = locate_hyperparameters(config.hparams, config.training.data.recipe)
            found = fetch_hyperparameters(address)
            # Below what is set by hand. By its address: a name may mean another result tomorrow.
            config = load_config(groups, [*begins_with, *found.settings(), *overrides,
                                          ("hparams", address)])
        if known.command == "plan":
            from svend.pipeline.preview import preview_run

            preview_run(config)
            return 0
        runner = ScaleRunner(config, owns_process=True)
    except UserError as error:
        _end_joined_run(error)
        raise
    if known.command == "validate":
        return 0 if runner.validate_infrastructure() else EXIT_USER_ERROR
    result = runner.run(resume=resume != "false", force=resume == "force")
    if result.success:
        return 0
    print(f"error: {one_line(result.reason)}", file=sys.stderr, flush=True)
    if result.interrupted_at_once:
        sys.stdout.flush()
        os._exit(EXIT_INTERRUPTED)  # not waiting for a save that is under way
    return EXIT_INTERRUPTED if result.interrupted else EXIT_USER_ERROR


def _overrides(rest: Sequence[str]) -> list[tuple[str, str]]:
    """Return `--key value` and `--key=value` as pairs."""
    pairs = []
    words = list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"'{word}' is not an option: expected a form such as --key value")
        key, equals, value = word[2:].partition("=")
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        if not value:
            raise ConfigError(f"--{key} has no value: expected a form such as --{key} VALUE")
        pairs.append((key, value))
    return pairs
