"""The page of a comparison: one HTML file that loads nothing, for a screen, a phone and paper."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from svend.pipeline.compare.figures import Comparison, Figure
from svend.pipeline.compare.predictions import (
    COMPARED,
    NOT_AT_ITS_END,
    came_true,
    differences,
    shown_value,
)
from svend.pipeline.compare.runs import LEVELS, NOT_ASKED, NOT_DECIDED, benchmark_names

STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;padding:0 14px 3em;max-width:62em;color:#222;
overflow-wrap:break-word}
h1{font-size:1.5em}h2{font-size:1.2em;margin:1.8em 0 .4em;border-bottom:1px solid #ccc}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.87em;margin:.5em 0}
td,th{border:1px solid #ccc;padding:3px 8px;text-align:right;vertical-align:top}
th{background:#f3f3f3;font-weight:600}td:first-child,th:first-child{text-align:left}
td:first-child{position:sticky;left:0;background:#fff}
td small{display:block;color:#444;white-space:nowrap}
figure{margin:.8em 0;max-width:44em}img{width:100%;height:auto;display:block}
figcaption{font-size:.85em;color:#444}
.alike,.pass,.inside{background:#d4efd4}.differ,.fail,.above{background:#f8c8c8}
.warn,.undecided{background:#fdebc8}.below{background:#d3e5f8}
.none{color:#666;font-style:italic;background:#fafafa}
p.alike,p.differ{padding:.5em .8em}li{overflow-wrap:anywhere}
@page{margin:14mm}
@media print{body{font-size:10pt;max-width:none;padding:0}.scroll{overflow:visible}
table{font-size:8pt}td,th{padding:1px 4px}td small{white-space:normal}
figure,tr,p{break-inside:avoid}h2{break-after:avoid}
figure{max-width:13cm}*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""
NOT_LOGGED = "not logged"
CLASSES = {"FAIL": "fail", NOT_DECIDED: "none", NOT_ASKED: "none", NOT_AT_ITS_END: "none",
           "no interval": "none"}
# What a run should have logged, and when it would have.
AT_ITS_END = "a run logs it as it finishes"
EXPECTED = {
    "train_loss": ("training loss", ""), "heldout_loss": ("held-out loss", ""),
    "planned_memory_gb": ("planned memory", ""), "planned_seconds": ("planned time", ""),
    "tokens_per_second": ("speed", ""), "device": ("device", ""),
    "matrix_parameters": ("the model's shape", ""),
    "memory_gb": ("measured memory", AT_ITS_END), "seconds": ("measured time", AT_ITS_END),
    **{column: (name, "") for column, name in COMPARED.items()},
}


@dataclass(frozen=True)
class Cell:
    """A table's cell: text, a second line beneath it, and the class that colours it."""

    text: str
    below: str = ""
    kind: str = ""


def comparison_html(
    comparison: Comparison, figures: Sequence[Figure], folder: Path, made: str,
    pages: Sequence[tuple[str, str]],
) -> str:
    """Return the page.

    folder: where the figures lie. made: when, by which version. pages: where else to look, as a
    label and an address.
    """
    drawn = {figure.name: _figure(figure, folder) for figure in figures}
    runs = comparison.runs
    sections = [
        ("Runs", _overview(runs)),
        ("Loss", drawn.get("loss_by_tokens", "") + drawn.get("loss_by_flops", "")),
        ("The scaling law", _law(comparison) + drawn.get("fit", "")),
        ("What was predicted, and what came true", _predictions(runs) + drawn.get("predicted", "")),
        ("Gates", _gate_matrix(comparison)),
        ("Planned and measured", _planned(runs) + drawn.get("planned", "")),
        ("Benchmarks", _benchmarks(runs) + drawn.get("accuracy", "")),
        ("Cost", _cost(runs, comparison.gpu_hour_price)),
        ("What is missing", _list(missing_lines(comparison)) or "<p>Nothing.</p>"),
        ("Elsewhere", _list(f"{label}: {address}" for label, address in pages)),
    ]
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections if content)
    count = count_runs(runs)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Comparison of {count}</title><style>{STYLE}</style></head><body>"
        f"<h1>Comparison of {count}</h1><p>{html.escape(made)}</p>{_comparability(runs)}"
        f"{_left_out(comparison.left_out)}{body}</body></html>\n"
    )


def count_runs(runs: pd.DataFrame) -> str:
    """Return how many runs there are, in words."""
    return "1 run" if len(runs) == 1 else f"{len(runs)} runs"


def comparability_line(runs: pd.DataFrame) -> str:
    """Say whether the runs' losses can be held against one another, and if not, why not."""
    if len(runs) == 1:
        return "One run: there is nothing to hold it against."
    others = differences(runs)
    if not others:
        shared = ", ".join(f"{name} {shown_value(column, runs[column].iloc[0])}"
                           for column, name in COMPARED.items())
        return f"Comparable: all runs share {shared}."
    parts = [
        f"{name}: " + "; ".join(f"{value} ({', '.join(having)})" for value, having in of.items())
        for name, of in others.items()
    ]
    return "Losses are not directly comparable. The runs differ in " + ". ".join(parts) + "."


