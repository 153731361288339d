"""What a GPU is asked: the parts of the report, and how a part tells what it found.

A part is a function of a device and a size, so that each also runs on a CPU in miniature: a fault
of the report itself is found there, and not in somebody's hour on a rented card.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from typing import Any

import torch

from svend.errors import one_line
from svend.pipeline.config import (
    DataConfig,
    ModelConfig,
    ModelScale,
    Precision,
    TrainingConfig,
    get_model_config,
    load_config,
)


class Verdict(Enum):
    """What is to be thought of a part."""

    OK = "ok"
    OFF = "off"  # ran to its end, and a figure is outside its bounds
    FAILED = "failed"  # did not run to its end
    NOT_RUN = "not run"  # has nothing to check here, or no time was left


class NotRunError(Exception):
    """A part has nothing to check on this device; the message says why."""


@dataclass(frozen=True)
class Figure:
    """What a part found, and the bounds that it is to be within."""

    name: str
    value: float | str
    unit: str = ""
    least: float | None = None
    most: float | None = None

    @property
    def holds(self) -> bool:
        if isinstance(self.value, str):
            return True
        return (
            math.isfinite(self.value)
            and (self.least is None or self.value >= self.least)
            and (self.most is None or self.value <= self.most)
        )

    @property
    def bounds(self) -> str:
        """The bounds as people read them; nothing where there are none."""
        least = None if self.least is None else f"at least {self.least:.4g}"
        most = None if self.most is None else f"at most {self.most:.4g}"
        return ", ".join(bound for bound in (least, most) if bound)

    def __str__(self) -> str:
        value = self.value if isinstance(self.value, str) else f"{self.value:,.4g}"
        return f"{value} {self.unit}".strip()


@dataclass
class Findings:
    """What a part has found so far; `tell` hears of each figure at once."""

    tell: Callable[[Figure], None] = lambda _: None
    figures: list[Figure] = field(default_factory=list)

    def note(
        self, name: str, value: float | str, unit: str = "", *, least: float | None = None,
        most: float | None = None,
    ) -> None:
        """Add a figure; outside its bounds, or not finite, it makes the part's verdict `off`."""
        self.figures.append(Figure(name, value, unit, least, most))
        self.tell(self.figures[-1])


@dataclass(frozen=True)
class Outcome:
    """A part's verdict, why, and what it found."""

    part: str
    verdict: Verdict
    reason: str
    seconds: float
    figures: list[Figure]

    def to_tree(self) -> dict[str, Any]:
        figures = [{**asdict(figure), "holds": figure.holds} for figure in self.figures]
        return {**asdict(self), "verdict": self.verdict.value, "figures": figures}


@dataclass(frozen=True)
class Size:
    """How large the checks are, and what is to be expected at that size.

    model: whose shapes the kernels are checked at, batch_size x length tokens. wide_model: those of
    float8, which gains nothing where matrices are small. small_model: trained for so many steps
    where losses are compared. scales: what memory and speed are measured of.
    memory_tolerance: of a measured over the planned peak. least_peak_share: of the matrix product's
    peak that training reaches. pace: the time a part takes, over that of the full size.
    """

    model: ModelConfig
    wide_model: ModelConfig
    batch_size: int
    length: int
    small_model: ModelConfig
    small_batch_size: int
    small_length: int
    steps: int
    scales: Mapping[str, tuple[ModelConfig, TrainingConfig]]
    timed_seconds: float
    compiles: bool
    least_speed_up: float
    memory_tolerance: float
    least_peak_share: float
    pace: float


@dataclass(frozen=True)
class Part:
    """One check. about_seconds: what it takes at full size; with less time left it is not begun."""

    name: str
    check: Callable[[torch.device, Size, Findings], None]
    about_seconds: float


def run_part(
    part: Part, device: torch.device, size: Size, tell: Callable[[Figure], None] = lambda _: None
) -> Outcome:
    """Run a part; whatever it raises is its verdict, and stops no other."""
    findings, started = Findings(tell), time.perf_counter()
    try:
        part.check(device, size, findings)
        verdict, reason = judge(findings.figures)
    except NotRunError as error:
        verdict, reason = Verdict.NOT_RUN, one_line(error)
    except Exception as error:  # noqa: BLE001  (a report of what breaks cannot name it beforehand)
        verdict = Verdict.FAILED
        reason = f"{type(error).__name__}: {one_line(error)[:300]}"
    return Outcome(part.name, verdict, reason, time.perf_counter() - started, findings.figures)


def judge(figures: list[Figure]) -> tuple[Verdict, str]:
    """Return the verdict on what a part found, and why, in one line."""
    beyond = [figure for figure in figures if not figure.holds]
    if not beyond:
        return Verdict.OK, ""
    return Verdict.OFF, "; ".join(
        f"{figure.name}: {figure}, not {figure.bounds or 'finite'}" for figure in beyond
    )


def full_size() -> Size:
    """Return what is checked on a GPU: LARGE's shapes, and every scale that fits."""
    return Size(
        model=get_model_config(ModelScale.LARGE),
        wide_model=get_model_config(ModelScale.FLAGSHIP), batch_size=2, length=4096,
        small_model=replace(
            get_model_config(ModelScale.TINY), name="parity", hidden_size=256, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, intermediate_size=704, vocab_size=2048,
        ),
        small_batch_size=4, small_length=256, steps=30,
        scales={scale.value: _of_scale(scale) for scale in ModelScale},
        timed_seconds=8.0, compiles=True, least_speed_up=1.0, memory_tolerance=0.1,
        least_peak_share=0.1, pace=1.0,
    )


def miniature_size() -> Size:
    """Return what a CPU does in a minute or two, which says nothing of a GPU."""
    small = replace(
        get_model_config(ModelScale.TINY), name="miniature", hidden_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, vocab_size=512,
    )
    data = DataConfig(sources=["text"], mix_ratios={"general": 1.0}, max_seq_length=128)
    training = TrainingConfig(batch_size=2, gradient_accumulation_steps=1, data=data)
    wider = replace(small, name="wider", hidden_size=128, intermediate_size=320)
    return Size(
        model=wider, wide_model=wider, batch_size=2, length=160, small_model=small,
        small_batch_size=2, small_length=64, steps=8,
        scales={"miniature": (wider, training)},
        timed_seconds=0.5, compiles=True, least_speed_up=0.0,
        # Where tensors are of kilobytes, buffers that the plan does not count weigh more.
        memory_tolerance=0.6,
        least_peak_share=0.0, pace=0.2,
    )


def _of_scale(scale: ModelScale) -> tuple[ModelConfig, TrainingConfig]:
    """Return model and settings as a run of the scale has them, a row filled by one document."""
    config = load_config({"scale": scale.value, "preset": "full"}).resolve()
    assert config.model is not None  # set by resolve
    data = DataConfig(
        sources=["text"], mix_ratios={"general": 1.0},
        max_seq_length=config.training.data.max_seq_length,
    )
    return config.model, replace(config.training, data=data, precision=Precision.AUTO)
