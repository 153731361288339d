"""What a level's gates need to know of a version: from the record, or measured now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from rich.console import Console

from svend.data.corpus import Corpus
from svend.data.stream import PackedSequences
from svend.errors import DataError
from svend.evaluation.heldout import HeldoutLoss, measure_gradient_norm, measure_heldout_loss
from svend.evaluation.measurement import Bounds, Measurement
from svend.models.shards import count_nonfinite
from svend.pipeline.benchmarking import (
    benchmark_of,
    evaluate_model,
    measured_how,
    problem_digests,
    read_questions,
)
from svend.pipeline.config import GatesConfig, load_saved_config
from svend.pipeline.evaluation_report import AnswerProgress
from svend.pipeline.loading import CONFIG_FILE
from svend.pipeline.moves import History, Registration
from svend.pipeline.record import measurement_rows, record_evaluation
from svend.pipeline.validation import Evidence
from svend.pipeline.version_evaluation import LoadedVersion, build_version_corpus, load_files
from svend.tracking.registry import OpenedVersion
from svend.tracking.run import TrackedRun
from svend.tracking.runs import run_shows

NONFINITE, GRADIENT_NORM = "nonfinite_parameters", "gradient_norm"
ON_HELDOUT = ("loss", "perplexity")
# Under which name a run logs what a gate calls otherwise. What no run logs is nowhere to look up.
LOGGED_AS = {"loss": "eval/heldout_loss", GRADIENT_NORM: "train/gradient_norm"}
DATA_KEYS = ("data.", "training.data.", "training.heldout_sequences", "training.seed")
GRADIENT_SEQUENCES = 8


class Candidate:
    """A version that a level is decided on. Its files have been verified.

    overrides: settings of the evaluation and its data, over those that the version was trained
    with.
    """

    def __init__(
        self, version: OpenedVersion, registration: Registration, gates: GatesConfig,
        overrides: Sequence[tuple[str, str]],
    ) -> None:
        self.version = version
        self.registration = registration
        self.overrides = overrides
        config = load_saved_config(version.folder / CONFIG_FILE, overrides)
        # Today's gates, not those that the run was trained with: it might have set its own.
        self.config = replace(config, gates=gates)

    @cached_property
    def loaded(self) -> LoadedVersion:
        """The version's model, loaded when it is first asked for."""
        return load_files(self.version, self.registration.checkpoint_sha256, self.overrides)

    @property
    def has_other_data(self) -> bool:
        """Whether the data are other than those that the version was trained with."""
        return any(key.startswith(DATA_KEYS) for key, _ in self.overrides)


