"""Trackers: what a run learns, told to TensorBoard, MLflow, Weights & Biases or trackio.

    lifelong run --benchmark split-digits --track tensorboard --track mlflow
    tracker = trackers.tracker("tensorboard:runs/board")           # in a loop of one's own
    on_epoch, on_task = trackers.follow(tracker, learner)
    learner.run(stream, on_epoch=on_epoch, on_task=on_task)

A ``Tracker`` is six methods, so another one is soon written. A package that is missing and a server
that does not answer are told before anything is learned. In a run each tracker is told by a thread
of its own, so that no step waits for a network. What goes wrong with one later is a TrackerWarning,
and the run goes on without it: numbers lie in the run's folder all the same. A run that is resumed
goes on in the same place.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol
from uuid import uuid4

import numpy as np
from PIL import Image

from .checkpoint import write
from .config import UsageError, suggestion
from .learner import Learner, Progress
from .likelihoods import Categorical, Likelihood
from .memory import Memory
from .models import take
from .report import of_runs
from .report import write as write_report
from .runs import Event, Plan, Watch
from .thumbnails import NoPictureError, pixels

FILE = "trackers.json"  # in a run's folder: where each goes on
PICTURES = 24  # of the memory, in one image
_SIDE = 64  # pixels of each
PATIENCE = 60.0  # seconds for a tracker to answer at the beginning, and to take all at the end
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

    def close(self, *, complete: bool = True) -> None:
        """complete: whether the run has come to its end."""
        ...


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

    def close(self, *, complete: bool = True) -> None:
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

    def close(self, *, complete: bool = True) -> None:
        self.client.set_terminated(self.run, "FINISHED" if complete else "KILLED")


class WandB:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, project: str | None, name: str, run: str | None = None) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self.wandb, self.project = wandb, project or "lifelong"
        self.run = wandb.init(project=self.project, name=name, id=run, resume="allow")
        # Its own steps only grow, and what comes late is dropped; those of a second seed are small.
        self.run.define_metric("*", step_metric="step")

    @property
    def place(self) -> Mapping[str, str]:
        return {"project": self.project, "run": self.run.id}

    def config(self, values: Mapping[str, Any]) -> None:
        self.run.config.update(dict(values), allow_val_change=True)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log({**values, "step": step})

    def image(self, name: str, picture: Image.Image, step: int) -> None:
        self.run.log({name: self.wandb.Image(picture), "step": step})

    def matrix(self, name: str, rows: Rows, step: int) -> None:
        width = max((len(row) for row in rows), default=0)
        table = self.wandb.Table(
            columns=[f"task {i + 1}" for i in range(width)],
            data=[[*row, *[None] * (width - len(row))] for row in rows],
        )
        self.run.log({name: table, "step": step})

    def artefact(self, path: Path) -> None:
        found = self.wandb.Artifact(path.stem, type="run")
        found.add_file(str(path))
        self.run.log_artifact(found)

    def close(self, *, complete: bool = True) -> None:
        self.run.finish(exit_code=0 if complete else 1)


class Trackio:
    """A run of trackio, on this machine unless it is told of a Space."""

    def __init__(self, project: str | None, name: str, run: str | None = None) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self.trackio, self.project = trackio, project or "lifelong"
        # It goes on with a run by its name, so that a new one needs a name that none had.
        self.name = f"{name}-{uuid4().hex[:6]}" if run is None else run
        self.run = trackio.init(
            project=self.project, name=self.name, resume="allow", embed=False,
            auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

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
        self.run.log_artifact(str(path), name=path.stem, type="run")

    def close(self, *, complete: bool = True) -> None:
        self.run.finish()


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
    return (
        Trackio(where, name)
        if place is None
        else Trackio(place["project"], place["name"], place["name"])
    )


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

    Raises UsageError for an unknown kind and for one that cannot be opened or does not answer
    within PATIENCE, ImportError where its package is missing.
    """
    kind, _, where = spec.partition(":")
    if kind not in KINDS:
        raise UsageError(f"there is no tracker {kind!r}; " + suggestion(kind, KINDS))
    try:
        return _within(PATIENCE, lambda: KINDS[kind](where or None, name, folder, place))
    except ImportError as error:
        raise ImportError(
            f"the tracker {kind} needs {error.name}: pip install 'lifelong[{kind}]'"
        ) from error
    except UsageError:
        raise
    except Exception as error:  # of somebody else's package: it may be anything
        raise UsageError(f"the tracker {spec} cannot be opened ({error})") from error


