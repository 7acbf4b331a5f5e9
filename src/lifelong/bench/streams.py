"""``run_stream``: a cell that is a ``Learner`` over a stream from ``lifelong.benchmarks``.

It goes on at any epoch; the first task, which no prior can change, is trained once for each seed
and shared; ``joint`` is trained once, on everything. What is measured: docs/benchmarks.md.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint
from ..benchmarks import Benchmark, benchmark, learner_options
from ..config import Scenario, Training
from ..data import Examples, Head
from ..learner import CHECKPOINT, Learner
from ..likelihoods import Categorical
from ..metrics import AccuracyMatrix
from ..models import Inputs, nbytes
from ..presets import PRESETS
from ..prior import Prior
from ..runs import options_of
from ..streams import Task, TaskStream
from .lock import held
from .source import fingerprint
from .table import Cell, Context, Method, Table, plain

SAVE_EVERY = 30.0  # seconds
_SECONDS = "seconds.json"
LARGEST_KEPT = 700_000_000  # bytes of a stream


def run_stream(benchmark: str, scenario: Scenario, training: Training, **options: Any) -> StreamRun:
    """The ``run`` of a table: see ``StreamRun``, whose other fields are ``options``."""
    return StreamRun(benchmark, scenario, training, **options)


@dataclass(frozen=True)
class StreamRun:
    """Calling it computes one cell.

    benchmark, scenario: of ``BENCHMARKS``. training: of every method, but for what a method's own
    ``training`` says. validation: this fraction of each task's training data is held out and
    stands for the test data, which then take no part: for choosing settings. first_seed: of the
    cell with seed 0; settings are chosen with others than the record's. share: train the first
    task once for all methods; it changes no number. smoke_tasks, smoke_examples: how many tasks,
    and how many examples of each, the tiny version has.

    A method's memory is of each task; a preset with one memory in ``total`` gets that times the
    number of tasks.
    """

    benchmark: str
    scenario: Scenario
    training: Training
    validation: float = 0.0
    first_seed: int = 0
    share: bool = True
    smoke_tasks: int = 3
    smoke_examples: int = 60

    def __call__(self, table: Table, cell: Cell, context: Context) -> dict[str, Any]:
        method = table.method(cell.method)
        chosen = benchmark(self.benchmark)
        stream = self.stream(context)
        training = self.training_of(method, context.smoke)
        prior = self.prior_of(method, cell.memory, len(stream))
        seed = self.first_seed + cell.seed

        def make_learner(prior: Prior) -> Learner:
            torch.manual_seed(seed)
            model = chosen.make_model(stream.num_outputs)
            return Learner(model, prior, seed=seed, **learner_options(training))

        learner = make_learner(prior)
        untrained = [learner.test(task).accuracy for task in stream]
        if method.preset == "joint":
            learner = make_learner(PRESETS["finetune"](_labels_heads(stream)))
            matrix = _jointly(learner, stream, context)
        else:
            shared = self.shared(table, cell, context)
            if shared is not None:
                _first_task(learner, make_learner, stream[0], shared, context)
            matrix = _in_a_row(learner, stream, context)
        joint = method.preset == "joint"
        found = measured(learner, stream, matrix, untrained, jointly=joint)
        return (
            found if joint else {**found, "step_seconds": _step_seconds(learner, stream, context)}
        )

    def shared(self, table: Table, cell: Cell, context: Context) -> Path | None:
        """The first task's weights, which the first cell that needs them makes; None for a cell
        that trains that task by itself."""
        method = table.method(cell.method)
        prior = self.prior_of(method, cell.memory, num_tasks=1)
        if not self.share or method.preset == "joint" or not can_share(prior):
            return None
        training = self.training_of(method, context.smoke)
        key = self._key(training, self.first_seed + cell.seed, context)
        return context.cache / f"first-task-{key}" / CHECKPOINT

    def stream(self, context: Context) -> TaskStream:
        """The tasks, as small as a smoke test wants them, or with a part held out as the test."""
        stream = loaded(self.benchmark, self.scenario, context.data, context.cache)
        if context.smoke:
            stream = reduced(stream[: self.smoke_tasks], self.smoke_examples)
        return held_out(stream, self.validation) if self.validation else stream

    def prior_of(self, method: Method, memory: int, num_tasks: int) -> Prior:
        """What the row's preset gives at ``memory`` examples of each task."""
        given = arguments(method.preset, method.settings, memory, num_tasks)
        return PRESETS[method.preset](Categorical(), **given)

    def recipe(self, method: Method) -> dict[str, Any]:
        """What the row's preset and settings come to, but for how many examples are kept."""
        recipe = self.prior_of(method, memory=1, num_tasks=1).recipe.to_dict()
        return {name: value for name, value in recipe.items() if name != "memory"}

    def training_of(self, method: Method, smoke: bool = False) -> Training:
        """The table's training with the method's changes."""
        training = replace(self.training, **method.training)
        return replace(training, epochs=1, min_steps=0) if smoke else training

    def _key(self, training: Training, seed: int, context: Context) -> str:
        """Of everything that the first task's weights come from; no memory is drawn from there."""
        own = {
            k: v for k, v in asdict(self).items() if k not in ("training", "first_seed", "share")
        }
        of = {
            **{"run": type(self).__qualname__, **own, "seed": seed},
            **asdict(replace(training, memory_batch_size=None)),
            **{"data": str(context.data), "smoke": context.smoke},
            **{"source": fingerprint(), "torch": torch.__version__},
        }
        return hashlib.sha256(json.dumps(plain(of), sort_keys=True).encode()).hexdigest()[:16]