class EvidenceBook:
    """The measurements of one candidate: on record, or made now and put on record by the caller."""

    def __init__(
        self, candidate: Candidate, history: History, tracked: TrackedRun, console: Console
    ) -> None:
        self._candidate = candidate
        self._tracked = tracked
        self._console = console
        self._on_record = history.measured_rows(candidate.registration.checkpoint_sha256)
        self._measured: dict[str, Measurement] = {}
        self._digests: dict[str, str] = {}
        self.new_rows: list[dict[str, Any]] = []

    def measurements(self, metrics: Sequence[str]) -> dict[str, Measurement]:
        """Return each metric that is on record or can be measured; measure what is not there."""
        wanted = [metric for metric in dict.fromkeys(metrics) if metric not in self._measured]
        for metric in wanted:
            row = self._find(metric)
            if row is not None:
                self._measured[metric] = _as_measurement(row)
                self._console.print(
                    f"{metric}: on record, measured by run {row['run_id']} on {row['at'][:10]}",
                    soft_wrap=True,
                )
        missing = [metric for metric in wanted if metric not in self._measured]
        if missing:
            self._measure(missing)
        return {metric: self._measured[metric] for metric in metrics if metric in self._measured}

    def is_current(self, row: Mapping[str, Any]) -> bool:
        """Whether a decision's value was measured as it would be measured today."""
        return row["value"] is None or (
            row["settings"] == measured_how(row["metric"], self._candidate.config)
            and self._fingerprint(row["metric"]) in (None, row["data_fingerprint"])
        )

    def _find(self, metric: str) -> dict[str, Any] | None:
        """Return the newest record of a metric on today's data, by a run that shows the value."""
        confidence = self._candidate.config.gates.confidence
        for row in self._on_record:
            if row["metric"] != metric or not self.is_current(row):
                continue
            if row["low_95"] is not None and row["confidence"] != confidence:
                continue  # the bound that would decide is not on record
            if metric == NONFINITE or run_shows(
                row["run_id"], LOGGED_AS.get(metric, f"eval/{metric}"), row["value"]
            ):
                return row
            self._console.print(
                f"{metric}: run {row['run_id']} does not show the value on record; measured again"
            )
        return None

    def _fingerprint(self, metric: str) -> str | None:
        """Return the hash of the data that a metric must be measured on; None for no data."""
        if metric in ON_HELDOUT:
            return (self._corpus.fingerprint if self._candidate.has_other_data
                    else self._candidate.registration.data_fingerprint)
        name = benchmark_of(metric, self._candidate.config)
        if name is None or metric == GRADIENT_NORM:
            return None
        if metric not in self._digests:
            self._digests |= problem_digests(
                replace(self._candidate.config, eval_benchmarks=[name])
            )
        return self._digests.get(metric)

    @cached_property
    def _corpus(self) -> Corpus:
        corpus = build_version_corpus(
            self._candidate.loaded, lambda text: self._console.print(f"data: {text}")
        )
        registered = self._candidate.registration.data_fingerprint
        if not self._candidate.has_other_data and corpus.fingerprint != registered:
            raise DataError(
                f"data of {self._candidate.config.training.data.recipe}: have changed since the "
                f"version was trained (fingerprint was {registered[:16]}, now "
                f"{corpus.fingerprint[:16]}); restore them, or give others with --data.path"
            )
        return corpus

    def _measure(self, missing: Sequence[str]) -> None:
        """Measure what can be measured, put it into the run, and keep it as rows."""
        candidate, config = self._candidate, self._candidate.config
        step = candidate.registration.step
        names = dict.fromkeys(
            name for metric in missing if metric not in ON_HELDOUT
            and (name := benchmark_of(metric, config)) is not None
        )
        found: dict[str, Measurement] = {}
        if NONFINITE in missing:
            found[NONFINITE] = Measurement(count_nonfinite(candidate.loaded.model))
        if set(missing) & {*ON_HELDOUT}:
            found |= {metric: replace(m, data_fingerprint=self._corpus.fingerprint)
                      for metric, m in self._measure_heldout().measurements().items()}
        if GRADIENT_NORM in missing:
            found[GRADIENT_NORM] = Measurement(self._measure_gradient_norm())
        self._tracked.log_metrics(
            {LOGGED_AS.get(metric, f"eval/{metric}"): m.value for metric, m in found.items()}, step
        )
        if names:
            asked = replace(config, eval_benchmarks=list(names))
            with AnswerProgress(self._console) as progress:
                evaluation = evaluate_model(
                    asked, candidate.loaded.model, candidate.loaded.tokenizer,
                    read_questions(asked), self._measure_heldout, progress.advance,
                )
            record_evaluation(self._tracked, evaluation, step)
            found |= evaluation.measurements
        self._tracked.flush()
        self.new_rows += measurement_rows(found, config, Evidence(
            step, candidate.registration.checkpoint_sha256, None, self._tracked.run_id
        ))
        self._measured |= found

    def _measure_heldout(self) -> HeldoutLoss:
        training = self._candidate.config.training
        return measure_heldout_loss(
            self._candidate.loaded.model, self._heldout_batches(training.heldout_sequences),
            self._candidate.loaded.config.training.precision, self._candidate.loaded.device,
        )

    def _measure_gradient_norm(self) -> float:
        loaded = self._candidate.loaded
        return measure_gradient_norm(
            loaded.model, self._heldout_batches(GRADIENT_SEQUENCES),
            loaded.config.training.precision, loaded.device,
        )

    def _heldout_batches(self, count: int) -> Any:
        training = self._candidate.config.training
        return PackedSequences(self._corpus.heldout, training.data, training.data_seed).first(count)


def _as_measurement(row: Mapping[str, Any]) -> Measurement:
    """Return the measurement that a record states, with the bounds that it has."""
    interval = None if row["low_95"] is None else (row["low_95"], row["high_95"])
    measured = Measurement(
        row["value"], interval, row["sample_size"], row["data_fingerprint"], row["run_id"]
    )
    if row["low_bound"] is None:
        return measured
    return replace(measured, bounds=_recorded_bounds(measured, row))


def _recorded_bounds(measured: Measurement, row: Mapping[str, Any]) -> Bounds:
    def bounds(level: float, size_factor: float) -> tuple[float, float]:
        if size_factor == 1.0 and abs(level - (2 * row["confidence"] - 1)) < 1e-12:
            return row["low_bound"], row["high_bound"]
        approximate = measured.interval_at(level, size_factor)
        assert approximate is not None  # a record with bounds has an interval
        return approximate

    return bounds
