"""A version climbs, level by level: decided, put on record, and only then moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from svend.errors import GateFailure, UserError
from svend.pipeline.benchmarking import measured_how
from svend.pipeline.config import GatesConfig
from svend.pipeline.console import say
from svend.pipeline.moves import (
    LEVELS,
    MAX_REASON,
    History,
    Move,
    MoveKind,
    Moves,
    Registration,
    definition_sha256,
)
from svend.pipeline.outcome import ended_as_left
from svend.pipeline.promotion.evidence import Candidate, EvidenceBook
from svend.pipeline.promotion.standing import (
    check_aliases,
    finish_moves,
    newest_below,
)
from svend.pipeline.record import record_verdicts
from svend.pipeline.report import verdict_table
from svend.pipeline.validation import Evidence, GateLevel, PipelineValidator, ValidationResult
from svend.pipeline.verified_version import open_registered, open_verified, verify_files
from svend.pipeline.version_evaluation import tags_of_run_about
from svend.tracking.run import TrackedRun

PROMOTION_TAG = "svend.promotion"  # of a promotion's run: which model's ledger it wrote to


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """What is asked for.

    version: None is the newest that has the level below. gates: what decides. overrides: settings
    of the evaluation and its data, over those that the version was trained with.
    """

    model: str
    to: GateLevel
    version: str | None
    gates: GatesConfig
    overrides: Sequence[tuple[str, str]] = ()


class Climb:
    """One version on its way up to a level, in a run of its own."""

    def __init__(self, promotion: Promotion, console: Console) -> None:
        self._promotion = promotion
        self._console = console
        self._moves = Moves.find(promotion.model)
        self._entries: list[int] = []

    def run(self) -> list[Move]:
        """Climb each level in turn; return the moves that were made.

        Raises GateFailure at the first level that is not passed, and UserError for what cannot be
        promoted, or was promoted by someone else meanwhile. Nothing is moved then.
        """
        promotion = self._promotion
        finish_moves(self._moves, self._console)
        history = self._moves.history()
        version = promotion.version or newest_below(history, promotion.model, promotion.to)
        opened, registration = open_registered(self._moves.model, history, version)
        verify_files(opened, registration)
        check_aliases(self._moves, LEVELS[: LEVELS.index(promotion.to) + 1])
        candidate = Candidate(opened, registration, promotion.gates, promotion.overrides)
        name = f"promote-{opened.name}-v{version}-to-{promotion.to.value}"
        tracked = TrackedRun.begin(opened.experiment, name)
        with ended_as_left(tracked):
            tracked.set_tags({
                PROMOTION_TAG: opened.name,
                **tags_of_run_about(opened, registration.checkpoint_sha256),
            })
            say(self._console, f"promote: {opened.name} version {version} to {promotion.to.value}; "
                f"what is not on record is measured now, in run {tracked.run_id}")
            return self._climb(candidate, history, tracked)

    def _climb(self, candidate: Candidate, history: History, tracked: TrackedRun) -> list[Move]:
        target, made = self._promotion.to, []
        book = EvidenceBook(candidate, history, tracked, self._console)
        validator = PipelineValidator(gates=candidate.config.gates)
        rows: list[dict[str, Any]] = []
        try:
            for level in LEVELS[: LEVELS.index(target) + 1]:
                decided = self._decide(level, candidate, history, book, validator, tracked)
                if isinstance(decided, Move):
                    self._console.print(
                        f"{level.value}: passed already, entry {decided.number} of "
                        f"{decided.at[:10]}"
                    )
                else:
                    rows += decided
                made += self._move(level, candidate, history, decided, validator, tracked)
        finally:
            if self._entries:
                tracked.set_tags({"svend.entries": " ".join(map(str, self._entries)),
                                  "svend.ledger_run_id": self._moves.ledger_run_id})
            if book.new_rows:
                self._moves.keep_rows(book.new_rows)
            if rows:
                record_verdicts(tracked, rows)
                version = candidate.version
                self._console.print(
                    verdict_table(rows, f"Verdicts on {version.name} version {version.version}")
                )
        return made

    def _decide(
        self, level: GateLevel, candidate: Candidate, history: History, book: EvidenceBook,
        validator: PipelineValidator, tracked: TrackedRun,
    ) -> Move | list[dict[str, Any]]:
        """Return the move by which the version passed the level, or the rows of a new verdict."""
        passed = history.passed(candidate.version.version, level)
        gates = validator.gates[level]
        if passed is not None and self._still_holds(
            passed, history, book, definition_sha256(gates, validator.confidence),
            candidate.registration,
        ):
            return passed
        measurements = book.measurements([gate.metric_name for gate in gates])
        evidence = Evidence(
            candidate.registration.step, candidate.registration.checkpoint_sha256,
            candidate.registration.data_fingerprint, tracked.run_id,
        )
        verdict: ValidationResult = validator.decide(level, measurements, evidence)
        return [{**row, "settings": measured_how(row["metric"], candidate.config)}
                for row in verdict.rows()]

    def _still_holds(
        self, passed: Move, history: History, book: EvidenceBook, today_sha256: str,
        registration: Registration,
    ) -> bool:
        """Whether a verdict is on these weights, by today's gates, on today's data."""
        verdict = history.verdict(passed)
        return (
            verdict is not None
            and verdict["definition_sha256"] == today_sha256
            and all(row["checkpoint_sha256"] == registration.checkpoint_sha256
                    and book.is_current(row) for row in verdict["rows"])
        )

    def _move(
        self, level: GateLevel, candidate: Candidate, history: History,
        decided: Move | list[dict[str, Any]], validator: PipelineValidator, tracked: TrackedRun,
    ) -> list[Move]:
        """Put the decision on record and move what follows; raise GateFailure where it failed.

        The target's alias moves in any case, a lower one only for a version that never passed it:
        a version that is only looked at again takes no alias from a later one.
        """
        version, moves = candidate.version.version, self._moves
        holder, is_target = history.holder(level), level is self._promotion.to
        holds = (holder is not None and holder.version == version
                 and holder.kind is not MoveKind.OVERRIDDEN)
        unless_overtaken = self._unless_overtaken(level, version, history)
        if isinstance(decided, Move):
            if not is_target:
                return []
            if holds:
                assert holder is not None  # it holds the level
                self._console.print(
                    f"{moves.model} version {version} is {level.value} already, by {holder.by} "
                    f"since {holder.at[:19]}Z; nothing to do"
                )
                return []
            return [self._add(
                Move(kind=MoveKind.PROMOTED, version=version, level=level, run_id=tracked.run_id,
                     verdict=decided.verdict, reason=f"by the verdict of entry {decided.number}"),
                unless_overtaken,
            )]
        verdict = moves.keep_verdict(
            level, validator.gates[level], validator.confidence, decided, self._promotion.overrides
        )
        failures = [row for row in decided if row["required"] and not row["passed"]]
        if failures:
            kind = MoveKind.REFUSED
        elif history.passed(version, level) is not None and (holds or not is_target):
            kind = MoveKind.RENEWED
        else:
            kind = MoveKind.PROMOTED
        move = Move(kind=kind, version=version, level=level, verdict=verdict,
                    run_id=tracked.run_id)
        made = self._add(move, unless_overtaken if kind is MoveKind.PROMOTED else None)
        if failures:
            told = "; ".join(_failure(row) for row in failures)
            raise GateFailure(
                f"{moves.model} version {version} does not pass {level.value}: {told}; no alias "
                f"was moved (entry {made.number}, run {tracked.run_id})"
            )
        return [made]

    def _add(self, move: Move, still_right: Callable[[History], None] | None) -> Move:
        made = self._moves.add(move, *([still_right] if still_right else []))
        self._entries.append(made.number)
        return made

    def _unless_overtaken(
        self, level: GateLevel, version: str, seen: History
    ) -> Callable[[History], None]:
        """Return a check that the level's holder is still the one that was seen at the start."""
        before = seen.holder(level)

        def check(now: History) -> None:
            holder = now.holder(level)
            if (holder and holder.number) == (before and before.number):
                return
            if holder is None or (before is not None and holder.number < before.number):
                told = f"{level.value} was rolled back meanwhile"
            else:
                told = (
                    f"version {holder.version} became {level.value} meanwhile, by {holder.by} at "
                    f"{holder.at[11:19]}Z (entry {holder.number})"
                )
            again = ("it is there already" if holder and holder.version == version else
                     "run the command again if this version is still to have it")
            raise UserError(f"{self._moves.model}: {told}; nothing was moved by this: {again}")

        return check


