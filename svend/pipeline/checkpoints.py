"""The names that users import: what saves, finds, verifies and loads the checkpoints of a run."""

from __future__ import annotations

from svend.pipeline.checkpoint_files import verify
from svend.pipeline.checkpoint_manager import CheckpointManager
from svend.pipeline.checkpoint_metadata import METADATA, MODEL, Checkpoint
from svend.pipeline.checkpoint_states import Stateful
from svend.pipeline.drive_checkpoints import DriveCheckpointManager

__all__ = ["METADATA", "MODEL", "Checkpoint", "CheckpointManager", "DriveCheckpointManager",
           "Stateful", "verify"]
