"""How benchmarks are measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from svend.pipeline.options.choices import ToolScore
from svend.pipeline.options.defaults import default, default_dict, default_enum, require

# What eval_benchmarks may name, each also with SAMPLE_SUFFIX behind it.
BENCHMARK_NAMES = ("accuracy", "tool_accuracy", "gsm8k", "math", "humaneval", "safety_accuracy",
                   "latency_p99", "perplexity")
SAMPLE_SUFFIX = "_sample"


@dataclass(kw_only=True)
class EvaluationConfig:
    """How benchmarks are measured, and for how long."""

    every_steps: int | None = default("evaluation.every_steps")
    budget_seconds: float = default("evaluation.budget_seconds")
    problems: int | None = default("evaluation.problems")
    samples_per_problem: int = default("evaluation.samples_per_problem")
    batch_size: int = default("evaluation.batch_size")
    max_new_tokens: int | None = default("evaluation.max_new_tokens")
    temperature: float = default("evaluation.temperature")
    top_k: int | None = default("evaluation.top_k")
    top_p: float = default("evaluation.top_p")
    seed: int = default("evaluation.seed")
    int8: bool = default("evaluation.int8")
    paths: dict[str, str] = default_dict("evaluation.paths")
    tool_score: ToolScore = default_enum("evaluation.tool_score", ToolScore)
    latency_batch: int = default("evaluation.latency_batch")
    latency_prompt_tokens: int = default("evaluation.latency_prompt_tokens")
    latency_new_tokens: int = default("evaluation.latency_new_tokens")
    latency_answers: int = default("evaluation.latency_answers")

    def check(self) -> None:
        """Raise ConfigError for a setting that no evaluation can have."""
        for name in ("samples_per_problem", "batch_size", "latency_batch", "latency_prompt_tokens",
                     "latency_new_tokens", "latency_answers"):
            require(getattr(self, name) >= 1, f"evaluation.{name}", getattr(self, name),
                    "1 or more")
        for name in ("every_steps", "problems", "max_new_tokens", "top_k"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"evaluation.{name}", value, "null, or 1 or more")
        budget, temperature = self.budget_seconds, self.temperature
        require(math.isfinite(budget) and budget > 0, "evaluation.budget_seconds", budget,
                "above 0")
        require(math.isfinite(temperature) and temperature >= 0, "evaluation.temperature",
                temperature, "at least 0")
        require(0 < self.top_p <= 1, "evaluation.top_p", self.top_p, "above 0 and at most 1")
        require(0 <= self.seed < 2**32, "evaluation.seed", self.seed,
                "at least 0 and below 2^32")
        require(self.samples_per_problem == 1 or temperature > 0,
                "evaluation.samples_per_problem", self.samples_per_problem,
                "1 where evaluation.temperature is 0: they would all be the same")
        for name in self.paths:
            require(name in BENCHMARK_NAMES, f"evaluation.paths.{name}", self.paths[name],
                    f"for one of {', '.join(BENCHMARK_NAMES)}")