def missing_lines(comparison: Comparison) -> list[str]:
    """Return a line for each thing that some run did not log, and whose it is."""
    runs, gates, lines = comparison.runs, comparison.gates, []
    for column, (name, when) in EXPECTED.items():
        lacking = runs[runs[column].isna()]
        if not lacking.empty:
            whose = ", ".join(f"{run} ({status})" for run, status in zip(
                lacking["run"], lacking["status"], strict=True))
            lines.append(f"{name}: {NOT_LOGGED} by {whose}" + (f"; {when}" if when else ""))
    undecided = gates[gates["decision"] == NOT_DECIDED]
    for run, rows in undecided.groupby("run", sort=False):
        names = ", ".join(f"{row['level']}/{row['gate']} (must be {row['must_be']})"
                          for row in rows.to_dict("records"))
        lines.append(f"gates without a decision, {run}: {names}")
    if comparison.fit.law is None:
        lines.append(f"a scaling law: {comparison.fit.why_not}")
    return lines


def _comparability(runs: pd.DataFrame) -> str:
    alike = len(runs) > 1 and not differences(runs)
    kind = "alike" if alike else "differ" if len(runs) > 1 else "none"
    return f'<p class="{kind}">{html.escape(comparability_line(runs))}</p>'


def _left_out(lines: Sequence[str]) -> str:
    return f"<p>Left out:</p>{_list(lines)}" if lines else ""


def _overview(runs: pd.DataFrame) -> str:
    return _table(
        ["run", "status", "parameters", "tokens", "FLOPs", "held-out loss", "bits per byte",
         "ladder"],
        [[_text(row["run"], below=f"{row['name']} {row['run_id'][:8]}"), _text(row["status"]),
          _number(row["parameters"], _count), _number(row["tokens"], _count),
          _number(row["flops"], _short), _number(row["heldout_loss"], _loss),
          _number(row["bits_per_byte"], _loss), _ladder(row)] for row in _records(runs)],
    )


def _ladder(row: dict[str, Any]) -> Cell:
    if not isinstance(row["ladder"], str):
        return Cell("not of a ladder", kind="none")
    verdict = row["ladder_verdict"]
    return Cell(row["ladder"], verdict if isinstance(verdict, str) else "no verdict yet")


def _law(comparison: Comparison) -> str:
    fit = comparison.fit
    if fit.law is None:
        return f"<p>No law is fitted: {html.escape(fit.why_not)}.</p>"
    rungs = len({point.rung for point in fit.points})
    text = (f"<p>L(N, D) = {html.escape(str(fit.law))}, fitted to {len(fit.points)} horizons of "
            f"{rungs} runs; N counts the blocks and the output head, D tokens.</p>")
    if fit.tested.empty:
        return text + "<p>How well it predicts a rung cannot be tested: too few runs.</p>"
    tested = [
        [_text(rung), _text("from all others" if how == "others" else "from those below"),
         Cell(f"{len(rows)}"), _number(float(rows["error"].abs().max()), "{:.2%}".format),
         Cell(f"{int(rows['measured'].between(rows['low'], rows['high']).sum())} of {len(rows)}")]
        for (rung, how), rows in fit.tested.groupby(["rung", "fitted_on"], sort=False)
    ]
    return text + "<p>How well a rung is predicted by others:</p>" + _table(
        ["run", "predicted", "points", "largest error", "inside the 95% interval"], tested)


def _predictions(runs: pd.DataFrame) -> str:
    rows = came_true(runs)
    if rows.empty:
        return "<p>No run carries a prediction: a ladder makes one before it trains a rung.</p>"
    return _table(
        ["run", "predicted", "95% interval", "measured", "error", "came out", "verdict"],
        [[_text(row["run"]), _number(row["predicted"], _loss),
          _interval(row["low"], row["high"], _loss), _number(row["measured"], _loss),
          _number(row["error"], "{:+.2%}".format),
          Cell(row["came_true"], kind=CLASSES.get(row["came_true"], row["came_true"])),
          _text(row["verdict"])] for row in _records(rows)],
    )


def _gate_matrix(comparison: Comparison) -> str:
    """Return the gates by level, a column per run, each cell in words and in colour."""
    gates, runs = comparison.gates, [str(run) for run in comparison.runs["run"]]
    if gates.empty:
        return "<p>No run has logged a gate.</p>"
    decided = {(row["level"], row["gate"], row["run"]): row for row in _records(gates)}
    order = sorted({(row["level"], row["gate"]) for row in decided.values()},
                   key=lambda key: (LEVELS.index(key[0]) if key[0] in LEVELS else 9, key[1]))
    rows = []
    for level, gate in order:
        cells = [decided.get((level, gate, run)) for run in runs]
        wanted = list(dict.fromkeys(c["must_be"] for c in cells if c and c["must_be"]))
        rows.append([Cell(f"{level}: {gate}", " or ".join(wanted)), *map(_gate_cell, cells)])
    return _table(["gate", *runs], rows)


