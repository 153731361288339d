"""What an evaluation shows a person: figures with intervals, and every sample to be opened."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from svend.evaluation.benchmark import Answer, Sample
from svend.evaluation.harness import BenchmarkResult
from svend.evaluation.measurement import Measurement
from svend.pipeline.progress import CountProgress

STYLE = (
    "body{font:13px sans-serif;margin:12px}table{border-collapse:collapse;width:100%}"
    "td,th{border:1px solid #ccc;padding:4px 8px;text-align:left;vertical-align:top}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;max-width:42em}"
    ".right{background:#d4efd4}.wrong{background:#f8c8c8}"
)


class AnswerProgress(CountProgress):
    """How many of the answers to each benchmark are there."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, "answers")


def measurement_table(
    results: Sequence[BenchmarkResult], measurements: Mapping[str, Measurement]
) -> Table:
    """Return each benchmark's values with their intervals, and how many answers they rest on.

    Those of its groups of problems, a few answers each, are left to its page.
    """
    table = Table(title="Measured", title_justify="left")
    table.add_column("metric", no_wrap=True)
    for name in ("value", "95% interval", "n"):
        table.add_column(name, justify="right", overflow="fold")
    for metric, measured in measurements.items():
        if "/" in metric:
            continue
        low, high = measured.interval or (None, None)
        interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
        size = "" if measured.sample_size is None else f"{measured.sample_size:,}"
        table.add_row(metric, f"{measured.value:.4g}", interval, size)
    short = [f"{result.benchmark.name} {len(result.samples)} of {result.asked}"
             for result in results if result.cut_short]
    if short:
        table.caption = f"the time ran out: {', '.join(short)} answers"
    return table


def sample_rows(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Return one flat record for each sample: what was asked, said, called, expected, decided."""
    return [
        {
            "problem": sample.problem.problem_id,
            "group": sample.problem.group,
            "verdict": "right" if sample.score.correct else "wrong",
            "prompt": "\n".join(f"{m.role.value}: {m.content}" for m in sample.problem.messages),
            "answer": _spoken(sample.answer),
            "read": sample.score.extracted,
            "expected": sample.problem.expected,
            "reason": sample.score.reason,
            "tool_calls": "\n".join(sample.answer.calls),
            "tokens": sample.answer.tokens,
            "complete": sample.answer.complete,
        }
        for sample in samples
    ]


def samples_html(result: BenchmarkResult) -> str:
    """Return a page with every sample, the wrong ones first."""
    rows = sorted(sample_rows(result.samples), key=lambda row: row["verdict"], reverse=True)
    figures = {
        metric: f"<li>{html.escape(metric)}: {measured.value:.4g}"
        + (f" ({measured.interval[0]:.4g} to {measured.interval[1]:.4g})"
           if measured.interval else "")
        + (f", n = {measured.sample_size:,}" if measured.sample_size else "")
        for metric, measured in result.measurements.items()
    }
    whole = "".join(text for metric, text in figures.items() if "/" not in metric)
    by_group = "".join(text for metric, text in figures.items() if "/" in metric)
    if by_group:
        by_group = f"<details><summary>by group</summary><ul>{by_group}</ul></details>"
    columns = ("verdict", "problem", "group", "prompt", "answer", "read", "expected", "reason")
    head = "".join(f"<th>{column}" for column in columns)
    body = "".join(
        "<tr>" + "".join(_cell(column, str(row[column]), row["verdict"]) for column in columns)
        for row in rows
    )
    return (
        f"<!doctype html><meta charset=utf-8><style>{STYLE}</style>"
        f"<h2>{html.escape(result.benchmark.name)}</h2><ul>{whole}</ul>"
        f"{by_group}<table><tr>{head}{body}</table>"
    )


def samples_frame(result: BenchmarkResult) -> pd.DataFrame:
    """Return the samples as a table for programs."""
    return pd.DataFrame(sample_rows(result.samples))


def _cell(column: str, text: str, verdict: str) -> str:
    if column == "verdict":
        return f"<td class={verdict}>{text}"
    return f"<td><pre>{html.escape(text)}</pre>"


def _spoken(answer: Answer) -> str:
    return "\n".join(f"{m.role.value}: {m.content}" for m in answer.messages)