def arguments(
    preset: str, settings: Mapping[str, Any], memory: int, num_tasks: int
) -> dict[str, Any]:
    """The preset's arguments at ``memory`` examples of each task. Raises TypeError for unknown
    settings as the preset does."""
    known = options_of(PRESETS[preset])
    given = dict(settings)
    if "memory" not in known or "memory" in given:
        return given
    total = given.get("total", known.get("total", False))
    return {**given, "memory": memory * num_tasks if total else memory}


def published(name: str, preset: str, training: Training) -> dict[str, Any]:
    """The settings that ``benchmark(name)`` has for ``preset``, as arguments of ``Method``: what
    its training has beside the table's ``training``, and the preset's own settings."""
    found = benchmark(name).settings(preset)
    own, common = asdict(found.training), asdict(training)
    changed = {k: v for k, v in own.items() if v != common[k]}
    return {"settings": dict(found.prior), "training": changed}


# Streams ------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def loaded(name: str, scenario: Scenario, data: Path | None, cache: Path) -> TaskStream:
    """The benchmark's stream. What was decoded from files once is kept in ``cache``, where it is
    plain arrays that are not too large, since every cell reads it."""
    chosen: Benchmark = benchmark(name)
    if not chosen.needs_data:
        return chosen.make_stream(data, scenario)
    of = hashlib.sha256(f"{data} {fingerprint()}".encode()).hexdigest()[:16]
    path = cache / f"stream-{name}-{scenario}" / f"{of}.safetensors"
    with held(path.parent / ".lock"):
        if path.is_file():
            return _stream(checkpoint.load(path, kind="stream"))
        stream = chosen.make_stream(data, scenario)
        state = _stream_state(stream)
        if state is not None:
            for other in path.parent.glob("*.safetensors"):  # of older code
                other.unlink()
            checkpoint.save(path, state, kind="stream")
    return stream


def _stream_state(stream: TaskStream) -> dict[str, Any] | None:
    """For a file; None where transforms or sizes speak against it."""
    parts = [part for task in stream for part in (task.train, task.test) if part is not None]
    plain_arrays = all(p.transform is None and isinstance(p.inputs, Tensor) for p in parts)
    if not plain_arrays or sum(nbytes(p.inputs) for p in parts) > LARGEST_KEPT:
        return None
    names = ("inputs", "labels", "ids", "head")

    def of(part: Examples | None) -> dict[str, Any] | None:
        return None if part is None else {name: getattr(part, name) for name in names}

    tasks = [{"name": t.name, "train": of(t.train), "test": of(t.test)} for t in stream]
    own = {"name": stream.name, "num_outputs": stream.num_outputs, "scenario": stream.scenario}
    return {**own, "tasks": tasks}


def _stream(state: dict[str, Any]) -> TaskStream:
    """The inverse of ``_stream_state``."""
    tasks = [
        Task(
            index,
            task["name"],
            Examples(**task["train"]),
            None if task["test"] is None else Examples(**task["test"]),
        )
        for index, task in enumerate(state["tasks"])
    ]
    own = {name: state[name] for name in ("name", "num_outputs", "scenario")}
    return TaskStream(tasks=tuple(tasks), **own)


def reduced(stream: TaskStream, count: int) -> TaskStream:
    """At most ``count`` training and test examples of each task, drawn at random, always the
    same ones."""

    def few(data: Examples) -> Examples:
        return data[_order(len(data))[:count].sort().values]

    tasks = [
        replace(task, train=few(task.train), test=None if task.test is None else few(task.test))
        for task in stream
    ]
    return replace(stream, tasks=tuple(tasks))


