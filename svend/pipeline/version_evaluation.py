"""Benchmarks on a version of the registry: opened, checked, measured, and put on record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from torch import nn

from svend.command import tell, tell_next
from svend.data.corpus import Corpus, build_corpus
from svend.data.schemas import BUILT_IN
from svend.data.stream import PackedSequences
from svend.data.tokenised import Progress
from svend.data.tokenizer import DocumentTokenizer
from svend.device import check_precision, resolve_device, resolve_precision
from svend.errors import CheckpointError, ConfigError
from svend.evaluation.harness import check_tokenizer
from svend.evaluation.heldout import HeldoutLoss, measure_heldout_loss
from svend.evaluation.measurement import Measurement
from svend.models.transformer import ReasoningTransformer
from svend.pipeline.benchmarking import (
    Evaluation,
    check_answers,
    evaluate_model,
    read_questions,
)
from svend.pipeline.config import PipelineConfig, load_saved_config
from svend.pipeline.console import make_console
from svend.pipeline.evaluation_report import AnswerProgress, measurement_table
from svend.pipeline.loading import CONFIG_FILE, MODEL_FACTORY, OWN_SOURCES, names_code
from svend.pipeline.moves import Moves
from svend.pipeline.outcome import ended_as_left
from svend.pipeline.record import (
    EVALUATION_ARTIFACTS,
    measurement_rows,
    record_evaluation,
    record_verdicts,
)
from svend.pipeline.report import format_seconds, verdict_table
from svend.pipeline.validation import Evidence, GateLevel, PipelineValidator
from svend.pipeline.verified_version import open_verified
from svend.pipeline.version_files import (
    TOKENIZER,
    WEIGHTS,
    load_version_model,
    load_version_tokenizer,
)
from svend.tracking.environment import environment_tags
from svend.tracking.registry import OpenedVersion, tag_version
from svend.tracking.run import TrackedRun
from svend.tracking.runs import PARENT_TAG


@dataclass(frozen=True)
class LoadedVersion:
    """A version with its model, verified, its tokenizer, and the config that it was made by."""

    version: OpenedVersion
    config: PipelineConfig
    model: nn.Module
    tokenizer: DocumentTokenizer
    sha256: str
    device: torch.device
    own_sources_given: bool  # by hand, not by the version's config


def load_version(model_uri: str, overrides: Sequence[tuple[str, str]] = ()) -> LoadedVersion:
    """Open a version of the registry, verify its files, and load what it holds.

    Raises UserError, in one line, for what is missing, not what was registered, or does not fit.
    """
    version, registration = open_verified(model_uri)
    for name in (WEIGHTS, CONFIG_FILE, TOKENIZER):
        if name not in registration.files:
            raise CheckpointError(
                f"model {model_uri}: {name} is not among the files that were registered"
            )
    return load_files(version, registration.checkpoint_sha256, overrides)


def load_files(
    version: OpenedVersion, sha256: str, overrides: Sequence[tuple[str, str]] = ()
) -> LoadedVersion:
    """Load what a version holds; its files have been verified."""
    config = load_saved_config(version.folder / CONFIG_FILE, overrides)
    device = resolve_device(config.training.device)
    precision = resolve_precision(config.training.precision, device)
    check_precision(precision, device)
    config = replace(config, training=replace(config.training, precision=precision))
    given = [key for key, _ in overrides]
    model = load_version_model(
        version.folder, config, device,
        runs_factory=any(names_code(key, [MODEL_FACTORY]) for key in given),
    )
    tokenizer = load_version_tokenizer(version.folder)
    if isinstance(model, ReasoningTransformer):
        check_tokenizer(model, tokenizer)
    own_sources_given = any(names_code(key, [OWN_SOURCES]) for key in given)
    return LoadedVersion(version, config, model, tokenizer, sha256, device, own_sources_given)


def heldout_texts(loaded: LoadedVersion, count: int, report: Progress) -> list[list[int]]:
    """Return the token ids of documents that the version was not trained on."""
    heldout = build_version_corpus(loaded, report).heldout
    assert loaded.config.model is not None  # set by PipelineConfig.resolve
    longest = loaded.config.model.max_position_embeddings
    return [
        heldout.tokens.read(int(start), min(int(length), longest)).tolist()
        for start, length in zip(heldout.starts[:count], heldout.lengths[:count], strict=True)
        if length > 1
    ]


def evaluate_version(
    model_uri: str, benchmarks: Sequence[str], overrides: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Measure benchmarks on a version, in a run of its own, and decide the levels they suffice for.

    The settings are those that the version was trained with, then `overrides`. What was measured
    goes on record, where a promotion finds it; no alias moves. Returns what was measured and
    decided. Raises UserError, in one line, for what is missing or does not fit.
    """
    console = make_console()
    asked = ("eval_benchmarks", f"[{', '.join(benchmarks)}]")
    loaded = load_version(model_uri, [asked, *overrides])
    version, config, sha256 = loaded.version, loaded.config, loaded.sha256
    check_answers(config, loaded.model)
    questions = read_questions(config)
    step = int(version.tags.get("svend.step", "0"))
    tracked = TrackedRun.begin(version.experiment, f"evaluate-{version.name}-v{version.version}")
    with ended_as_left(tracked):
        tracked.set_tags(tags_of_run_about(version, sha256))
        tell(f"evaluate: {version.name} version {version.version}, saved at step {step}, on "
             f"{', '.join(benchmarks)}; run {tracked.run_id}, at most "
             f"{format_seconds(config.evaluation.budget_seconds)}")
        with AnswerProgress(console) as progress:
            evaluation = evaluate_model(
                config, loaded.model, loaded.tokenizer, questions,
                lambda: _measure_heldout(loaded, console),
                progress.advance,
            )
        record_evaluation(tracked, evaluation, step)
        levels = _decide(config, version, evaluation,
                         Evidence(step, sha256, None, tracked.run_id), tracked, console)
    tell_next(f"promote --model {version.name} --version {version.version}")
    return {
        "model": version.name, "version": version.version, "run_id": tracked.run_id,
        "checkpoint_sha256": sha256, "step": step, "levels": levels,
        "measurements": {
            metric: {
                "value": measured.value, "sample_size": measured.sample_size,
                **dict(zip(("low_95", "high_95"), measured.interval or (None, None), strict=True)),
            }
            for metric, measured in evaluation.measurements.items()
        },
    }


