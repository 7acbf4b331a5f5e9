"""What a run has learned, as files hold it: the prior, and a store made of it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from . import checkpoint
from .config import UsageError
from .errors import CheckpointError
from .learner import CHECKPOINT
from .prior import Prior
from .store import open_store, scrub

_MARKS = ("config.toml", CHECKPOINT)


def is_run(folder: Path) -> bool:
    """Whether ``folder`` looks like one that lifelong run or lifelong adapt has made."""
    return any((folder / name).is_file() for name in _MARKS) or any(folder.glob("seed-*"))


def learner_file(run: Path, seed: int | None = None) -> Path:
    """The checkpoint of a run's seed, the only one by default.

    Raises UsageError, saying which there are.
    """
    if run.is_file():
        return run
    if not run.is_dir():
        raise UsageError(f"there is no run in {run}; lifelong run --out {run} makes one")
    if seed is not None and (run / f"seed-{seed}" / CHECKPOINT).is_file():
        return run / f"seed-{seed}" / CHECKPOINT
    found = sorted(run.glob(f"seed-*/{CHECKPOINT}")) or sorted(run.glob(CHECKPOINT))
    if not found:
        raise UsageError(f"there is no {CHECKPOINT} in {run}, as lifelong run leaves it")
    seeds = ", ".join(path.parent.name.removeprefix("seed-") for path in found)
    if seed is not None:
        raise UsageError(f"{run} has no seed {seed}; it has {seeds}")
    if len(found) > 1:
        raise UsageError(f"{run} has seeds {seeds}: say which with --seed")
    return found[0]


def prior_in(path: Path) -> Prior:
    """The prior in a learner's file. Raises CheckpointError where there is none to be read."""
    state = checkpoint.load(path, kind="learner")
    try:
        return Prior.from_state_dict(state["prior"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds a prior that cannot be read ({error!r})") from error


def without(prior: Prior, places: Collection[tuple[int, int]]) -> Prior:
    """The prior whose memory has no items of these (task, origin), as a store gives it back after
    they were dropped: what they put into g, G and the anchor stays."""
    if not places:
        return prior

    def fewer(holder: dict[str, Any]) -> dict[str, Any]:
        memory = holder["memory"]
        pairs = zip(memory["task"].tolist(), memory["origin"].tolist(), strict=True)
        return scrub.select(holder, torch.tensor([pair not in places for pair in pairs]).bool())

    return Prior.from_state_dict(scrub.map_memories(prior.state_dict(), fewer))


def import_prior(path: Path, store: str, *, message: str, readmit: bool = False) -> tuple[int, int]:
    """Make a learner's prior and memory today's in a store, which is made where it is missing;
    the new version, and how many items it has."""
    prior = prior_in(path)
    with open_store(store, "a") as opened:
        version = opened.save_prior(prior, message=message, readmit=readmit)
    return version, 0 if prior.memory is None else len(prior.memory)
