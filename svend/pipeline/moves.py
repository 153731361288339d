"""The moves of a registered model: which version holds which level, since when, by what verdict.

A move is an entry of the model's ledger (`tracking/ledger.py`). The registry's aliases and tags
follow from the moves, so a process that dies after a move leaves nothing that the next one cannot
finish.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from functools import cached_property
from typing import Any

from svend.errors import UserError
from svend.pipeline.config import ValidationGate
from svend.pipeline.validation import GateLevel
from svend.tracking.ledger import Ledger, Record, text_digest
from svend.tracking.registry import (
    acting_user,
    describe_version,
    set_alias,
    tag_version,
)

LEVELS = list(GateLevel)
MAX_REASON = 1000


class MoveKind(Enum):
    """What a move is. All but the first, RENEWED and REFUSED move an alias."""

    REGISTERED = "registered"
    PROMOTED = "promoted"
    RENEWED = "renewed"  # a level that it had is decided again, and still passed
    REFUSED = "refused"
    OVERRIDDEN = "overridden"
    ROLLED_BACK = "rolled back"


ALIAS_MOVES = (MoveKind.PROMOTED, MoveKind.OVERRIDDEN, MoveKind.ROLLED_BACK)


@dataclass(frozen=True, kw_only=True)
class Registration:
    """What a version was when it was registered.

    checkpoint_sha256: of the checkpoint's weights, which verdicts refer to. files: the hash of each
    of the version's files. note: what made it, as Markdown for MLflow's pages.
    """

    checkpoint_sha256: str
    data_fingerprint: str
    tokenizer_sha256: str
    step: int
    files: dict[str, str]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Move:
    """One entry. verdict: the hash of its text in the ledger. former: who held the alias before."""

    kind: MoveKind
    version: str
    level: GateLevel | None = None
    former: str | None = None
    verdict: str | None = None
    reason: str | None = None
    run_id: str | None = None
    registration: Registration | None = None
    by: str = field(default_factory=acting_user)
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    # Two processes never write the same text, so that one of them learns that it was not first.
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    number: int = 0
    done: bool = False

    def content(self) -> dict[str, Any]:
        """Return the move as it stands in the ledger."""
        told = dataclasses.asdict(self)
        del told["number"], told["done"]
        told |= {"kind": self.kind.value, "level": self.level and self.level.value}
        return {key: value for key, value in told.items() if value is not None}

    @classmethod
    def parse(cls, content: Mapping[str, Any], number: int, done: bool) -> Move:
        """Return the move that an entry states. Raises ValueError for what is no move."""
        told = {key: value for key, value in content.items() if key != "previous"}
        try:
            return cls(**{
                **told,
                "kind": MoveKind(told["kind"]),
                "level": GateLevel(told["level"]) if "level" in told else None,
                "registration": (
                    Registration(**told["registration"]) if "registration" in told else None
                ),
                "number": number,
                "done": done,
            })
        except (TypeError, KeyError) as error:
            raise ValueError(f"is no move ({error})") from None


class History:
    """All moves of a model up to now, and what follows from them."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.moves: list[Move] = []
        self.unreadable: list[str] = []
        for entry in record.entries:
            try:
                self.moves.append(Move.parse(entry.content or {}, entry.number, entry.done))
            except ValueError as error:
                self.unreadable.append(f"entry {entry.number} {error}")

    @cached_property
    def _holders(self) -> dict[GateLevel, list[Move]]:
        holders: dict[GateLevel, list[Move]] = {level: [] for level in LEVELS}
        for move in self.moves:
            if move.level is None:
                continue
            if move.kind is MoveKind.ROLLED_BACK:
                while holders[move.level] and holders[move.level][-1].version != move.version:
                    holders[move.level].pop()
            elif move.kind in ALIAS_MOVES:
                holders[move.level].append(move)
        return holders

    def holder(self, level: GateLevel) -> Move | None:
        """Return the move that made the level's present holder its holder."""
        return self._holders[level][-1] if self._holders[level] else None

    def holder_before(self, level: GateLevel) -> Move | None:
        """Return the move of the last holder that was another version than the present one."""
        present = self.holder(level)
        former = [move for move in self._holders[level] if present and
                  move.version != present.version]
        return former[-1] if former else None

    def registration(self, version: str) -> Registration | None:
        """Return what a version was when it was registered, None if that is not on record."""
        for move in self.moves:
            if move.kind is MoveKind.REGISTERED and move.version == version:
                return move.registration
        return None

    def registered(self) -> list[str]:
        """Return the versions on record, the newest first."""
        return [m.version for m in reversed(self.moves) if m.kind is MoveKind.REGISTERED]

    def passed(self, version: str, level: GateLevel) -> Move | None:
        """Return the last move by which a version passed a level, None if it has not, or no more.

        An override is no pass; what was rolled back has to pass again.
        """
        found = None
        for move in self.moves:
            if move.level is not level:
                continue
            if move.version == version and move.kind in (MoveKind.PROMOTED, MoveKind.RENEWED):
                found = move
            elif (move.version == version and move.kind is MoveKind.REFUSED) or (
                move.former == version and move.kind is MoveKind.ROLLED_BACK
            ):
                found = None
        return found

    def stage(self, version: str) -> str:
        """Return the highest level that a version has, as its tag says it."""
        for level in reversed(LEVELS):
            if self.passed(version, level):
                return level.value
            held = self.holder(level)
            if held and held.version == version and held.kind is MoveKind.OVERRIDDEN:
                return f"{level.value} (overridden)"
        return "none"

    def verdict(self, move: Move) -> dict[str, Any] | None:
        """Return the verdict that a move rests on; None if it has none, or it is not intact."""
        text = self.record.texts.get(move.verdict or "")
        if text is None or text_digest(text) != move.verdict:
            return None
        told: dict[str, Any] = json.loads(text)
        return told

    def measured_rows(self, checkpoint_sha256: str) -> list[dict[str, Any]]:
        """Return every measurement of a checkpoint on record, the newest first."""
        rows = []
        for digest, text in self.record.texts.items():
            if text_digest(text) != digest:
                continue
            told = json.loads(text)
            rows += [{"at": told["at"], **row} for row in told["rows"]
                     if row["checkpoint_sha256"] == checkpoint_sha256 and row["value"] is not None]
        return sorted(rows, key=lambda row: str(row["at"]), reverse=True)


