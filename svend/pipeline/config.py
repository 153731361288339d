"""The configuration: the options, the scales, and ready-made configs to begin with.

Neither torch nor mlflow is imported, so that `svend scales` answers at once.
"""

from __future__ import annotations

from svend.pipeline.groups import CONF_DIR, ModelScale, group_members
from svend.pipeline.loading import load_config, load_saved_config
from svend.pipeline.options.choices import (
    BrokenRows,
    CheckpointingPolicy,
    Compile,
    Device,
    Duplicates,
    Exhausted,
    FullDisk,
    HealthAction,
    LongDocuments,
    LossOn,
    MicroBatch,
    MomentPrecision,
    Optimizer,
    Parallel,
    Parametrisation,
    Precision,
    Schedule,
    ToolScore,
    WeightPrecision,
)
from svend.pipeline.options.data import DataConfig, OwnSource
from svend.pipeline.options.evaluation import BENCHMARK_NAMES, SAMPLE_SUFFIX, EvaluationConfig
from svend.pipeline.options.gates import GatesConfig, ValidationGate
from svend.pipeline.options.model import ModelConfig, get_model_config
from svend.pipeline.options.pipeline import HealthConfig, PipelineConfig
from svend.pipeline.options.training import Branch, TrainingConfig

__all__ = [
    "BENCHMARK_NAMES", "CONF_DIR", "SAMPLE_SUFFIX", "Branch", "BrokenRows",
    "CheckpointingPolicy", "Compile", "DataConfig", "Device", "Duplicates", "EvaluationConfig",
    "Exhausted", "FullDisk", "GatesConfig", "HealthAction", "HealthConfig", "LongDocuments",
    "LossOn", "MicroBatch", "ModelConfig", "ModelScale", "MomentPrecision", "Optimizer",
    "OwnSource", "Parallel", "Parametrisation", "PipelineConfig", "Precision", "Schedule",
    "ToolScore", "TrainingConfig", "ValidationGate", "WeightPrecision",
    "create_quick_test_config", "create_scale_test_config", "format_count", "get_model_config",
    "group_members", "load_config", "load_saved_config", "print_scale_comparison",
    "scale_table",
]


def create_quick_test_config() -> PipelineConfig:
    """Return a run of a very small model that goes through the whole pipeline in seconds."""
    return load_config({"preset": "quick_test"})


def create_scale_test_config(scale: ModelScale) -> PipelineConfig:
    """Return a short run of the real model of a scale."""
    return load_config({"scale": scale.value, "preset": "scale_test"})


def scale_table() -> list[dict[str, str]]:
    """Return the ladder as rows of text, one per scale, each figure computed from its config."""
    rows = []
    for scale in ModelScale:
        model = get_model_config(scale)
        rows.append({
            "Scale": scale.value,
            "Name": model.name,
            "Params": format_count(model.num_parameters()),
            "Hidden": str(model.hidden_size),
            "Layers": str(model.num_hidden_layers),
            "Heads": str(model.num_attention_heads),
            "Context": f"{model.max_position_embeddings // 1024}K",
            "Train GB": str(model.train_memory_gb),
            "Samples": f"{model.recommended_samples // 1000}K",
        })
    return rows


def print_scale_comparison() -> None:
    """Print the seven scales side by side."""
    widths = {"Scale": 10, "Name": 20, "Params": 10, "Hidden": 8, "Layers": 8, "Heads": 8,
              "Context": 10, "Train GB": 10, "Samples": 0}
    print("=" * 100)
    print("SVEND Model Scale Comparison")
    print("=" * 100)
    header = {name: name for name in widths}
    for row in [header, *scale_table()]:
        print(" ".join(row[name].ljust(width) for name, width in widths.items()).rstrip())
        if row is header:
            print("-" * 100)
    print("=" * 100)


def format_count(count: float) -> str:
    """Return a count as people read it: 52M, 1.0B."""
    if count >= 1e9:
        return f"{count / 1e9:.1f}B"
    return f"{count / 1e6:.0f}M" if count >= 1e6 else f"{count / 1e3:.0f}K"
