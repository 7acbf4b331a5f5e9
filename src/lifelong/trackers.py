"""Trackers: what a run learns, told to TensorBoard, MLflow, Weights & Biases or trackio.

    lifelong run --benchmark split-digits --track tensorboard --track mlflow
    tracker = trackers.tracker("tensorboard:runs/board")           # in a loop of one's own
    on_epoch, on_task = trackers.follow(tracker, learner)
    learner.run(stream, on_epoch=on_epoch, on_task=on_task)

A ``Tracker`` is six methods, so another one is soon written. A package that is missing is told
before anything is learned. What goes wrong with a tracker later is a TrackerWarning, and the run
goes on without it: numbers lie in the run's folder all the same. A run that is resumed goes on in
the same place.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import numpy as np
from PIL import Image

from .checkpoint import write
from .config import UsageError, suggestion
from .learner import Learner, Progress
from .likelihoods import Categorical
from .memory import Memory
from .models import take
from .report import of_runs
from .report import write as write_report
from .run_memory import learner_file, prior_in
from .runs import Event, Plan, Watch
from .thumbnails import NoPictureError, pixels

FILE = "trackers.json"  # in a run's folder: where each goes on
PICTURES = 24  # of the memory, in one image
_SIDE = 64  # pixels of each
Rows = Sequence[Sequence[float | None]]


class TrackerWarning(UserWarning):
    """A tracker has failed; the run goes on without it."""


class Tracker(Protocol):
    """Where numbers and pictures of a run go. step: epochs learned so far, over all tasks.

    place: plain values from which ``tracker`` opens the same run again.
    """

    @property
    def place(self) -> Mapping[str, str]: ...

    def config(self, values: Mapping[str, Any]) -> None:
        """Settings, by flat name."""
        ...

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def image(self, name: str, picture: Image.Image, step: int) -> None: ...

    def matrix(self, name: str, rows: Rows, step: int) -> None:
        """Rows of fractions, None where nothing was measured."""
        ...

    def artefact(self, path: Path) -> None:
        """A file of the run's."""
        ...

    def close(self) -> None: ...


# ------------------------------------------------------------------------------- four of them


class TensorBoard:
    """Event files in a folder, which ``tensorboard --logdir`` shows. It has no place for files."""

    def __init__(self, folder: Path, name: str) -> None:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

        self.folder = folder
        # A file of its own also where another one was begun in the same second.
        suffix = f".{uuid4().hex[:8]}"
        self.writer = SummaryWriter(str(folder), flush_secs=1, filename_suffix=suffix)

    @property
    def place(self) -> Mapping[str, str]:
        return {"folder": str(self.folder.absolute())}

    def config(self, values: Mapping[str, Any]) -> None:
        rows = [f"| {name} | {value} |" for name, value in values.items()]
        self.writer.add_text("config", "\n".join(["| setting | value |", "|---|---|", *rows]), 0)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, name: str, picture: Image.Image, step: int) -> None:
        self.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def matrix(self, name: str, rows: Rows, step: int) -> None:
        self.writer.add_text(name, markdown(rows), step)

    def artefact(self, path: Path) -> None:
        self.writer.add_text("files", str(path), 0)

    def close(self) -> None:
        self.writer.close()


