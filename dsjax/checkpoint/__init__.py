"""Checkpoints that are verified when they are read: checksums, resume, fall back."""

from dsjax.checkpoint.errors import CheckpointError
from dsjax.checkpoint.store import CheckpointStore, Restored

__all__ = ["CheckpointError", "CheckpointStore", "Restored"]
