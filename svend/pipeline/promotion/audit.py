"""Is every alias backed by a verdict on the very weights it points at, and is the record whole?"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from svend.errors import UserError
from svend.pipeline.config import GatesConfig, ValidationGate
from svend.pipeline.moves import (
    LEVELS,
    History,
    Move,
    MoveKind,
    Moves,
    definition_sha256,
    verdict_tags,
)
from svend.pipeline.promotion.climb import PROMOTION_TAG
from svend.pipeline.promotion.evidence import LOGGED_AS, NONFINITE
from svend.pipeline.promotion.standing import ALIAS_PAUSE_SECONDS
from svend.pipeline.validation import GateLevel, GateResult, Measurement
from svend.pipeline.verified_version import verify_files
from svend.tracking.ledger import NO_ENTRY, Ledger, text_digest
from svend.tracking.registry import (
    aliases_of,
    drop_alias,
    open_version,
    set_alias,
    tags_of_version,
)
from svend.tracking.runs import run_shows, runs_with_tags

# Overrides that say where things are, or how fast, and change no value.
WHEREABOUTS = {
    "evaluation.paths", "evaluation.batch_size", "data.path", "data.heldout_path",
    "data.cache_dir", "training.data.path", "training.data.heldout_path",
    "training.data.cache_dir", "training.device", "training.precision",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it must be. kind: a word for programs, such as `alias`."""

    model: str
    kind: str
    detail: str
    version: str | None = None
    level: str | None = None

    def record(self) -> dict[str, Any]:
        """Return the finding as plain values."""
        return asdict(self)


def audit_model(model: str, gates: GatesConfig) -> list[Finding]:
    """Check a model's record, aliases, verdicts, versions and their files against one another.

    gates: today's definition; a level that was passed by another is named.
    """
    ledger = Ledger.find(model)
    levels = {level.value for level in LEVELS}
    if ledger is None:
        return [
            Finding(model, "no record", "was not registered by Svend: nothing backs this alias",
                    version, alias)
            for alias, version in aliases_of(model).items() if alias in levels
        ]
    try:
        history = Moves(ledger).history()
    except UserError as error:
        return [Finding(model, "no record", str(error))]
    return [
        *_check_chain(model, history),
        *_check_runs(model, ledger.run_id, history),
        *_check_aliases(model),
        *_check_holders(model, history, gates),
        *_check_versions(model, history),
    ]


def repair_aliases(model: str) -> list[str]:
    """Put the aliases of the levels where the record has them; return what was done."""
    moves = Moves.find(model)
    done = [f"finished entry {move.number}" for move in moves.carry_out()]
    history, aliases = moves.history(), aliases_of(model)
    for level in LEVELS:
        holder, found = history.holder(level), aliases.get(level.value)
        if holder is not None and found != holder.version:
            set_alias(model, level.value, holder.version)
            done.append(f"{level.value}: from {found or 'nowhere'} to version {holder.version}")
        elif holder is None and found is not None:
            drop_alias(model, level.value)
            done.append(f"{level.value}: taken from version {found}")
    return done


def _check_chain(model: str, history: History) -> Iterator[Finding]:
    """Name entries that are lost, changed or not readable, and moves that were not carried out."""
    previous, expected = NO_ENTRY, 1
    for entry in history.record.entries:
        if entry.number != expected:
            missing = (f"entry {expected} is" if entry.number == expected + 1
                       else f"entries {expected} to {entry.number - 1} are")
            yield Finding(model, "lost record", f"{missing} missing from the ledger")
        elif (entry.content or {}).get("previous") != previous:
            yield Finding(
                model, "tampered record",
                f"entry {entry.number} does not follow entry {entry.number - 1} as that is now: "
                "one of them was changed",
            )
        previous, expected = entry.sha256, entry.number + 1
    for complaint in history.unreadable:
        yield Finding(model, "tampered record", complaint)
    for digest, text in history.record.texts.items():
        if text_digest(text) != digest:
            yield Finding(model, "tampered record", f"text {digest[:12]} has another hash")
    for move in history.moves:
        if not move.done:
            yield Finding(
                model, "half-moved", f"entry {move.number} ({move.kind.value}) was not carried "
                "out: the process ended before; the next promotion or --repair does", move.version,
                move.level and move.level.value,
            )


def _check_runs(model: str, ledger_run_id: str, history: History) -> Iterator[Finding]:
    """Name promotions whose runs ended well and that the record knows nothing of."""
    known = {str(move.number): move.run_id for move in history.moves}
    for run_id, tags in runs_with_tags({PROMOTION_TAG: model}):
        wrote = tags.get("svend.entries", "").split()
        lost = [number for number in wrote if known.get(number) != run_id]
        if tags.get("svend.ledger_run_id", ledger_run_id) != ledger_run_id:
            yield Finding(model, "lost record", f"run {run_id} wrote to another ledger, "
                          f"{tags['svend.ledger_run_id']}, than the model names now")
        elif lost:
            yield Finding(model, "lost record",
                          f"run {run_id} made the entries {', '.join(lost)}: they are not there")


def _check_aliases(model: str) -> Iterator[Finding]:
    """Name aliases that are not where the record has them, and stay so for a moment."""
    for look in range(2):
        aliases, history = aliases_of(model), Moves.find(model).history()
        holders = {level.value: holder.version for level in LEVELS
                   if (holder := history.holder(level))}
        if {name: aliases.get(name) for name in holders} == holders or look:
            break
        time.sleep(ALIAS_PAUSE_SECONDS)
    pending = {move.level for move in history.moves if not move.done}
    for level in LEVELS:
        holder, found = history.holder(level), aliases.get(level.value)
        recorded = holder.version if holder else None
        if found == recorded or level in pending:
            continue
        there = "no version" if found is None else f"version {found}"
        record = "none" if recorded is None else f"version {recorded}"
        yield Finding(model, "alias", f"points at {there}, on record is {record}: it was moved "
                      "outside of Svend", found, level.value)


