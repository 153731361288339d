"""The GPU report as files: report.md for people, report.json with every figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from svend import __version__
from svend.bench.gpu_report import Figure, Outcome, Verdict

MARKDOWN, JSON = "report.md", "report.json"
# Of the parts that measure a scale, side by side.
SCALE_COLUMNS = {
    "planned peak of tensors": "planned GB", "measured peak of tensors": "measured GB",
    "measured over planned": "ratio", "tokens per second": "tokens/s",
    "MFU, of the measured peak": "MFU, measured peak",
    "MFU, of the nominal peak": "MFU, nominal peak",
}


def write_report(
    folder: Path, outcomes: Sequence[Outcome], about: dict[str, str], *, rehearsal: bool
) -> str:
    """Write both files, each whole or as it was; return the page."""
    page = report_page(outcomes, about, rehearsal=rehearsal)
    tree = {
        "rehearsal": rehearsal, "svend": __version__, **about,
        "parts": [outcome.to_tree() for outcome in outcomes],
    }
    _replace(folder / JSON, json.dumps(tree, indent=1) + "\n")
    _replace(folder / MARKDOWN, page)
    return page


def report_page(
    outcomes: Sequence[Outcome], about: dict[str, str], *, rehearsal: bool
) -> str:
    """Return the report: a verdict for each part, the scales side by side, then every figure."""
    title = "# Rehearsal of the GPU report, on a CPU" if rehearsal else "# GPU report"
    lines = [title, ""]
    if rehearsal:
        lines += ["In miniature, to try the report itself. **Nothing here was run on a GPU.**", ""]
    lines += [f"Svend {__version__}. " + ". ".join(f"{k}: {v}" for k, v in about.items()) + ".", ""]
    counts = {v: sum(o.verdict is v for o in outcomes) for v in Verdict}
    lines += [", ".join(f"{count} {v.value}" for v, count in counts.items() if count) + ".", ""]
    lines += ["| part | verdict | s | why |", "|---|---|---|---|"]
    lines += [
        f"| {o.part} | {o.verdict.value} | {o.seconds:.1f} | {_cell(o.reason)} |" for o in outcomes
    ]
    lines += _scale_table(outcomes)
    for outcome in outcomes:
        if outcome.figures:
            lines += ["", f"## {outcome.part}", "", "| | | bounds |", "|---|---|---|"]
            lines += [
                f"| {figure.name} | {_cell(str(figure))}{'' if figure.holds else ' **off**'} | "
                f"{figure.bounds} |" for figure in outcome.figures
            ]
    return "\n".join(lines) + "\n"


def _scale_table(outcomes: Sequence[Outcome]) -> list[str]:
    rows = []
    for outcome in outcomes:
        found = {figure.name: figure for figure in outcome.figures}
        if outcome.part.startswith("scale ") and found:
            name = outcome.part.removeprefix("scale ")
            values = [_value(found.get(column)) for column in SCALE_COLUMNS]
            rows.append(f"| {name} | {' | '.join(values)} |")
    if not rows:
        return []
    heading = f"| scale | {' | '.join(SCALE_COLUMNS.values())} |"
    return ["", "## Scales", "", heading, "|---" * (1 + len(SCALE_COLUMNS)) + "|", *rows]


def _value(figure: Figure | None) -> str:
    if figure is None:
        return ""
    return figure.value if isinstance(figure.value, str) else f"{figure.value:,.4g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _replace(path: Path, content: str) -> None:
    writing = path.with_name(f".writing-{path.name}")
    writing.write_text(content, encoding="utf-8")
    writing.replace(path)
