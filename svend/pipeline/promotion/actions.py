"""What the commands about the registry do, and what they print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from svend.command import tell_next
from svend.pipeline.config import GatesConfig
from svend.pipeline.console import make_console
from svend.pipeline.moves import LEVELS, Move, MoveKind, Moves
from svend.pipeline.progress import CountProgress
from svend.pipeline.promotion import climb
from svend.pipeline.promotion.audit import audit_model, repair_aliases
from svend.pipeline.promotion.lineage import trace
from svend.pipeline.promotion.standing import next_level
from svend.pipeline.validation import GateLevel
from svend.tracking.ledger import registered_models
from svend.tracking.store_errors import told_by_the_store


def promote(
    model: str, version: str | None, to: str | None, gates: GatesConfig,
    overrides: Sequence[tuple[str, str]],
) -> list[dict[str, Any]]:
    """Have a version climb to a level, or to the one above its own; print what was moved."""
    with told_by_the_store(f"promotion of {model}"):
        level = (next_level(Moves.find(model).history(), model, version)
                 if to is None else GateLevel(to))
        promotion = climb.Promotion(
            model=model, to=level, version=version, gates=gates, overrides=overrides
        )
        moved = climb.Climb(promotion, make_console()).run()
    return _show_moved(model, moved)


def override(model: str, version: str | None, to: str, reason: str) -> list[dict[str, Any]]:
    """Move an alias without a verdict; print what was moved."""
    with told_by_the_store(f"promotion of {model}"):
        moved = climb.override(model, version, GateLevel(to), reason, make_console())
    return _show_moved(model, [moved])


def roll_back(model: str, level: str, reason: str | None) -> list[dict[str, Any]]:
    """Give a level back to its last holder; print what was moved."""
    with told_by_the_store(f"roll-back of {model}"):
        moved = climb.roll_back(model, GateLevel(level), reason, make_console())
    return _show_moved(model, [moved])


def show_history(model: str) -> list[dict[str, Any]]:
    """Print every move of a model, and who holds what; return the moves."""
    with told_by_the_store(f"history of {model}"):
        history = Moves.find(model).history()
    table = Table(title=f"Moves of {model}", title_justify="left")
    table.add_column("", justify="right", overflow="fold")
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
    if history.moves:
        tell_next(f"lineage models:/{model}/{history.moves[-1].version}")
    return [
        {**move.content(), "number": move.number, "decided": history.verdict(move)}
        for move in history.moves
    ]


def audit(model: str | None, gates: GatesConfig, *, repair: bool) -> list[dict[str, Any]]:
    """Check one model or the whole registry; print and return what is found."""
    console = make_console()
    with told_by_the_store("audit"):
        names = [model] if model else registered_models()
        repaired = {name: repair_aliases(name) for name in names} if repair else {}
        findings = []
        with CountProgress(console, "audited") as progress:
            for number, name in enumerate(names, 1):
                findings += audit_model(name, gates)
                progress.advance("models", number, len(names))
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
    if findings and not repair:
        tell_next("audit", *(["--model", model] if model else []), "--repair")
    return [finding.record() for finding in findings]


def show_lineage(uri: str) -> dict[str, Any]:
    """Print what made a version, and return it."""
    with told_by_the_store(f"lineage of {uri}"):
        lineage = trace(uri)
    table = Table(title=f"{lineage.name} version {lineage.version}", show_header=False,
                  title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for what, value in lineage.facts:
        table.add_row(what, escape(value))
    make_console().print(table)
    tell_next(f"history {lineage.name}")
    return lineage.record()


def _show_moved(model: str, moved: Sequence[Move]) -> list[dict[str, Any]]:
    console = make_console()
    for move in moved:
        assert move.level is not None  # a registration is not made here
        former = f", before it version {move.former}" if move.former not in (
            None, move.version) else ""
        console.print(
            f"{model} version {move.version}: {move.kind.value}, {move.level.value}{former} "
            f"(entry {move.number})", soft_wrap=True, markup=False,
        )
    highest = moved[-1].level if moved else None
    tell_next(f"history {model}" if highest is None else f"serve models:/{model}@{highest.value}")
    return [{**move.content(), "number": move.number} for move in moved]


def _summary(verdict: Mapping[str, Any] | None) -> str:
    return "" if verdict is None else ", ".join(
        f"{row['metric']} " + ("not measured" if row["value"] is None else f"{row['value']:.4g}")
        for row in verdict["rows"]
    )
