"""The names that users import: what saves, finds, verifies and loads the checkpoints of a run."""

from __future__ import annotations

from svend.pipeline.checkpoints.files import verify
from svend.pipeline.checkpoints.manager import CheckpointManager
from svend.pipeline.checkpoints.metadata import METADATA, MODEL, Checkpoint
from svend.pipeline.checkpoints.states import Stateful
from svend.pipeline.checkpoints.drive_manager import DriveCheckpointManager

__all__ = ["METADATA", "MODEL", "Checkpoint", "CheckpointManager", "DriveCheckpointManager",
           "Stateful", "verify"]