def _check_holders(model: str, history: History, gates: GatesConfig) -> Iterator[Finding]:
    """Name the levels whose holder is not backed by a passing verdict on its weights."""
    for level in LEVELS:
        holder = history.holder(level)
        if holder is None:
            continue
        move = history.passed(holder.version, level)
        if holder.kind is MoveKind.OVERRIDDEN and (move is None or move.number < holder.number):
            yield Finding(model, "override", f"by {holder.by} at {holder.at[:19]}Z: "
                          f"{holder.reason}", holder.version, level.value)
            continue
        refused = [m for m in history.moves if m.kind is MoveKind.REFUSED and m.level is level
                   and m.version == holder.version and m.number > holder.number]
        if move is None and refused:
            yield Finding(model, "refused since", f"was decided again and did not pass, entry "
                          f"{refused[-1].number} of {refused[-1].at[:10]}", holder.version,
                          level.value)
        for kind, detail in _objections(history, holder, move or holder, level, gates):
            yield Finding(model, kind, detail, holder.version, level.value)


def _objections(
    history: History, holder: Move, move: Move, level: GateLevel, gates: GatesConfig
) -> Iterator[tuple[str, str]]:
    """Say what is wrong with the verdict that a level's holder rests on."""
    verdict, registration = history.verdict(move), history.registration(holder.version)
    if verdict is None:
        yield "no verdict", f"entry {move.number} has no verdict that is intact"
        return
    if registration is None:
        yield "no verdict", "the version's registration is not on record"
        return
    if verdict["level"] != level.value:
        yield "no verdict", f"the verdict of entry {move.number} is on {verdict['level']}"
    if any(row["checkpoint_sha256"] != registration.checkpoint_sha256 for row in verdict["rows"]):
        yield "no verdict", f"the verdict of entry {move.number} is on other weights"
    rows = {row["gate"]: row for row in verdict["rows"]}
    for told in verdict["definition"]["gates"]:
        row = rows.get(told["name"])
        if told["required"] and not (row and _passes(row, told)):
            yield "no verdict", f"the verdict of entry {move.number} does not pass {told['name']}"
    today = definition_sha256(getattr(gates, level.value), gates.confidence)
    if verdict["definition_sha256"] != today:
        yield "other gates", (
            f"was passed by another definition of {level.value} than today's: "
            f"{_definition_text(verdict['definition'])}; svend promote --to {level.value} decides "
            "it again"
        )
    told = [f"{key} = {value}" for key, value in verdict["overrides"] if key not in WHEREABOUTS]
    if told:
        yield "other settings", (
            f"was decided with {', '.join(told)}, which are not the version's own; svend promote "
            "without them decides it again"
        )
    for row in verdict["rows"]:
        name = LOGGED_AS.get(row["metric"], f"eval/{row['metric']}")
        if row["value"] is not None and row["metric"] != NONFINITE and not run_shows(
            row["run_id"], name, row["value"]
        ):
            yield "no measurement", (
                f"run {row['run_id']} does not show {row['metric']} = {row['value']:.6g}"
            )


def _passes(row: Mapping[str, Any], told: Mapping[str, Any]) -> bool:
    """Decide a gate again on the recorded value and bounds."""
    if row["value"] is None:
        return False
    gate = ValidationGate(**told)
    values = ([row["value"]] if row["low_bound"] is None
              else [row["low_bound"], row["high_bound"]])
    return all(GateResult(gate, Measurement(value)).passed for value in values)


def _definition_text(told: Mapping[str, Any]) -> str:
    text = ", ".join(
        f"{gate['metric_name']} {gate['comparison']} {gate['threshold']:g}"
        + ("" if gate["required"] else " (advisory)") for gate in told["gates"]
    )
    confidence = told["confidence"]
    return text if confidence is None else f"{text} at confidence {confidence:g}"


def _check_versions(model: str, history: History) -> Iterator[Finding]:
    """Name versions that are gone, whose files are not what was registered, or whose tags lie."""
    holders = {holder.version for level in LEVELS if (holder := history.holder(level))}
    for version in history.registered():
        tags = tags_of_version(model, version)
        if tags is None:
            if version in holders:
                yield Finding(model, "gone", "holds a level, and is not in the registry any more",
                              version)
            continue
        registration = history.registration(version)
        assert registration is not None  # it is on record as registered
        if tags.get("svend.checkpoint_sha256") != registration.checkpoint_sha256:
            yield Finding(model, "tampered tag", "svend.checkpoint_sha256 is not what was "
                          "registered", version)
        if all(move.done for move in history.moves):
            if tags.get("svend.stage") != history.stage(version):
                yield Finding(model, "tampered tag", f"svend.stage is {tags.get('svend.stage')}, "
                              f"on record is {history.stage(version)}", version)
            yield from _check_verdict_tags(model, history, version, tags)
        try:
            verify_files(open_version(f"models:/{model}/{version}"), registration)
        except UserError as error:
            yield Finding(model, "files", str(error), version)


def _check_verdict_tags(
    model: str, history: History, version: str, tags: Mapping[str, str]
) -> Iterator[Finding]:
    recorded: dict[str, str] = {}
    for move in history.moves:
        verdict = history.verdict(move)
        if move.version == version and verdict is not None:
            recorded |= verdict_tags(verdict["rows"])
    for name, text in recorded.items():
        if tags.get(name) != text:
            yield Finding(model, "tampered tag", f"{name} is '{tags.get(name)}', on record is "
                          f"'{text}'", version)
