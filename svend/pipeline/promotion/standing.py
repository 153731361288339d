"""How things stand before a move: which version is meant, and is the record in force?"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console

from svend.errors import UserError
from svend.pipeline.moves import LEVELS, History, Moves
from svend.pipeline.validation import GateLevel
from svend.tracking.registry import aliases_of

# An alias follows its record within moments.
ALIAS_LOOKS, ALIAS_PAUSE_SECONDS = 6, 0.25


def finish_moves(moves: Moves, console: Console) -> None:
    """Carry out what another process put on record and did not come to carry out."""
    for move in moves.carry_out():
        console.print(
            f"finished entry {move.number}, which was interrupted: version {move.version} "
            f"{move.kind.value}" + (f", {move.level.value}" if move.level else "")
        )


def newest_below(history: History, model: str, level: GateLevel) -> str:
    """Return the newest version that has passed the level below, and not the level itself."""
    place = LEVELS.index(level)
    for version in history.registered():
        if history.passed(version, level) is None and (
            place == 0 or history.passed(version, LEVELS[place - 1])
        ):
            return version
    below = f"waits with the level {LEVELS[place - 1].value}" if place else "is without it"
    raise UserError(
        f"{model}: no version {below} for {level.value}; give the version, and it climbs from "
        f"where it is (svend history {model} shows what there is)"
    )


def next_level(history: History, model: str, version: str | None) -> GateLevel:
    """Return the level above what a version, or the newest, has passed.

    Raises UserError if there is none.
    """
    registered = history.registered()
    chosen = version or (registered[0] if registered else None)
    if chosen is None:
        raise UserError(f"{model}: has no version on record")
    for level in LEVELS:
        if history.passed(chosen, level) is None:
            return level
    raise UserError(f"{model}: version {chosen} has passed every level; there is none above")


def check_aliases(moves: Moves, levels: Sequence[GateLevel]) -> None:
    """Raise UserError if an alias is not where the record has it, and stays so.

    For a moment it may not be, while another promotion is at work.
    """
    for attempt in range(ALIAS_LOOKS):
        before = moves.history()
        aliases = aliases_of(moves.model)
        history = moves.history()
        differing = [level for level in levels if aliases.get(level.value)
                     != (holder.version if (holder := history.holder(level)) else None)]
        at_work = before.record.head != history.record.head or any(
            not move.done for move in history.moves
        )
        if not differing:
            return
        if at_work or attempt < ALIAS_LOOKS - 1:
            time.sleep(ALIAS_PAUSE_SECONDS)
    if at_work:
        return  # whoever is at work is told of, where that matters, before anything is moved
    level = differing[0]
    holder, found = history.holder(level), aliases.get(level.value)
    raise UserError(
        f"{moves.model}: the alias {level.value} points at "
        f"{'no version' if found is None else f'version {found}'}, on record is "
        f"{'none' if holder is None else f'version {holder.version}'}: it was moved by other "
        f"means; svend audit --model {moves.model} --repair puts it back"
    )
