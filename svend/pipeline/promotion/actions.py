"""What the commands about the registry do, and what they print."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from svend.pipeline.config import GatesConfig
from svend.pipeline.moves import LEVELS, Move, MoveKind, Moves
from svend.pipeline.promotion import climb
from svend.pipeline.promotion.audit import audit_model, repair_aliases
from svend.pipeline.promotion.lineage import trace
from svend.pipeline.promotion.standing import next_level
from svend.pipeline.report import make_console
from svend.pipeline.validation import GateLevel
from svend.tracking.ledger import registered_models
from svend.tracking.store_errors import told_by_the_store


def promote(
    model: str, version: str | None, to: str | None, gates: GatesConfig,
    overrides: Sequence[tuple[str, str]],
) -> None:
    """Have a version climb to a level, or to the one above its own; print what was moved."""
    with told_by_the_store(f"promotion of {model}"):
        level = (next_level(Moves.find(model).history(), model, version)
                 if to is None else GateLevel(to))
        promotion = climb.Promotion(
            model=model, to=level, version=version, gates=gates, overrides=overrides
        )
        moved = climb.Climb(promotion, make_console()).run()
    _show_moved(model, moved)


def override(model: str, version: str | None, to: str, reason: str) -> None:
    """Move an alias without a verdict; print what was moved."""
    with told_by_the_store(f"promotion of {model}"):
        moved = climb.override(model, version, GateLevel(to), reason, make_console())
    _show_moved(model, [moved])


def roll_back(model: str, level: str, reason: str | None) -> None:
    """Give a level back to its last holder; print what was moved."""
    with told_by_the_store(f"roll-back of {model}"):
        moved = climb.roll_back(model, GateLevel(level), reason, make_console())
    _show_moved(model, [moved])


def show_history(model: str, *, as_json: bool) -> None:
    """Print every move of a model, and who holds what."""
    with told_by_the_store(f"history of {model}"):
        history = Moves.find(model).history()
    if as_json:
        print(json.dumps([
            {**move.content(), "number": move.number, "decided": history.verdict(move)}
            for move in history.moves
        ]))
        return
    table = Table(title=f"Moves of {model}", title_justify="left")
    table.add_column("", justify="right")
    for name in ("time (UTC)", "by", "level", "from", "to"):
        table.add_column(name, no_wrap=name != "by", overflow="fold")
    for name in ("what", "verdict; reason"):
        table.add_column(name, overflow="fold")
    for move in history.moves:
        told = filter(None, (_summary(history.verdict(move)), move.reason))
        table.add_row(
            str(move.number), move.at[:19].replace("T", " "), escape(move.by),
            move.level.value if move.level else "", move.former or "", move.version,
            move.kind.value, escape("; ".join(told)),
            style="yellow" if move.kind is MoveKind.OVERRIDDEN else None,
        )
    console = make_console()
    console.print(table)
    for level in LEVELS:
        holder = history.holder(level)
        if holder is not None:
            overridden = ", overridden" if holder.kind is MoveKind.OVERRIDDEN else ""
            console.print(f"{level.value}: version {holder.version}{overridden}")


def audit(model: str | None, gates: GatesConfig, *, repair: bool, as_json: bool) -> int:
    """Check one model or the whole registry; print what is found; return 1 if anything is."""
    console = make_console()
    with told_by_the_store("audit"):
        names = [model] if model else registered_models()
        repaired = {name: repair_aliases(name) for name in names} if repair else {}
        findings = [finding for name in names for finding in audit_model(name, gates)]
    if as_json:
        print(json.dumps([finding.record() for finding in findings]))
        return min(1, len(findings))
    for name, done in repaired.items():
        for line in done:
            console.print(f"repaired {name}: {line}", soft_wrap=True, markup=False)
    for finding in findings:
        where = finding.model + (f" version {finding.version}" if finding.version else "")
        where += f" {finding.level}" if finding.level else ""
        console.print(f"{finding.kind:<15}  {where}: {finding.detail}", markup=False,
                      soft_wrap=True)
    audited = f"audited {len(names)} model{'' if len(names) == 1 else 's'}"
    console.print(
        f"{audited}: {len(findings)} found" if findings else
        f"{audited}: every alias is backed by a verdict on its weights, and every record is whole"
    )
    return min(1, len(findings))


def show_lineage(uri: str, *, as_json: bool) -> None:
    """Print what made a version."""
    with told_by_the_store(f"lineage of {uri}"):
        lineage = trace(uri)
    if as_json:
        print(json.dumps(lineage.record()))
        return
    table = Table(title=f"{lineage.name} version {lineage.version}", show_header=False,
                  title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for what, value in lineage.facts:
        table.add_row(what, escape(value))
    make_console().print(table)


def _show_moved(model: str, moved: Sequence[Move]) -> None:
    console = make_console()
    for move in moved:
        assert move.level is not None  # a registration is not made here
        former = f", before it version {move.former}" if move.former not in (
            None, move.version) else ""
        console.print(
            f"{model} version {move.version}: {move.kind.value}, {move.level.value}{former} "
            f"(entry {move.number})", soft_wrap=True, markup=False,
        )
    console.print(f"svend history {model} shows every move, svend audit checks them")


def _summary(verdict: Mapping[str, Any] | None) -> str:
    return "" if verdict is None else ", ".join(
        f"{row['metric']} " + ("not measured" if row["value"] is None else f"{row['value']:.4g}")
        for row in verdict["rows"]
    )
