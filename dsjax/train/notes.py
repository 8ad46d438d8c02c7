"""A run's configuration as the JSON a checkpoint carries, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

from dsjax.config import (
    Balance,
    Data,
    Exchange,
    Fp8,
    Mesh,
    Model,
    Mtp,
    Optimizer,
    Run,
    Train,
    Yarn,
)  # fmt: skip

SECTIONS = {
    "model": Model, "data": Data, "train": Train, "optimizer": Optimizer,
    "balance": Balance, "mtp": Mtp, "mesh": Mesh, "exchange": Exchange,
    "fp8": Fp8,
}  # fmt: skip
LATER = ("fp8", "exchange")
"""Sections that older checkpoints lack: they have their defaults."""

FREE_TO_CHANGE = (
    "name", "mesh", "train.save_every", "train.keep", "train.eval_every", "train.eval_batches",
    "train.remat", "exchange.transport", "exchange.room",
)  # fmt: skip
"""Settings that do not change which numbers a run computes, beyond round-off."""


def as_notes(run: Run) -> dict[str, Any]:
    """The configuration as plain JSON values."""
    notes = dataclasses.asdict(run)
    notes["data"]["paths"] = list(run.data.paths)
    return notes


def from_notes(notes: dict[str, Any]) -> Run:
    """The configuration that `as_notes` wrote; ValueError if it is not one."""
    try:
        notes = {name: {} for name in LATER} | notes
        parts = {name: dict(notes[name]) for name in SECTIONS}
        if parts["model"]["yarn"]:
            parts["model"]["yarn"] = Yarn(**parts["model"]["yarn"])
        parts["data"]["paths"] = tuple(parts["data"]["paths"])
        built: dict[str, Any] = {name: kind(**parts[name]) for name, kind in SECTIONS.items()}
        return Run(**{**notes, **built})
    except (KeyError, TypeError) as problem:
        raise ValueError(
            f"the checkpoint's configuration does not fit this version of dsjax: {problem}"
        ) from problem


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings that differ between two notes and change the numbers, as text."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        name, before, after = f"{prefix}{key}", old.get(key), new.get(key)
        if name in FREE_TO_CHANGE or before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{name}.")
        else:
            found.append(f"{name}: {before} -> {after}")
    return found