class MLflow:
    """A run in the experiment "lifelong" of a tracking server, or of mlflow.db in this folder."""

    def __init__(self, uri: str | None, name: str, run: str | None = None) -> None:
        from mlflow import MlflowClient, get_tracking_uri  # pyright: ignore[reportMissingImports]

        self.uri = uri or get_tracking_uri()
        self.client = MlflowClient(tracking_uri=self.uri)
        if run is None:
            found = self.client.get_experiment_by_name("lifelong")
            experiment = (
                self.client.create_experiment("lifelong") if found is None else found.experiment_id
            )
            run = self.client.create_run(experiment, run_name=name).info.run_id
        else:
            self.client.update_run(run, status="RUNNING")
        self.run = str(run)

    @property
    def place(self) -> Mapping[str, str]:
        return {"uri": self.uri, "run": self.run}

    def config(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self.client.log_param(self.run, name, value)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.client.log_metric(self.run, name, value, step=step)

    def image(self, name: str, picture: Image.Image, step: int) -> None:
        self.client.log_image(self.run, picture, key=name, step=step)

    def matrix(self, name: str, rows: Rows, step: int) -> None:
        self.client.log_dict(self.run, {"rows": [list(row) for row in rows]}, f"{name}.json")

    def artefact(self, path: Path) -> None:
        self.client.log_artifact(self.run, str(path))

    def close(self) -> None:
        self.client.set_terminated(self.run)


class WandB:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, project: str | None, name: str, run: str | None = None) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self.wandb, self.project = wandb, project or "lifelong"
        self.run = wandb.init(project=self.project, name=name, id=run, resume="allow")

    @property
    def place(self) -> Mapping[str, str]:
        return {"project": self.project, "run": self.run.id}

    def config(self, values: Mapping[str, Any]) -> None:
        self.run.config.update(dict(values), allow_val_change=True)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def image(self, name: str, picture: Image.Image, step: int) -> None:
        self.run.log({name: self.wandb.Image(picture)}, step=step)

    def matrix(self, name: str, rows: Rows, step: int) -> None:
        width = max((len(row) for row in rows), default=0)
        table = self.wandb.Table(
            columns=[f"task {i + 1}" for i in range(width)],
            data=[[*row, *[None] * (width - len(row))] for row in rows],
        )
        self.run.log({name: table}, step=step)

    def artefact(self, path: Path) -> None:
        found = self.wandb.Artifact(path.stem, type="run")
        found.add_file(str(path))
        self.run.log_artifact(found)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of trackio, on this machine unless it is told of a Space. It has no place for files."""

    def __init__(self, project: str | None, name: str) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self.trackio, self.project, self.name = trackio, project or "lifelong", name
        self.run = trackio.init(project=self.project, name=name, resume="allow")

    @property
    def place(self) -> Mapping[str, str]:
        return {"project": self.project, "name": self.name}

    def config(self, values: Mapping[str, Any]) -> None:
        self.run.config = {**dict(self.run.config or {}), **values}

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def image(self, name: str, picture: Image.Image, step: int) -> None:
        self.run.log({name: self.trackio.Image(np.asarray(picture))}, step=step)

    def matrix(self, name: str, rows: Rows, step: int) -> None:
        cells = {
            f"{name}/after_{t + 1}_task_{i + 1}": value
            for t, row in enumerate(rows) for i, value in enumerate(row) if value is not None
        }  # fmt: skip
        self.run.log(cells, step=step)

    def artefact(self, path: Path) -> None:
        """Nothing: there is no place for it."""

    def close(self) -> None:
        self.trackio.finish()


def _tensorboard(where: str | None, name: str, folder: Path | None, place: Any) -> Tracker:
    if place is not None:
        where = place["folder"]
    if where is None and folder is None:
        raise UsageError("say where: tensorboard:DIR")
    return TensorBoard(Path(where) if where else folder / "tensorboard", name)  # type: ignore[operator]


def _mlflow(where: str | None, name: str, folder: Path | None, place: Any) -> Tracker:
    return MLflow(where, name) if place is None else MLflow(place["uri"], name, place["run"])


def _wandb(where: str | None, name: str, folder: Path | None, place: Any) -> Tracker:
    return WandB(where, name) if place is None else WandB(place["project"], name, place["run"])


def _trackio(where: str | None, name: str, folder: Path | None, place: Any) -> Tracker:
    return Trackio(where, name) if place is None else Trackio(place["project"], place["name"])


_Make = Callable[[str | None, str, Path | None, Any], Tracker]
KINDS: Mapping[str, _Make] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
    "trackio": _trackio,
}


def tracker(
    spec: str,
    *,
    name: str = "lifelong",
    folder: Path | None = None,
    place: Mapping[str, str] | None = None,
) -> Tracker:
    """One of ``KINDS``, from "KIND" or "KIND:WHERE".

    WHERE: TensorBoard's folder (by default ``folder``/tensorboard), MLflow's URI (by default its
    own), the project of Weights & Biases or trackio ("lifelong"). name: of the run; place: of a
    tracker before, to go on there.

    Raises UsageError for an unknown kind and for one that cannot be opened, ImportError where its
    package is missing.
    """
    kind, _, where = spec.partition(":")
    if kind not in KINDS:
        raise UsageError(f"there is no tracker {kind!r}; " + suggestion(kind, KINDS))
    try:
        return KINDS[kind](where or None, name, folder, place)
    except ImportError as error:
        raise ImportError(
            f"the tracker {kind} needs {error.name}: pip install 'lifelong[{kind}]'"
        ) from error
    except UsageError:
        raise
    except Exception as error:  # of somebody else's package: it may be anything
        raise UsageError(f"the tracker {spec} cannot be opened ({error})") from error


# ------------------------------------------------------------------------------- what is told


def markdown(rows: Rows) -> str:
    """A matrix as a table in percent."""
    width = max((len(row) for row in rows), default=0)
    head = ["after task", *(str(i + 1) for i in range(width))]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for t, row in enumerate(rows):
        cells = ["" if v is None else f"{100 * v:.1f}" for v in row]
        lines.append(f"| {' | '.join([str(t + 1), *cells, *[''] * (width - len(row))])} |")
    return "\n".join(lines)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a/b": 1}; None is left out."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
        elif value is not None:
            found[prefix + name] = value if isinstance(value, bool | int | float) else str(value)
    return found


def sheet(memory: Memory) -> Image.Image | None:
    """The remembered images of the largest lambda, in rows; None where inputs are no images."""
    if isinstance(memory.inputs, Mapping) or not len(memory):
        return None
    likelihood = Categorical()
    score = likelihood.hessian_trace(likelihood.mask(memory.outputs, memory.mask))
    best = score.argsort(descending=True)[:PICTURES]
    inputs: Any = take(memory.inputs, best)
    try:
        pictures = [Image.fromarray(pixels(x)).convert("RGB") for x in inputs]
    except NoPictureError:
        return None
    width = min(8, len(pictures))
    whole = Image.new("RGB", (width * _SIDE, -(-len(pictures) // width) * _SIDE))
    for n, picture in enumerate(pictures):
        small = picture.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
        whole.paste(small, (n % width * _SIDE, n // width * _SIDE))
    return whole


class Safely:
    """Several trackers, of which one that fails is left out with a TrackerWarning."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self.trackers = dict(trackers)

    def each(self, call: Callable[[Tracker], None]) -> None:
        for spec, one in list(self.trackers.items()):
            try:
                call(one)
            except Exception as error:  # of somebody else's package: it may be anything
                del self.trackers[spec]
                with suppress(Exception):
                    one.close()
                warnings.warn(
                    TrackerWarning(
                        f"the tracker {spec} has failed and is left out from now on ({error}); "
                        "the run goes on, and its numbers are in its folder"
                    ),
                    stacklevel=2,
                )


