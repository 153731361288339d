"""From a version to all that made it: run, config, code, data, tokenizer, parents, verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from svend.pipeline.moves import History, Moves
from svend.pipeline.tags import PARENT_SCALE_TAG, SWEEP_TAG
from svend.pipeline.verified_version import open_registered
from svend.tracking.registry import open_version
from svend.tracking.runs import runs_with_tags, tags_of


@dataclass(frozen=True)
class Lineage:
    """What made a version, as (what, value) pairs in the order in which people ask."""

    name: str
    version: str
    facts: list[tuple[str, str]]

    def record(self) -> dict[str, Any]:
        """Return the lineage as plain values; what has several values as a list."""
        told: dict[str, Any] = {"model": self.name, "version": self.version}
        for what, value in self.facts:
            key = what.replace(" ", "_")
            told[key] = value if key not in told else [
                *(told[key] if isinstance(told[key], list) else [told[key]]), value
            ]
        return told


def trace(uri: str) -> Lineage:
    """Return what made the version that `models:/name/3` or `models:/name@alias` stands for."""
    opened = open_version(uri)
    history = Moves.find(opened.name).history()
    opened, registration = open_registered(opened.name, history, opened.version)
    run = tags_of(opened.run_id) if opened.run_id else {}
    dirty = " with uncommitted changes" if run.get("svend.git_dirty") == "true" else ""
    facts = [
        ("stage", history.stage(opened.version)),
        ("run", f"{opened.run_id} ({run.get('mlflow.runName', 'gone')})"),
        ("experiment", opened.experiment),
        ("config", f"runs:/{opened.run_id}/config.yaml"),
        ("git commit", f"{run.get('svend.git_commit', 'not under version control')}{dirty}"),
        ("svend", run.get("svend.version", "unknown")),
        ("recipe", run.get("svend.recipe", "unknown")),
        ("data fingerprint", registration.data_fingerprint),
        ("tokenizer sha256", registration.tokenizer_sha256),
        ("checkpoint sha256", registration.checkpoint_sha256),
        ("step", str(registration.step)),
        ("parent scale run", run.get(PARENT_SCALE_TAG, "none")),
        ("sweep run", run.get(SWEEP_TAG, "none")),
    ]
    for run_id, tags in runs_with_tags({"svend.model": f"models:/{opened.name}/{opened.version}"}):
        facts.append(("evaluated by", f"{run_id} ({tags.get('mlflow.runName', '')})"))
    return Lineage(opened.name, opened.version, facts + _verdicts(history, opened.version))


def _verdicts(history: History, version: str) -> list[tuple[str, str]]:
    facts = []
    for move in history.moves:
        if move.version != version or move.level is None:
            continue
        told = f"{move.level.value} {move.kind.value} {move.at[:19]}Z by {move.by}"
        verdict = history.verdict(move)
        if verdict is not None:
            told += ": " + "; ".join(
                f"{row['metric']} "
                + ("not measured" if row["value"] is None else f"{row['value']:.4g}")
                + f" ({row['comparison']} {row['threshold']:g}"
                + ("" if row["sample_size"] is None else f", n = {row['sample_size']}")
                + f", run {(row['run_id'] or 'unknown')[:8]})"
                for row in verdict["rows"]
            )
        facts.append(("verdict", told + (f"; {move.reason}" if move.reason else "")))
    return facts