def tags_of_run_about(version: OpenedVersion, sha256: str) -> dict[str, str]:
    """Return the tags of a run that measures or moves a version, below the one that trained it."""
    return {
        **environment_tags(),
        "svend.model": f"models:/{version.name}/{version.version}",
        "svend.checkpoint_sha256": sha256,
        **({PARENT_TAG: version.run_id} if version.run_id else {}),
    }


def _measure_heldout(loaded: LoadedVersion, console: Console) -> HeldoutLoss:
    """Measure the loss on the held-out part of the config's data, by the version's tokenizer."""
    training = loaded.config.training
    corpus = build_version_corpus(loaded, lambda text: console.print(f"data: {text}"))
    sequences = PackedSequences(corpus.heldout, training.data, training.data_seed)
    batches = sequences.first(training.heldout_sequences)
    return measure_heldout_loss(loaded.model, batches, training.precision, loaded.device)


def build_version_corpus(loaded: LoadedVersion, report: Progress) -> Corpus:
    """Prepare the data of a version's config, by the tokenizer that the version has.

    Raises ConfigError where the version names code of its own to read them with: a registry is
    data, and what is in it is imported only where it was given by hand.
    """
    training, model = loaded.config.training, loaded.config.model
    assert model is not None  # set by PipelineConfig.resolve
    strange = [own.to_document for own in training.data.own_sources
               if own.to_document not in BUILT_IN]
    if strange and not loaded.own_sources_given:
        raise ConfigError(
            f"model {loaded.version.name} version {loaded.version.version}: its config names "
            f"{strange[0]} to read its data with, which is not run unasked; if you trust it, give "
            "--data.own_sources again"
        )
    own = replace(training.data, tokenizer=str(loaded.version.folder / TOKENIZER))
    return build_corpus(own, model.vocab_size, training.data_seed, report)


def _decide(
    config: PipelineConfig, version: OpenedVersion, evaluation: Evaluation, evidence: Evidence,
    tracked: TrackedRun, console: Console,
) -> dict[str, str]:
    """Decide FULL and PRODUCTION where each of their metrics was measured; record the verdicts.

    Returns what was decided of each level, in words.
    """
    validator = PipelineValidator(
        config.strict_validation, gates=config.gates, thresholds=config.training.validation_gates
    )
    rows, decided = [], {}
    for level in (GateLevel.FULL, GateLevel.PRODUCTION):
        required = [gate.metric_name for gate in validator.gates[level] if gate.required]
        missing = [metric for metric in required if metric not in evaluation.measurements]
        if missing:
            console.print(f"{level.value}: not decided; needs {', '.join(missing)} too")
        else:
            verdict = validator.decide(level, evaluation.measurements, evidence)
            rows += verdict.rows()
            decided[f"svend.evaluation.{level.value}"] = (
                "passed" if verdict.passed else f"failed: {'; '.join(verdict.failures)}"
            )
    console.print(measurement_table(evaluation.results, evaluation.measurements))
    if rows:
        record_verdicts(tracked, rows)
        console.print(verdict_table(rows, f"Verdicts on {version.name} version {version.version}"))
    measured = {f"eval.{metric}": _figure(m) for metric, m in evaluation.measurements.items()}
    Moves.find(version.name).keep_rows(measurement_rows(evaluation.measurements, config, evidence))
    tag_version(version.name, version.version, {
        **decided, **measured, "svend.evaluation_run_id": tracked.run_id,
    })
    console.print(
        f"recorded in run {tracked.run_id} (artifacts under {EVALUATION_ARTIFACTS}/) and in the "
        f"tags of {version.name} version {version.version}; no alias was moved: a promotion does, "
        "by what is on record", soft_wrap=True,
    )
    return {name.removeprefix("svend.evaluation."): told for name, told in decided.items()}


def _figure(measured: Measurement) -> str:
    text = f"{measured.value:.6g}"
    if measured.interval is not None:
        text += f" [{measured.interval[0]:.6g}, {measured.interval[1]:.6g}]"
    return text if measured.sample_size is None else f"{text}, n = {measured.sample_size}"