def _measured(row: Sequence[float], prefix: str = "") -> dict[str, float]:
    each = {f"{prefix}accuracy/task_{i + 1}": value for i, value in enumerate(row)}
    return {f"{prefix}accuracy": sum(row) / len(row), **each}


def follow(
    one: Tracker, learner: Learner
) -> tuple[Callable[[Progress], None], Callable[[int], None]]:
    """(on_epoch, on_task) for ``Learner.run``: losses, accuracies, the matrix so far, pictures of
    the memory. What fails is a TrackerWarning, once. Close the tracker yourself."""
    told, step = Safely({type(one).__name__: one}), 0

    def on_epoch(progress: Progress) -> None:
        nonlocal step
        step += 1
        values = {"loss": progress.loss, "task": float(progress.task + 1)}
        told.each(lambda t: t.scalars(values, step))

    def on_task(index: int) -> None:
        row = learner.accuracy[index]
        told.each(lambda t: t.scalars(_measured(row), step))
        told.each(lambda t: t.matrix("matrix", learner.accuracy, step))
        memory = learner.prior.memory
        picture = None if memory is None else sheet(memory)
        if picture is not None:
            told.each(lambda t: t.image("memory", picture, step))

    return on_epoch, on_task


# ------------------------------------------------------------------------------- runs


@contextmanager
def tracking(plan: Plan, folder: Path, specs: Sequence[str]) -> Iterator[Watch | None]:
    """A watch for ``runs.execute`` that tells the trackers, and closes them at the end.

    specs: of ``tracker``; a folder that has trackers already goes on with those, too. Raises as
    ``tracker``, before anything is learned.
    """
    places = _places(folder)
    every = dict.fromkeys([*places, *specs])
    if not every:
        yield None
        return
    opened: dict[str, Tracker] = {}
    try:
        for spec in every:
            opened[spec] = tracker(spec, name=folder.name, folder=folder, place=places.get(spec))
    except BaseException:
        for one in opened.values():
            with suppress(Exception):
                one.close()
        raise
    found = {spec: dict(one.place) for spec, one in opened.items()}
    write(folder / FILE, json.dumps(found, indent=1) + "\n")
    told = Safely(opened)
    if not places:
        settings = {**plan.config.to_dict(), "prior": dict(plan.arguments)}
        settings["name of the prior"] = plan.config.experiment.prior
        told.each(lambda t: t.config(flat(settings)))
    follower = _Run(plan, folder, told)
    try:
        yield follower
        follower.end()
    finally:
        told.each(lambda t: t.close())


def _places(folder: Path) -> dict[str, dict[str, str]]:
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class _Run:
    """What is told of a run while it goes on."""

    def __init__(self, plan: Plan, folder: Path, told: Safely) -> None:
        self.plan, self.folder, self.told = plan, folder, told
        self.rows: dict[int, list[list[float]]] = {}

    def __call__(self, event: Event) -> None:
        progress, prefix = event.progress, f"seed_{event.seed}/"
        step = sum(self.plan.epochs[: progress.task]) + progress.epoch
        if event.accuracies is None:
            values = {f"{prefix}loss": progress.loss, f"{prefix}task": float(progress.task + 1)}
            self.told.each(lambda t: t.scalars(values, step))
            return
        row = list(event.accuracies)
        rows = self.rows.setdefault(event.seed, [])
        rows.append(row)
        self.told.each(lambda t: t.scalars(_measured(row, prefix), step))
        self.told.each(lambda t: t.matrix(f"{prefix}matrix", rows, step))

    def end(self) -> None:
        """The run is finished: pictures of its memory, its results and its report."""
        steps = sum(self.plan.epochs)
        for seed in self.plan.config.seed_list:
            picture = _memory_of(self.folder, seed)
            if picture is not None:
                self.told.each(lambda t, p=picture, s=seed: t.image(f"seed_{s}/memory", p, steps))
        write_report(of_runs([self.folder]), self.folder / "report.html")
        for name in ("report.html", "result.json", "config.json"):
            self.told.each(lambda t, n=name: t.artefact(self.folder / n))


def _memory_of(folder: Path, seed: int) -> Image.Image | None:
    memory = prior_in(learner_file(folder, seed)).memory
    return None if memory is None else sheet(memory)
