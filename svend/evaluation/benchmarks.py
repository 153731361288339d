"""The benchmarks by the names under which they are asked for."""

from __future__ import annotations

from svend.evaluation.benchmark import Benchmark
from svend.evaluation.bfcl import BFCL
from svend.evaluation.gsm8k import GSM8K
from svend.evaluation.gym import ACCURACY, TOOL_EXECUTION
from svend.evaluation.humaneval import HUMANEVAL
from svend.evaluation.math_problems import MATH
from svend.evaluation.xstest import SAFETY
from svend.pipeline.config import EvaluationConfig, ToolScore

LATENCY, PERPLEXITY = "latency_p99", "perplexity"
ANSWERED = {
    "accuracy": (ACCURACY,),
    "tool_accuracy": (TOOL_EXECUTION, BFCL),
    "gsm8k": (GSM8K,),
    "math": (MATH,),
    "humaneval": (HUMANEVAL,),
    "safety_accuracy": (SAFETY,),
}
# The metric that each score of tool_accuracy is measured as.
TOOL_METRICS = {
    ToolScore.EXECUTION: "tool_execution_accuracy",
    ToolScore.STRUCTURE: "tool_structure_accuracy",
}
# Whose problems are made on the spot; what trains never sees them, whatever is trained on.
MADE_ON_THE_SPOT = (ACCURACY, TOOL_EXECUTION)


def benchmarks_of(name: str, evaluation: EvaluationConfig) -> tuple[Benchmark, ...]:
    """Return what a name stands for; nothing where it is measured without answers.

    BFCL is part of tool_accuracy where its files are given, or gates read the score by structure.
    """
    answered = ANSWERED.get(name, ())
    wants_bfcl = (
        name in evaluation.paths or evaluation.tool_score is ToolScore.STRUCTURE
    )
    return tuple(b for b in answered if b is not BFCL or wants_bfcl)