def _within(seconds: float, make: Callable[[], Tracker]) -> Tracker:
    """What ``make`` gives or raises; TimeoutError where it takes too long. Packages try a server
    that does not answer again and again, for many minutes."""
    found: list[Tracker] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            found.append(make())
        except BaseException as error:
            failed.append(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not found:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return found[0]


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


def sheet(memory: Memory, likelihood: Likelihood | None = None) -> Image.Image | None:
    """The remembered images of the largest lambda, in rows; None where inputs are no images.
    likelihood: of the prior, by default ``Categorical``."""
    if isinstance(memory.inputs, Mapping) or not len(memory):
        return None
    likelihood = likelihood or Categorical()
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


Problem = Callable[[str], None]
_Call = Callable[[Tracker], None]


def _warn(text: str) -> None:
    warnings.warn(TrackerWarning(text), stacklevel=2)


def _left_out(spec: str, error: BaseException) -> str:
    return (
        f"the tracker {spec} has failed and is left out from now on ({error}); the run goes on, "
        "and its numbers are in its folder"
    )


class Aside:
    """A tracker that a thread of its own tells, call after call."""

    def __init__(self, one: Tracker) -> None:
        self.failed: Exception | None = None
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._thread = Thread(target=self._work, args=(one,), daemon=True)
        self._thread.start()

    def _work(self, one: Tracker) -> None:
        for call in iter(self._calls.get, None):
            try:
                call(one)
            except Exception as error:  # of somebody else's package: it may be anything
                self.failed = error
                with suppress(Exception):
                    one.close(complete=False)
                return

    def tell(self, call: _Call) -> None:
        """Soon; what ``call`` holds must not change any more."""
        self._calls.put(call)

    def ended(self, seconds: float) -> bool:
        """Whether all was told within so many seconds; nothing more is."""
        self._calls.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()


class Several:
    """Trackers beside each other, of which one that fails is left out. problem: told why."""

    def __init__(self, trackers: Mapping[str, Tracker], problem: Problem = _warn) -> None:
        self.open = {spec: Aside(one) for spec, one in trackers.items()}
        self.problem = problem

    def each(self, call: _Call) -> None:
        for one in self.open.values():
            one.tell(call)
        self._look()

    def _look(self) -> None:
        for spec, one in list(self.open.items()):
            if one.failed is not None:
                del self.open[spec]
                self.problem(_left_out(spec, one.failed))

    def close(self, *, complete: bool) -> None:
        """Wait until all was told, PATIENCE in all."""
        self.each(lambda t: t.close(complete=complete))
        until = time.monotonic() + PATIENCE
        for spec, one in list(self.open.items()):
            if not one.ended(max(0.0, until - time.monotonic())):
                del self.open[spec]
                self.problem(
                    f"the tracker {spec} has not taken all within {PATIENCE:.0f} s, and the rest "
                    "is lost to it; the run's numbers are in its folder"
                )
        self._look()


def _measured(learner: Learner, prefix: str = "") -> dict[str, float]:
    """After a task."""
    prior, matrix = learner.prior, learner.matrix
    found = {"accuracy": matrix.average_accuracy, "forgetting": matrix.forgetting}
    found |= {f"accuracy/task_{i + 1}": value for i, value in enumerate(learner.accuracy[-1])}
    found["memory/examples"] = 0 if prior.memory is None else len(prior.memory)
    found["memory/bytes"] = prior.num_bytes
    return {prefix + name: float(value) for name, value in found.items()}


def _told_of_task(learner: Learner, prefix: str = "") -> Iterator[Callable[[Tracker, int], None]]:
    """What a learner that has learned a task gives: calls of (a tracker, the step). They hold
    copies, so that they may be made later."""
    rows = [list(row) for row in learner.accuracy]
    values = _measured(learner, prefix)
    yield lambda t, step: t.scalars(values, step)
    yield lambda t, step: t.matrix(f"{prefix}matrix", rows, step)
    memory = learner.prior.memory
    picture = None if memory is None else sheet(memory, learner.prior.likelihood)
    if picture is not None:
        yield lambda t, step: t.image(f"{prefix}memory", picture, step)


def follow(
    one: Tracker, learner: Learner
) -> tuple[Callable[[Progress], None], Callable[[int], None]]:
    """(on_epoch, on_task) for ``Learner.run``: losses, accuracies, the matrix so far, the size and
    pictures of the memory. They return once the tracker was told; where it fails, that is a
    TrackerWarning, and it is told no more. Close the tracker yourself."""
    works = True

    def told(call: _Call) -> None:
        nonlocal works
        try:
            if works:
                call(one)
        except Exception as error:  # of somebody else's package: it may be anything
            works = False
            _warn(_left_out(type(one).__name__, error))

    step = 0

    def on_epoch(progress: Progress) -> None:
        nonlocal step
        # Of a learner that was loaded, the tasks before are thought to be as long as this one.
        step = max(step + 1, progress.task * progress.epochs + progress.epoch)
        told(lambda t: t.scalars(_trained(progress), step))

    def on_task(index: int) -> None:
        for call in _told_of_task(learner):
            told(lambda t, call=call: call(t, step))

    return on_epoch, on_task


def _trained(progress: Progress, prefix: str = "") -> dict[str, float]:
    return {f"{prefix}loss": progress.loss, f"{prefix}task": float(progress.task + 1)}


# ------------------------------------------------------------------------------- runs


@contextmanager
def tracking(
    plan: Plan,
    folder: Path,
    specs: Sequence[str],
    problem: Problem = _warn,
    *,
    quiet: bool = False,
) -> Iterator[Watch | None]:
    """A watch for ``runs.execute`` that tells the trackers, and closes them at the end.

    specs: of ``tracker``; a folder that has trackers already goes on with those, too, unless
    "none" is among them. problem: told of a tracker that fails. Inside, what goes to standard
    output goes to standard error, or nowhere if ``quiet``: some trackers talk there, and it is the
    results' own.
    Raises as ``tracker``, before anything is learned.
    """
    places = {} if "none" in specs else _places(folder)
    every = [spec for spec in dict.fromkeys([*places, *specs]) if spec != "none"]
    if not every:
        yield None
        return
    with redirect_stdout(StringIO() if quiet else sys.stderr):
        opened: dict[str, Tracker] = {}
        try:
            for spec in every:
                place = places.get(spec)
                opened[spec] = tracker(spec, name=folder.name, folder=folder, place=place)
            found = {spec: dict(one.place) for spec, one in opened.items()}
            write(folder / FILE, json.dumps(found, indent=1) + "\n")
        except BaseException:
            for one in opened.values():
                with suppress(Exception):
                    one.close(complete=False)
            raise
        told, complete = Several(opened, problem), False
        settings = {**plan.config.to_dict(), "prior": dict(plan.arguments)}
        settings["name of the prior"] = plan.config.experiment.prior
        for spec, one in told.open.items():
            if spec not in places:  # told once: MLflow's do not change
                one.tell(lambda t: t.config(flat(settings)))
        follower = _Run(plan, folder, told)
        try:
            yield follower
            complete = True
            follower.end()
        finally:
            told.close(complete=complete)


def _places(folder: Path) -> dict[str, dict[str, str]]:
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class _Run:
    """What is told of a run while it goes on."""

    def __init__(self, plan: Plan, folder: Path, told: Several) -> None:
        self.plan, self.folder, self.told = plan, folder, told

    def __call__(self, event: Event) -> None:
        progress, prefix = event.progress, f"seed_{event.seed}/"
        step = sum(self.plan.epochs[: progress.task]) + progress.epoch
        if event.accuracies is None:
            values = _trained(progress, prefix)
            self.told.each(lambda t: t.scalars(values, step))
        elif event.learner is not None:
            with self._unharmed("what was learned"):
                for call in _told_of_task(event.learner, prefix):
                    self.told.each(lambda t, call=call: call(t, step))

    def end(self) -> None:
        """The run is finished: its results and its report."""
        with self._unharmed("the report"):
            write_report(of_runs([self.folder]), self.folder / "report.html")
        for name in ("report.html", "result.json", "config.json"):
            path = self.folder / name
            if path.is_file():
                self.told.each(lambda t, path=path: t.artefact(path))

    @contextmanager
    def _unharmed(self, what: str) -> Iterator[None]:
        """The run is, by what goes wrong inside."""
        try:
            yield
        except Exception as error:
            self.told.problem(f"trackers are not told of {what} ({error}); the run goes on")
