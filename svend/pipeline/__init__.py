"""The pipeline: configuration, runner, gates and checkpoints.

`PipelineRunner` is imported on first use: it brings torch and MLflow, which take seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from svend.pipeline.config import PipelineConfig

if TYPE_CHECKING:
    from svend.pipeline.ladder.progressive import PipelineRunner

__all__ = ["PipelineConfig", "PipelineRunner"]


def __getattr__(name: str) -> Any:
    if name == "PipelineRunner":
        from svend.pipeline.ladder.progressive import PipelineRunner

        return PipelineRunner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