class Moves:
    """The moves of one registered model, to read and to add to."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.model = ledger.model
        self.ledger_run_id = ledger.run_id

    @classmethod
    def open(cls, model: str, description: str) -> Moves:
        """Return the moves of a model, which is made where it is not there."""
        return cls(Ledger.open(model, description))

    @classmethod
    def find(cls, model: str) -> Moves:
        """Return the moves of a model. Raises UserError if it is not there or has no ledger."""
        ledger = Ledger.find(model)
        if ledger is None:
            raise UserError(
                f"model {model}: has no record of its moves; it was not registered by Svend, so "
                "there is no telling what its versions are"
            )
        return cls(ledger)

    def history(self) -> History:
        """Return all moves up to now."""
        return History(self._ledger.read())

    def keep_rows(self, rows: Sequence[Mapping[str, Any]], **about: Any) -> str:
        """Keep measurements, or a verdict's rows, with what is said about them; return the hash."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        return self._ledger.keep(json.dumps({"at": at, **about, "rows": list(rows)}))

    def keep_verdict(
        self, level: GateLevel, gates: Sequence[ValidationGate], confidence: float | None,
        rows: Sequence[Mapping[str, Any]], overrides: Sequence[tuple[str, str]] = (),
    ) -> str:
        """Keep a level's verdict with the definition of its gates; return the hash.

        overrides: settings that were given for this verdict alone.
        """
        return self.keep_rows(
            rows, level=level.value, definition=definition(gates, confidence),
            definition_sha256=definition_sha256(gates, confidence),
            overrides=[list(pair) for pair in overrides],
        )

    def add(self, move: Move, still_right: Callable[[History], None] = lambda _: None) -> Move:
        """Put a move on record, after all others, and carry it out; return it with its number.

        still_right: is shown the history that the move would follow, and raises UserError if the
        move is not right any more, for another process was first.
        """
        while True:
            history = self.history()
            still_right(history)
            if move.kind in ALIAS_MOVES and move.level is not None:
                holder = history.holder(move.level)
                move = dataclasses.replace(move, former=holder.version if holder else None)
            if self._ledger.append(move.content(), history.record):
                break
        self.carry_out()
        return dataclasses.replace(move, number=history.record.next_number, done=True)

    def carry_out(self) -> list[Move]:
        """Bring tags and aliases in line with the moves that were not carried out yet; return them.

        Evidence first: tags, then the alias. Whoever writes an alias looks again afterwards, so the
        last to write it has written what is on record.
        """
        carried: list[Move] = []
        written: dict[GateLevel, str] = {}
        while True:
            history = self.history()
            pending = [move for move in history.moves if not move.done]
            levels = {move.level for move in pending
                      if move.kind in ALIAS_MOVES and move.level is not None}
            stale = {level for level, version in written.items()
                     if (holder := history.holder(level)) and holder.version != version}
            if not pending and not stale:
                return carried
            for move in pending:
                self._tag(history, move)
            for level in levels | stale:
                if holder := history.holder(level):
                    set_alias(self.model, level.value, holder.version)
                    written[level] = holder.version
            for move in pending:
                self._ledger.mark_done(move.number)
            carried += pending

    def _tag(self, history: History, move: Move) -> None:
        for version in {move.version, move.former} - {None}:
            assert version is not None
            tag_version(self.model, version, {"svend.stage": history.stage(version)})
            describe_version(self.model, version, _description(history, version))
        if move.level is not None:
            note = f"{move.kind.value} by {move.by}, {move.at[:19]}Z, entry {move.number}"
            note += f": {move.reason}" if move.reason else ""
            tag_version(self.model, move.version, {f"svend.{move.level.value}": note})
            if move.kind is MoveKind.ROLLED_BACK and move.former:
                withdrawn = f"withdrawn by {move.by}, {move.at[:19]}Z, entry {move.number}"
                tag_version(self.model, move.former, {f"svend.{move.level.value}": withdrawn})
        verdict = history.verdict(move)
        if verdict is not None:
            tag_version(self.model, move.version, verdict_tags(verdict["rows"]))


