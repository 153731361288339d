"""What runs have logged, as tables: a row per run, a row per point of a curve, a row per gate."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from svend.pipeline.config import ModelConfig
from svend.pipeline.tags import LADDER_TAG, TREND_TAG
from svend.tracking.history import LoggedRun, read_artifact
from svend.tracking.runs import metric_history

VERDICTS = "verdicts.csv"
# How svend.device.describe_device ends for a CPU.
CPU = re.compile(r", \d+ threads$")
# Of eval/, what is no benchmark.
HELD_OUT = {"heldout_loss", "perplexity", "bits_per_byte", "seconds"}
BENCHMARK = re.compile(r"eval/([^/]+)")
CURVE_COLUMNS = ["run", "run_id", "kind", "step", "tokens", "flops", "loss"]
GATE_COLUMNS = ["run", "level", "gate", "decision", "metric", "value", "low_95", "high_95", "n",
                "must_be"]
NOT_DECIDED, NOT_ASKED = "not decided", "no such gate"
LEVELS = ("quick", "standard", "full", "production")


def label_runs(runs: Sequence[LoggedRun]) -> dict[str, str]:
    """Return a short name for each run by its id: its scale, its model, or both and its id."""
    candidates = (
        [run.tags.get("svend.scale", "") for run in runs],
        [run.params.get("config.model.name", "") for run in runs],
        [run.name for run in runs],
    )
    for names in candidates:
        if all(names) and len(set(names)) == len(names):
            return {run.run_id: name for run, name in zip(runs, names, strict=True)}
    length = next(n for n in range(6, 33) if len({run.run_id[:n] for run in runs}) == len(runs))
    return {run.run_id: f"{run.params.get('config.model.name', run.name)} {run.run_id[:length]}"
            for run in runs}


def order_runs(runs: Sequence[LoggedRun]) -> list[LoggedRun]:
    """Return the runs by the size of their models, the smallest first, then by their time."""
    return sorted(runs, key=lambda run: (run.metrics.get("plan/parameters", math.inf),
                                         run.started_seconds))


def matrix_parameters(run: LoggedRun) -> float:
    """Return the N of scaling laws, the blocks and the output head; NaN if it is not on record."""
    prefix = "config.model."
    shape = {key.removeprefix(prefix): value for key, value in run.params.items()
             if key.startswith(prefix)}
    try:
        # A count is written without a point, a rate perhaps too: 1e-05.
        values: dict[str, Any] = {
            key: value if key == "name" else int(value) if value.isdecimal() else float(value)
            for key, value in shape.items()
        }
        model = ModelConfig(**values)
    except (TypeError, ValueError):
        return math.nan
    return float(model.num_matrix_parameters())


def curves_frame(runs: Sequence[LoggedRun], labels: dict[str, str]) -> pd.DataFrame:
    """Return every loss that was logged: kind is train, heldout or horizon."""
    frames = []
    for run in runs:
        tokens = metric_history(run.run_id, "train/tokens")
        flops = metric_history(run.run_id, "train/flops")
        tokens.setdefault(0, 0.0)
        flops.setdefault(0, 0.0)
        horizon_tokens = metric_history(run.run_id, "horizon/tokens")
        horizon_flops = metric_history(run.run_id, "horizon/flops")
        for kind, key, at_tokens, at_flops in (
            ("train", "train/loss", tokens, flops),
            ("heldout", "eval/heldout_loss", tokens, flops),
            ("horizon", "horizon/heldout_loss", horizon_tokens, horizon_flops),
        ):
            losses = metric_history(run.run_id, key)
            frames.append(pd.DataFrame({
                "run": labels[run.run_id], "run_id": run.run_id, "kind": kind,
                "step": list(losses),
                "tokens": [at_tokens.get(step, math.nan) for step in losses],
                "flops": [at_flops.get(step, math.nan) for step in losses],
                "loss": list(losses.values()),
            }, columns=CURVE_COLUMNS).sort_values("step"))
    return pd.concat([frame for frame in frames if not frame.empty], ignore_index=True)


def gates_frame(runs: Sequence[LoggedRun], labels: dict[str, str]) -> pd.DataFrame:
    """Return the last decision of each gate of each run, with what it rests on."""
    rows = [row for run in runs for row in _gate_rows(run, labels[run.run_id])]
    return pd.DataFrame(rows, columns=GATE_COLUMNS)


def _gate_rows(run: LoggedRun, label: str) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for key, must_be in run.params.items():
        found = re.fullmatch(r"config\.gates\.(\w+)\.([^.]+)", key)
        if found is not None and found[1] in LEVELS:
            rows[found[1], found[2]] = {"decision": NOT_DECIDED, "must_be": must_be}
    for key, value in run.metrics.items():
        if key.startswith("gate/") and key.count("/") == 2:
            _, level, gate = key.split("/")
            row = rows.setdefault((level, gate), {"must_be": ""})
            row["decision"] = "pass" if value == 1 else "FAIL"
    table = read_artifact(run.run_id, VERDICTS)
    if table:
        for verdict in pd.read_csv(io.StringIO(table)).to_dict("records"):
            rows[str(verdict["level"]), str(verdict["gate"])] = {
                "decision": _decision(verdict), "metric": verdict["metric"],
                "value": verdict["value"], "low_95": verdict["low_95"],
                "high_95": verdict["high_95"], "n": verdict["sample_size"],
                "must_be": f"{verdict['metric']} {verdict['comparison']} "
                           f"{verdict['threshold']:g}",
            }
    return [{"run": label, "level": level, "gate": gate, **row}
            for (level, gate), row in sorted(
                rows.items(), key=lambda item: (_level_number(item[0][0]), item[0][1]))]


def _decision(verdict: dict[Any, Any]) -> str:
    if verdict["decision"] == "fail":
        return "FAIL" if verdict["required"] else "warn"
    return str(verdict["decision"])


def _level_number(level: str) -> int:
    return LEVELS.index(level) if level in LEVELS else len(LEVELS)


def runs_frame(
    runs: Sequence[LoggedRun], labels: dict[str, str], curves: pd.DataFrame, gates: pd.DataFrame,
    gpu_hour_price: float | None,
) -> pd.DataFrame:
    """Return a row per run: what it is, what it reached, planned and measured, gates, cost."""
    frame = pd.DataFrame(
        _identity(run, labels[run.run_id]) | _losses(run, curves) | _prediction(run)
        | _planned_and_measured(run) | _cost(run, gpu_hour_price) | _benchmarks(run)
        for run in runs
    )
    if not gates.empty:
        gates = gates.assign(key="gate/" + gates["level"] + "/" + gates["gate"])
        wide = gates.pivot_table(index="run", columns="key", values="decision", aggfunc="last",
                                 sort=False)
        frame = frame.join(wide, on="run")
        frame[list(wide.columns)] = frame[list(wide.columns)].fillna(NOT_ASKED)
    return frame


def _identity(run: LoggedRun, label: str) -> dict[str, Any]:
    tags, params = run.tags, run.params
    return {
        "run": label, "run_id": run.run_id, "name": run.name, "experiment": run.experiment,
        "status": run.status, "scale": tags.get("svend.scale"),
        "model": params.get("config.model.name"), "ladder": tags.get(LADDER_TAG),
        "ladder_verdict": tags.get(TREND_TAG),
        "data_fingerprint": tags.get("svend.data_fingerprint"),
        "tokenizer_sha256": tags.get("svend.tokenizer_sha256"), "schedule": _schedule(params),
        "heldout": _heldout(params), "device": tags.get("svend.device"),
        "parameters": run.metrics.get("plan/parameters", math.nan),
        "matrix_parameters": matrix_parameters(run),
    }


def _schedule(params: dict[str, str]) -> str | None:
    """Return the shape of the schedule, without its length."""
    prefix = "config.training."
    if f"{prefix}schedule" not in params:
        return None
    kind = params[f"{prefix}schedule"]
    shape = {"warmup": "warmup_ratio"}
    if kind == "wsd":
        shape["decay"] = "decay_ratio"
    if kind != "constant":
        shape["end at"] = "min_learning_rate_ratio"
    parts = [f"{name} {params.get(prefix + key, 'unknown')}" for name, key in shape.items()]
    return ", ".join([kind, *parts])


def _heldout(params: dict[str, str]) -> str | None:
    sequences = params.get("config.training.heldout_sequences")
    length = params.get("config.training.data.max_seq_length")
    return f"{sequences} sequences of {length} tokens" if sequences and length else None


def _losses(run: LoggedRun, curves: pd.DataFrame) -> dict[str, float]:
    own = curves[curves["run_id"] == run.run_id]
    last = {kind: rows.iloc[-1] for kind, rows in own.groupby("kind", sort=False)}
    nowhere = pd.Series({"loss": math.nan, "tokens": math.nan})
    return {
        "steps": float(own["step"].max()),
        "tokens": float(own["tokens"].max()), "flops": float(own["flops"].max()),
        "train_loss": float(last.get("train", nowhere)["loss"]),
        "heldout_loss": float(last.get("heldout", nowhere)["loss"]),
        "horizon_loss": float(last.get("horizon", nowhere)["loss"]),
        "horizon_tokens": float(last.get("horizon", nowhere)["tokens"]),
        "perplexity": run.metrics.get("eval/perplexity", math.nan),
        "bits_per_byte": run.metrics.get("eval/bits_per_byte", math.nan),
    }


def _prediction(run: LoggedRun) -> dict[str, float]:
    """Return what a ladder predicted before it trained the rung."""
    return {f"predicted_{name}": _number(run.params.get(f"ladder.predicted_{name}"))
            for name in ("loss", "low", "high")}


def _number(text: str | None) -> float:
    try:
        return math.nan if text is None else float(text)
    except ValueError:
        return math.nan


def _planned_and_measured(run: LoggedRun) -> dict[str, float]:
    metrics = run.metrics

    def value(key: str) -> float:
        return metrics.get(key, math.nan)

    speeds, shares = (
        [speed for speed in metric_history(run.run_id, f"train/{name}").values()
         if math.isfinite(speed)]
        for name in ("tokens_per_second", "peak_fraction")
    )
    planned_seconds, planned_tokens = value("plan/seconds"), value("plan/tokens")
    speed = float(np.median(speeds)) if speeds else math.nan
    planned_speed = _ratio(planned_tokens, planned_seconds)
    return {
        "planned_tokens": planned_tokens, "planned_flops": value("plan/flops"),
        "planned_tokens_per_second": planned_speed, "tokens_per_second": speed,
        "speed_ratio": _ratio(speed, planned_speed),
        "peak_fraction": float(np.median(shares)) if shares else math.nan,
        "planned_memory_gb": value("plan/peak_memory_gb"),
        "memory_gb": value("measured/peak_memory_gb"),
        "memory_ratio": _ratio(value("measured/peak_memory_gb"), value("plan/peak_memory_gb")),
        "planned_seconds": planned_seconds, "seconds": value("measured/seconds"),
        "seconds_ratio": _ratio(value("measured/seconds"), planned_seconds),
    }


def _ratio(measured: float, planned: float) -> float:
    return measured / planned if planned else math.nan


def _cost(run: LoggedRun, gpu_hour_price: float | None) -> dict[str, Any]:
    device = run.tags.get("svend.device")
    hours = run.metrics.get("measured/seconds", math.nan) / 3600
    kind = None if device is None else "CPU" if CPU.search(device) else "GPU"
    cost = hours * gpu_hour_price if gpu_hour_price is not None and kind == "GPU" else math.nan
    return {"device_kind": kind, "hours": hours, "cost": cost}


def _benchmarks(run: LoggedRun) -> dict[str, float]:
    """Return each benchmark's value, its interval and its sample size; not those of its groups."""
    row = {}
    for key, value in sorted(run.metrics.items()):
        found = BENCHMARK.fullmatch(key)
        if found is not None and found[1] not in HELD_OUT:
            row[f"eval/{found[1]}"] = value
            for part in ("low_95", "high_95", "n"):
                row[f"eval/{found[1]}/{part}"] = run.metrics.get(f"{key}/{part}", math.nan)
    return row


def benchmark_names(frame: pd.DataFrame) -> list[str]:
    """Return the benchmarks that some run measured."""
    found = Counter(m[1] for m in map(BENCHMARK.fullmatch, map(str, frame.columns)) if m)
    return sorted(found)