def _gate_cell(row: dict[str, Any] | None) -> Cell:
    if row is None:
        return Cell(NOT_ASKED, kind="none")
    decision = str(row["decision"])
    kind = CLASSES.get(decision, decision)
    if decision == NOT_DECIDED:
        return Cell(decision, kind=kind)
    if pd.isna(row["value"]):
        why = "value not on record" if pd.isna(row["metric"]) else f"{row['metric']} not measured"
        return Cell(decision, why, kind)
    parts = [_short(row["value"])]
    if not pd.isna(row["low_95"]):
        parts.append(f"{_short(row['low_95'])} to {_short(row['high_95'])}")
    if not pd.isna(row["n"]):
        parts.append(f"n {row['n']:,.0f}")
    return Cell(decision, ", ".join(parts), kind)


def _planned(runs: pd.DataFrame) -> str:
    headings, rows = ["run"], []
    kinds: list[tuple[str, str, str, str, Callable[[float], str]]] = [
        ("tokens/s", "tokens_per_second", "planned_tokens_per_second", "speed_ratio",
         "{:,.0f}".format),
        ("peak GB", "memory_gb", "planned_memory_gb", "memory_ratio", "{:.3g}".format),
        ("seconds", "seconds", "planned_seconds", "seconds_ratio", "{:,.0f}".format),
    ]
    for name, *_ in kinds:
        headings += [f"{name} planned", f"{name} measured", "ratio"]
    for row in _records(runs):
        cells = [_text(row["run"])]
        for _, measured, planned, ratio, as_text in kinds:
            cells += [_number(row[planned], as_text), _number(row[measured], as_text),
                      _number(row[ratio], "{:.2f}".format)]
        rows.append([*cells, _number(row["peak_fraction"], "{:.1%}".format)])
    return _table([*headings, "of matrix peak"], rows) + (
        "<p>Speed is the median over the steps; planned speed is planned tokens by planned time, "
        "which counts evaluations too. Time is that of the run's last process: what one that was "
        "resumed took before is not in it.</p>"
    )


def _benchmarks(runs: pd.DataFrame) -> str:
    names = benchmark_names(runs)
    if not names:
        return "<p>No run has measured a benchmark.</p>"
    rows = []
    for row in _records(runs):
        cells = [_text(row["run"])]
        for name in names:
            value, low, high, n = (row[f"eval/{name}{part}"]
                                   for part in ("", "/low_95", "/high_95", "/n"))
            below = [f"{_short(low)} to {_short(high)}"] if math.isfinite(low) else []
            below += [f"n {n:,.0f}"] if math.isfinite(n) else []
            cells.append(Cell("not measured", kind="none") if math.isnan(value)
                         else Cell(_short(value), ", ".join(below)))
        rows.append(cells)
    return _table(["run", *names], rows) + "<p>Beneath each: the 95% interval, and answers.</p>"


def _cost(runs: pd.DataFrame, price: float | None) -> str:
    headings = ["run", "device", "hours"]
    if price is not None:
        headings.append(f"cost at {price:g} an hour")
    rows = []
    for row in _records(runs):
        cells = [_text(row["run"]), _text(row["device"], row["device_kind"] or ""),
                 _number(row["hours"], "{:.3g}".format)]
        if price is not None:
            cells.append(Cell("no GPU", kind="none") if row["device_kind"] == "CPU"
                         else _number(row["cost"], "{:,.2f}".format))
        rows.append(cells)
    total = [Cell("sum of what is logged"), Cell(""), Cell(f"{runs['hours'].sum():.3g}")]
    rows.append(total if price is None else [*total, Cell(f"{runs['cost'].sum():,.2f}")])
    return _table(headings, rows)


def _figure(figure: Figure, folder: Path) -> str:
    data = base64.b64encode((folder / f"{figure.name}.png").read_bytes()).decode()
    return (
        f'<figure><img alt="{html.escape(f"{figure.title}. {figure.text}")}" '
        f'src="data:image/png;base64,{data}"><figcaption><b>{html.escape(figure.title)}.</b> '
        f"{html.escape(figure.text)}</figcaption></figure>"
    )


def _table(headings: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _cell(cell: Cell) -> str:
    below = f"<small>{html.escape(cell.below)}</small>" if cell.below else ""
    kind = f' class="{html.escape(cell.kind)}"' if cell.kind else ""
    return f"<td{kind}>{html.escape(cell.text)}{below}</td>"


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def _text(value: object, below: str = "") -> Cell:
    return Cell(value, below) if isinstance(value, str) else Cell(NOT_LOGGED, kind="none")


def _number(value: float, as_text: Callable[[float], str]) -> Cell:
    return Cell(NOT_LOGGED, kind="none") if pd.isna(value) else Cell(as_text(value))


def _interval(low: float, high: float, as_text: Callable[[float], str]) -> Cell:
    if pd.isna(low) or pd.isna(high):
        return Cell(NOT_LOGGED, kind="none")
    return Cell(f"{as_text(low)} to {as_text(high)}")


def _count(value: float) -> str:
    """Return a count to three digits: runs of nearly one size are to be told apart."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.0f}"


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _short(value: float) -> str:
    return f"{value:.3g}"