def _description(history: History, version: str) -> str:
    """Return what a version's page says: its levels, by whom, and what made it."""
    lines = []
    for level in LEVELS:
        holder, passed = history.holder(level), history.passed(version, level)
        holds = holder is not None and holder.version == version
        now = "" if holds else " (another version has it now)"
        if passed is not None:
            lines.append(f"- **{level.value}**: passed, {passed.at[:10]}, entry "
                         f"{passed.number}{now}")
        elif holds and holder is not None and holder.kind is MoveKind.OVERRIDDEN:
            lines.append(f"- **{level.value}**: **OVERRIDDEN** by {holder.by}, {holder.at[:10]}, "
                         f"entry {holder.number}: {holder.reason}")
    registration = history.registration(version)
    return "\n".join([*(lines or ["No level passed."]), "",
                      registration.note if registration else ""])


def definition(
    gates: Sequence[ValidationGate], confidence: float | None
) -> dict[str, Any]:
    """Return what decides a level: its gates and the confidence, as a record."""
    return {"confidence": confidence, "gates": [
        {"name": gate.name, "metric_name": gate.metric_name, "comparison": gate.comparison,
         "threshold": gate.threshold, "required": gate.required}
        for gate in sorted(gates, key=lambda gate: gate.name)
    ]}


def definition_sha256(gates: Sequence[ValidationGate], confidence: float | None) -> str:
    """Return the hash of a level's definition."""
    return text_digest(json.dumps(definition(gates, confidence), sort_keys=True))


def verdict_tags(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return gate decisions as a version's tags."""
    return {f"gate.{row['level']}.{row['gate']}": _verdict_text(row) for row in rows}


def _verdict_text(row: Mapping[str, Any]) -> str:
    value = "not measured" if row["value"] is None else f"{row['metric']} = {row['value']:.6g}"
    verdict = {"pass": "passed", "fail": "failed"}.get(row["decision"], row["decision"])
    return f"{verdict}: {value}, must be {row['comparison']} {row['threshold']:g}"
