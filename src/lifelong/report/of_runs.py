"""The report of runs: made again from what their folders hold."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from ..adapted_runs import ADAPTATION
from ..config import UsageError
from ..errors import CheckpointError
from ..learner import CHECKPOINT
from ..memory import Memory
from ..run_memory import prior_in
from ..runs import ACCURACY, CONFIG, RESULT, VERSIONS, resume_command
from ..thumbnails import NoPictureError, pixels
from .results import Gallery, MethodResult, Picture, Report, RunSummary, Section

GALLERY_SIZE = 18


def of_runs(folders: Sequence[Path], command: str = "") -> Report:
    """One page about runs on the same tasks, a method each; pictures are of the first one's memory.

    Raises UsageError for a folder without a finished seed or given twice, for a run that was
    adapted, and for runs on other tasks.
    """
    places = [folder.resolve() for folder in folders]
    for i, folder in enumerate(folders):
        if places[i] in places[:i]:
            raise UsageError(f"{folder} is given twice; name each run once")
    read = [_read(folder) for folder in folders]
    tasks, first = read[0]["tasks"], read[0]
    for folder, other in zip(folders[1:], read[1:], strict=True):
        if (other["benchmark"], other["tasks"]) != (first["benchmark"], tasks):
            raise UsageError(
                f"{folder} is on other tasks ({other['benchmark']}) than {folders[0]} "
                f"({first['benchmark']}); make a report for each"
            )
    names = [content["prior"] for content in read]
    methods = []
    for place, content in zip(_told_apart(places), read, strict=True):
        name = content["prior"]
        if names.count(name) > 1:  # the same method with other settings
            name = f"{name} ({place})"
        methods.append(MethodResult(name, name, tuple(content["runs"]), preset=content["prior"]))
    scenario = {"task": "the task is told", "class": "all classes compete", "domain": "one head"}
    section = Section(
        first["benchmark"],
        f"{len(tasks)} tasks, one after another; {scenario[first['scenario']]}.",
        tuple(tasks),
        tuple(methods),
    )
    return Report(
        title=f"{names[0]} on {first['benchmark']}" if len(folders) == 1 else first["benchmark"],
        subtitle="What was learned, what was forgotten, and what is remembered",
        sections=(section,),
        galleries=_galleries(folders[0]),
        settings=first["settings"],
        versions=first["versions"],
        date=datetime.fromtimestamp((folders[0] / CONFIG).stat().st_mtime).date().isoformat(),
        command=command,
    )


def _told_apart(places: Sequence[Path]) -> list[str]:
    """The last parts of different paths, as few as tell all of them apart."""
    n = 1
    while len({place.parts[-n:] for place in places}) < len(places):
        n += 1
    return ["/".join(place.parts[-n:]) for place in places]


def _read(folder: Path) -> dict[str, Any]:
    """Of one run: what its files say."""
    if not (folder / CONFIG).is_file():
        raise UsageError(
            f"there is no run in {folder} (no {CONFIG}); lifelong run --out {folder} makes one"
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        seeds = [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(folder.glob(f"seed-*/{ACCURACY}"))
        ]
        versions = _optional(folder / VERSIONS)
        result = _optional(folder / RESULT)
        runs = [
            RunSummary(s["seed"], tuple(map(tuple, s["matrix"])), s["seconds"],
                       s["memory_examples"], s["memory_bytes"])
            for s in seeds
        ]  # fmt: skip
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"the run in {folder} is damaged ({error!r})") from error
    if "adaptations" in config:
        raise UsageError(
            f"the run in {folder} was adapted, and a report is of runs as they were learned; what "
            f"came of it is in {folder / ADAPTATION}, and lifelong ui {shlex.quote(str(folder))} "
            "shows it"
        )
    if not runs:
        raise UsageError(f"no seed of {folder} is finished; go on with {resume_command(folder)}")
    flags, size = config["flags"], len(runs[0].accuracy)
    training = config.get("training", {})
    settings = {
        "training": ", ".join(f"{k} {v}" for k, v in training.items() if v not in (None, False)),
        "prior": ", ".join(f"{k} {v}" for k, v in config.get("prior", {}).items()) or "as it is",
        "seeds": ", ".join(str(run.seed) for run in runs),
    }
    return {
        "prior": flags["prior"],
        "benchmark": flags.get("benchmark", ""),
        "scenario": result.get("scenario", flags.get("scenario") or "task"),
        "tasks": [str(t) for t in result.get("tasks", range(1, size + 1))],
        "runs": runs,
        "settings": settings,
        "versions": {str(k): str(v) for k, v in versions.items()},
    }


def _optional(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# ------------------------------------------------------------------------------- pictures


def _galleries(folder: Path) -> tuple[Gallery, ...]:
    """The remembered examples with the largest and the smallest lambda, where they are images."""
    path = next(iter(sorted(folder.glob(f"seed-*/{CHECKPOINT}"))), None)
    if path is None:
        return ()
    prior = prior_in(path)
    memory = prior.memory
    if memory is None or not len(memory) or not isinstance(memory.inputs, torch.Tensor):
        return ()
    f = prior.likelihood.mask(memory.outputs, memory.mask)
    score = prior.likelihood.hessian_trace(f).double()
    if not math.isfinite(float(score.sum())):
        return ()
    order = score.argsort(descending=True, stable=True)
    try:
        most = _pictures(memory, score, order[:GALLERY_SIZE])
        least = _pictures(memory, score, order.flip(0)[:GALLERY_SIZE])
    except NoPictureError:
        return ()
    about = "of the examples in the memory, by λ, the trace of the loss's curvature at them"
    return (
        Gallery("The most memorable examples",
                f"The largest {about}: the model is least sure of these.", most),
        Gallery("The least memorable examples",
                f"The smallest {about}: plain examples of their kind.", least),
    )  # fmt: skip


def _pictures(memory: Memory, score: torch.Tensor, places: torch.Tensor) -> tuple[Picture, ...]:
    found = []
    for place in places.tolist():
        label = memory.labels[place].tolist()
        image = pixels(memory.inputs[place])  # type: ignore[index]
        size = f"λ {score[place]:.3f}" if score[place] >= 0.001 else "λ < 0.001"
        caption = f"class {label}, task {int(memory.task[place]) + 1}: {size}"
        found.append(Picture(image, caption, f"A remembered example of class {label}"))
    return tuple(found)