def override(model: str, version: str | None, to: GateLevel, reason: str, console: Console) -> Move:
    """Move an alias without a verdict, on record as such. Raises UserError for an empty reason."""
    if not reason.strip():
        raise UserError("override: needs a reason, which goes on record")
    if len(reason) > MAX_REASON:
        raise UserError(f"override: the reason has {len(reason)} characters, {MAX_REASON} at most")
    moves = Moves.find(model)
    finish_moves(moves, console)
    if version is None:
        raise UserError("override: needs the version; the newest is no choice to make in a hurry")
    open_verified(f"models:/{model}/{version}")
    return moves.add(
        Move(kind=MoveKind.OVERRIDDEN, version=version, level=to, reason=reason.strip())
    )


def roll_back(model: str, level: GateLevel, reason: str | None, console: Console) -> Move:
    """Give a level back to the version that held it before. Raises UserError if there is none."""
    moves = Moves.find(model)
    finish_moves(moves, console)
    history = moves.history()
    present, former = history.holder(level), history.holder_before(level)
    if present is None:
        raise UserError(f"{model}: no version is {level.value}; there is nothing to roll back")
    if former is None:
        raise UserError(
            f"{model}: version {present.version} is the first that is {level.value}; there is none "
            "to go back to"
        )
    open_verified(f"models:/{model}/{former.version}")

    def still_right(now: History) -> None:
        holder = now.holder(level)
        if holder is None or holder.number != present.number:
            raise UserError(
                f"{model}: {level.value} was moved by another process meanwhile; look at svend "
                f"history {model}, and run the command again if it is still wanted"
            )

    return moves.add(
        Move(kind=MoveKind.ROLLED_BACK, version=former.version, level=level,
             verdict=former.verdict, reason=reason),
        still_right,
    )


def _failure(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return f"{row['metric']} was not measured"
    interval = "" if row["low_95"] is None else f" [{row['low_95']:.4g}, {row['high_95']:.4g}]"
    return (f"{row['metric']} = {row['value']:.4g}{interval}, must be {row['comparison']} "
            f"{row['threshold']:g}")
