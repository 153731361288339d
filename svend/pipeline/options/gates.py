"""The gates of the four levels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from svend.errors import ConfigError
from svend.pipeline.groups import default_tree
from svend.pipeline.options.defaults import default, require


@dataclass(kw_only=True)
class ValidationGate:
    """One condition: it passes when `metric_name comparison threshold` holds."""

    name: str
    metric_name: str
    threshold: float
    comparison: str = "<"
    required: bool = True
    description: str = ""

    def __post_init__(self) -> None:
        if self.comparison not in ("<", "<=", ">", ">=", "=="):
            raise ConfigError(
                f"gate '{self.name}': comparison '{self.comparison}' is not one of <, <=, >, >=, =="
            )
        if isinstance(self.threshold, float) and math.isnan(self.threshold):
            raise ConfigError(f"gate '{self.name}': threshold = nan: must be a number")


def _default_gates(level: str) -> Any:
    return field(
        default_factory=lambda: [ValidationGate(**gate) for gate in default_tree()["gates"][level]]
    )


@dataclass(kw_only=True)
class GatesConfig:
    """The gates of the four levels.

    confidence: None decides by the measured value, as the guide does; a number such as 0.95 by the
    bound of an interval of that one-sided confidence.
    """

    confidence: float | None = default("gates.confidence")
    quick: list[ValidationGate] = _default_gates("quick")
    standard: list[ValidationGate] = _default_gates("standard")
    full: list[ValidationGate] = _default_gates("full")
    production: list[ValidationGate] = _default_gates("production")

    def check(self) -> None:
        """Raise ConfigError for a confidence that no interval has."""
        confidence = self.confidence
        require(confidence is None or 0.5 < confidence < 1, "gates.confidence", confidence,
                "null, or above 0.5 and below 1")