def held_out(stream: TaskStream, fraction: float) -> TaskStream:
    """Each task trained on the rest and tested on this fraction of its training examples, always
    the same ones; the test examples are left out.

    Raises ValueError where the fraction is not between 0 and 1, or leaves a task nothing.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction held out must lie between 0 and 1, got {fraction}")
    parts: dict[int, tuple[Examples, Examples]] = {}  # streams whose tasks share their inputs

    def split(data: Examples) -> tuple[Examples, Examples]:
        if id(data.inputs) not in parts:
            order = _order(len(data))
            count = round(fraction * len(data))
            if not 0 < count < len(data):
                raise ValueError(f"{fraction} of {len(data)} examples leaves one part empty")
            kept, out = order[count:].sort().values, order[:count].sort().values
            parts[id(data.inputs)] = data[kept], data[out]
        return parts[id(data.inputs)]

    tasks = []
    for task in stream:
        kept, out = (
            replace(part, head=task.train.head, transform=task.train.transform)
            for part in split(task.train)
        )
        tasks.append(replace(task, train=kept, test=out))
    return replace(stream, tasks=tuple(tasks))


def _order(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(20_000))


# Learning -----------------------------------------------------------------------------------------


def can_share(prior: Prior) -> bool:
    """Whether the first task is trained as with no prior at all: nothing is known yet, no
    regulariser is there from the start, and no path of the training is asked for."""
    return not prior.terms and prior.recipe.structure != "path"


def _in_a_row(learner: Learner, stream: TaskStream, context: Context) -> AccuracyMatrix:
    """Learn the tasks that are not learned yet."""
    path = context.folder / CHECKPOINT
    if path.is_file():
        learner.load(path)
    counts = [len(task) for task in stream]  # of examples, which tell the time better than tasks

    def done(learned: int, part: float = 0.0) -> float:
        passed = [n * learner.epochs_of(n) for n in counts]
        return (sum(passed[:learned]) + part * sum(passed[learned : learned + 1])) / sum(passed)

    def on_epoch(progress: Any) -> None:
        if progress.epoch == progress.epochs:
            _add_seconds(context, progress.task, progress.seconds)
        context.report(done(progress.task, progress.epoch / progress.epochs))

    context.report(done(len(learner.accuracy)))
    return learner.run(
        stream,
        folder=context.folder,
        save_every=SAVE_EVERY,
        ahead=learner.prior.recipe.reference is None,
        on_epoch=on_epoch,
    )


def _add_seconds(context: Context, task: int, seconds: float) -> None:
    """What training took of a task, on disk beside the checkpoint."""
    path = context.folder / _SECONDS
    found = json.loads(path.read_text()) if path.is_file() else {}
    checkpoint.write(path, json.dumps({**found, str(task): seconds}))


def _step_seconds(learner: Learner, stream: TaskStream, context: Context) -> list[float | None]:
    """Of a step of training, by task: whether the past gets dearer as it grows. None for a first
    task that was shared."""
    path = context.folder / _SECONDS
    found = json.loads(path.read_text()) if path.is_file() else {}
    steps = [learner.epochs_of(len(task)) * -(-len(task) // learner.batch_size) for task in stream]
    return [found[str(t)] / n if str(t) in found else None for t, n in enumerate(steps)]


def _first_task(
    learner: Learner,
    make_learner: Callable[[Prior], Learner],
    task: Task,
    path: Path,
    context: Context,
) -> None:
    """Put ``learner`` where the first task's last epoch has just ended, as whichever cell came
    first has trained it with no prior; the seconds of that are counted."""
    if (context.folder / CHECKPOINT).is_file():
        return  # it is further already
    with held(path.parent / ".lock"):
        if not path.is_file():
            within = path.with_name("within.safetensors")
            _fit(make_learner(PRESETS["finetune"](Categorical())), task, within, path, context)
            within.unlink(missing_ok=True)
    _take(learner, path)


def _fit(
    learner: Learner, task: Task, within: Path, ended: Path | None, context: Context | None
) -> None:
    """Learn one task, going on from the checkpoint ``within``; ``ended`` is saved by the end."""
    if within.is_file():
        _take(learner, within)
    last = time.monotonic()

    def on_epoch(progress: Any) -> None:
        nonlocal last
        if progress.epoch == progress.epochs:
            if ended is not None:
                _put(learner, ended)
        elif time.monotonic() - last >= SAVE_EVERY:
            _put(learner, within)
            last = time.monotonic()
        if context is not None:
            context.report(progress.epoch / progress.epochs)

    learner.fit(task, on_epoch=on_epoch)


def _take(learner: Learner, path: Path) -> None:
    """Load all but the prior."""
    prior = learner.prior
    learner.load(path)
    learner.prior = prior


def _put(learner: Learner, path: Path) -> None:
    """Save all but the prior."""
    prior = learner.prior
    learner.prior = PRESETS["finetune"](Categorical())
    try:
        learner.save(path)
    finally:
        learner.prior = prior


# Joint training -----------------------------------------------------------------------------------


def _jointly(learner: Learner, stream: TaskStream, context: Context) -> AccuracyMatrix:
    """Train once on all tasks: only the last row of the matrix is there."""
    _fit(learner, union(stream), context.folder / CHECKPOINT, None, context)
    learner.prior = PRESETS["finetune"](Categorical())
    last = [learner.test(task).accuracy for task in stream]
    return AccuracyMatrix.empty(len(stream)).with_row(len(stream) - 1, last)


def union(stream: TaskStream) -> Task:
    """All tasks as one, which copies no inputs: each is read through its own task's transform.

    Task-incremental examples lose their heads here; ``_LabelsHead`` gives them back.
    """
    parts = tuple(task.train for task in stream)
    where = [
        torch.stack([torch.full((len(part),), t), torch.arange(len(part))], dim=1)
        for t, part in enumerate(parts)
    ]
    labels = torch.cat([part.labels for part in parts])
    return Task(0, "all", Examples(torch.cat(where), labels, transform=_Gather(parts)))


@dataclass(frozen=True, eq=False)
class _Gather:
    """(B, 2) int64 of (task, position) -> (B, ...) inputs."""

    parts: tuple[Examples, ...]

    def __call__(self, inputs: Inputs) -> Inputs:
        task, position = torch.as_tensor(inputs).unbind(1)
        where = [(task == t).nonzero().squeeze(1) for t in range(len(self.parts))]
        found = [
            torch.as_tensor(part.batch(position[mine]).inputs)
            for part, mine in zip(self.parts, where, strict=True)
            if len(mine)
        ]
        return torch.cat(found)[torch.cat(where).argsort()]


@dataclass(frozen=True)
class _LabelsHead(Categorical):
    """Softmax over the head that holds the label. heads: of all tasks, with no class in two."""

    heads: tuple[Head, ...] = ()

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        owner = torch.full((f.shape[-1],), -1, device=f.device)
        for t, head in enumerate(self.heads):
            owner[list(head)] = t
        return super().nll(self.mask(f, owner == owner[y].unsqueeze(1)), y)


def _labels_heads(stream: TaskStream) -> Categorical:
    heads = tuple(task.head for task in stream if task.head is not None)
    return _LabelsHead(heads) if len(heads) == len(stream) else Categorical()


# Measuring ----------------------------------------------------------------------------------------


def measured(
    learner: Learner,
    stream: TaskStream,
    matrix: AccuracyMatrix,
    untrained: list[float],
    *,
    jointly: bool = False,
) -> dict[str, Any]:
    """What a cell's record holds; fractions, nats, bytes, seconds; NaN where it has no meaning.

    gradients: examples, new and remembered, whose loss was differentiated in training.
    memory: what is kept for the next task; ``jointly``, all there is.
    """
    memory = learner.prior.memory
    examples, size = (0 if memory is None else len(memory)), learner.prior.num_bytes
    if jointly:
        examples = sum(map(len, stream))
        size = sum(len(task) * _size(task.train) for task in stream)
    networks = sum(nbytes(state) for state in learner.finished)  # of "separate"
    found = [learner.test(task) for task in stream]
    return {
        "accuracy": matrix.average_accuracy,
        "anytime_accuracy": matrix.anytime_accuracy,
        "backward_transfer": matrix.backward_transfer,
        "forgetting": matrix.forgetting,
        "learning_accuracy": matrix.learning_accuracy,
        "worst_task": matrix.worst_task,
        "zero_shot_transfer": matrix.zero_shot_transfer(untrained),
        "nll": _mean([e.nll for e in found]),
        "ece": _mean([e.ece for e in found]),
        "nll_per_task": [e.nll for e in found],
        "ece_per_task": [e.ece for e in found],
        "untrained": untrained,
        "matrix": matrix.to_list(),
        "seconds": learner.seconds,
        "gradients": learner.gradients,
        "memory_examples": examples,
        "memory_bytes": size + networks,
        "strengths": list(learner.prior.strengths),
    }


def _size(data: Examples) -> int:
    """Bytes of one example's inputs and label."""
    batch = data.batch(slice(0, 1))
    return nbytes(batch.inputs) + nbytes(batch.labels)


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)
