"""Runs: a configuration becomes a folder with results, and goes on there after an interruption.

plan = prepare(RunConfig(Experiment(benchmark="split-mnist", data=Path("data"))))
result = execute(plan, Path("runs/x"))

runs/x/config.json, config.toml   what was asked for, and what that came to; a file for --config
runs/x/versions.json              of everything that could change a number
runs/x/log.txt                    one line for each task learned
runs/x/seed-0/learner.safetensors the learner after its last epoch: model, prior, random state
runs/x/seed-0/accuracy.json       of a seed that is finished
runs/x/result.json                of all seeds
runs/x/.lock                      held while a process writes to the folder
runs/x/stop                       made by who wants the run to stop after its next epoch
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from .benchmarks import Benchmark, benchmark, learner_options
from .budget import Bytes, Fidelity, parse, plain
from .checkpoint import write
from .config import RunConfig, Scenario, Training, UsageError, suggestion
from .distributed import Ranks
from .errors import CheckpointError
from .learner import CHECKPOINT, Learner, Progress, passes
from .likelihoods import Categorical
from .metrics import mean_and_standard_error
from .models import nbytes, take
from .presets import PRESETS
from .prior import Prior
from .scores import ScoreName
from .streams import TaskStream

FORMAT = 1
CONFIG, TOML, VERSIONS, LOG = "config.json", "config.toml", "versions.json", "log.txt"
ACCURACY, RESULT, LOCK, STOP = "accuracy.json", "result.json", ".lock", "stop"
_SCORES = (*get_args(ScoreName), "k_centre")
_TRIES = 4  # of taking a lock
_INPUTS = 64  # of each part of a task, in a fingerprint


@dataclass(frozen=True)
class SeedResult:
    """One seed of a run. accuracy: R[t][i], fractions, None above the diagonal; seconds: of
    learning, without the tests; memory: what is kept for the next task."""

    seed: int
    matrix: list[list[float | None]]
    accuracy: float
    forgetting: float
    seconds: float
    memory_examples: int
    memory_bytes: int


@dataclass(frozen=True)
class Event:
    """What a run has just done: an epoch, or with ``accuracies`` a whole task.

    accuracies: on each task so far, fractions. learner: of a task's event, to be read, not changed.
    loss: nats per example over the epoch.
    """

    seed: int
    progress: Progress
    accuracies: tuple[float, ...] | None = None
    learner: Learner | None = field(default=None, repr=False, compare=False)


Watch = Callable[[Event], None]


class StoppedError(KeyboardInterrupt):
    """Somebody has asked for the run to stop (``ask_to_stop``): as if by Ctrl-C."""


@dataclass(frozen=True)
class Plan:
    """A run with all defaults filled in, checked as far as that goes before training."""

    config: RunConfig
    benchmark: Benchmark
    stream: TaskStream
    training: Training
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Epochs over all tasks and seeds."""
        return sum(self.epochs) * self.config.experiment.seeds

    @cached_property
    def epochs(self) -> tuple[int, ...]:
        """Epochs of each task."""
        sizes = [len(task) for task in self.stream]
        if self.make_prior().recipe.reference == "joint":
            sizes = list(accumulate(sizes))
        how = {name: getattr(self.training, name) for name in ("epochs", "batch_size", "min_steps")}
        return tuple(passes(size, **how) for size in sizes)

    def make_model(self, outputs: int) -> nn.Module:
        """A fresh network, behind what reads its inputs where they lie in files."""
        model = self.benchmark.make_model(outputs)
        reader = self.benchmark.reader
        return (
            model if reader is None else nn.Sequential(reader(self.config.experiment.data), model)
        )

    def fingerprint(self) -> str:
        """SHA-256 of what the data are: sizes, heads, all labels, some inputs of each task, and the
        names of the files that inputs stand for. Two folders that differ elsewhere share it."""
        found = hashlib.sha256()
        for task in self.stream:
            for part in (task.train, task.test):
                if part is None:
                    continue
                found.update(repr((task.name, part.head, len(part))).encode())
                found.update(part.labels.contiguous().cpu().numpy().tobytes())
                some = take(part.inputs, torch.arange(0, len(part), max(1, len(part) // _INPUTS)))
                for name, x in sorted(some.items() if isinstance(some, Mapping) else [("", some)]):
                    found.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
                    found.update(x.contiguous().cpu().numpy().tobytes())
        if self.benchmark.reader is not None:
            for path in self.benchmark.reader(self.config.experiment.data).paths:
                found.update(f"{path.parent.name}/{path.name}\n".encode())
        return found.hexdigest()

    def make_prior(self) -> Prior:
        """A prior that has seen nothing yet."""
        return PRESETS[self.config.experiment.prior](Categorical(), **self.arguments)

    def make_learner(self, seed: int, ranks: Ranks | None = None) -> Learner:
        """A fresh one. Sets torch's global seed, from which the initial weights come."""
        torch.manual_seed(seed)
        model = self.make_model(self.stream.num_outputs)
        options = learner_options(self.training)
        return Learner(model, self.make_prior(), seed=seed, ranks=ranks, **options)


def prepare(config: RunConfig) -> Plan:
    """Read the data and fill in the defaults: the benchmark's for the prior, then the config's.

    Raises UsageError for settings that make no run, FileNotFoundError where data are missing,
    ImportError where an extra is.
    """
    experiment = config.experiment
    chosen = benchmark(experiment.benchmark)
    scenario: Scenario = experiment.scenario or chosen.scenarios[0]
    if scenario not in chosen.scenarios:
        raise UsageError(
            f"{chosen.name} has no scenario {scenario!r}; it offers {', '.join(chosen.scenarios)}"
        )
    if chosen.needs_data and experiment.data is None:
        raise UsageError(
            f"{chosen.name} reads data: give --data DIR, the folder with its files (or set "
            "LIFELONG_DATA). split-digits needs no files"
        )
    settings = chosen.settings(experiment.prior)
    training = config.applied(settings.training)
    _checked_settings(experiment.prior, config.settings)
    stream = chosen.make_stream(experiment.data, scenario)
    arguments = _arguments(config, chosen, settings.prior, stream)
    plan = Plan(config, chosen, stream, training, arguments)
    try:
        plan.make_prior()
    except (TypeError, ValueError) as error:
        raise UsageError(f"{experiment.prior}: {error}") from error
    return plan


def execute(
    plan: Plan,
    folder: Path | None = None,
    watch: Watch | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Run every seed that is not finished yet; with ``folder``, everything is kept there.

    ranks: processes that learn together, each of which calls this; the first one writes. They may
    be more or fewer than those that began the run.
    Returns the summary that result.json holds. Raises OSError where the folder cannot be written,
    UsageError where another process writes to it, or the run there began with other data,
    CheckpointError where a checkpoint in it cannot be read, ConnectionError where another rank has
    ended, StoppedError after ``ask_to_stop``.
    """
    if folder is not None:
        _require_same_data(plan, folder)
    writes = folder is not None and _is_first(ranks)
    with claimed(folder) if folder is not None and writes else nullcontext():
        if folder is not None and writes:
            (folder / STOP).unlink(missing_ok=True)  # it was for the one before
        results = [_seed(plan, seed, folder, watch, ranks) for seed in plan.config.seed_list]
        summary = summarise(plan, results)
        if folder is not None and writes:
            write(folder / RESULT, _json(summary))
            log(folder, f"finished: accuracy {summary['accuracy']['mean']:.4f}")
    return summary


@contextmanager
def claimed(folder: Path, taken: str = "") -> Iterator[None]:
    """Inside, no other process writes to the run's folder. The lock is the system's, which lets go
    of it when a process ends in any way; where there is no ``flock`` (Windows) nothing is held.

    taken: what is said where another process holds it.
    Raises UsageError for that, OSError where it cannot be written.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        told = f"cannot write to {folder} ({error.strerror}); choose another folder"
        raise OSError(error.errno, told) from error
    try:
        for left in reversed(range(_TRIES)):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left:
                    raise UsageError(
                        taken
                        or f"another lifelong run is writing to {folder}; let it end, or choose "
                        "another folder with --out"
                    ) from None
                time.sleep(0.05)  # it may be one who only looks (``is_going_on``)
        yield
    finally:
        os.close(handle)


def is_going_on(folder: Path) -> bool:
    """Whether a process writes to the run's folder now; False where there is no ``flock``."""
    try:
        import fcntl

        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    except (ImportError, OSError):
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def ask_to_stop(folder: Path) -> None:
    """A run that goes on in ``folder`` stops after its next epoch, which is saved; it can be
    resumed. Raises UsageError where none goes on."""
    if not is_going_on(folder):
        raise UsageError(f"no run goes on in {folder}")
    write(folder / STOP, "")


def require_free(folder: Path) -> None:
    """Raise UsageError where ``folder`` holds a run, or is a file."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; choose another folder with --out")
    if (folder / CONFIG).exists() or (folder / RESULT).exists():
        raise UsageError(
            f"{folder} holds a run already ({_described(folder)}); choose another folder with "
            f"--out, or go on with it: {resume_command(folder)}"
        )


def create(plan: Plan, folder: Path) -> None:
    """Make the run's folder. Raises UsageError where another run lies there or is being made."""
    require_free(folder)
    content = _json(  # before there is a folder: what cannot be written leaves none
        {
            "format": FORMAT,
            "flags": plan.config.to_dict(),
            "training": asdict(plan.training),
            "prior": dict(plan.arguments),
            "data": plan.fingerprint(),
            "tasks": [task.name for task in plan.stream],
        }
    )
    with claimed(folder):
        require_free(folder)  # of another process, that was making it
        write(folder / TOML, plan.config.to_toml())
        write(folder / VERSIONS, _json(versions()))
        log(folder, f"started: {plan.config.experiment.prior} on {plan.benchmark.name}")
        write(folder / CONFIG, content)  # last, since it is what makes the folder a run


def _require_same_data(plan: Plan, folder: Path) -> None:
    """Where a run lies in ``folder``: a memory by numbers of files, and accuracies in one matrix,
    mean nothing with others."""
    try:
        before = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("data")
    except (OSError, ValueError, AttributeError):  # none yet, or damaged, of which others tell
        return
    if before is not None and before != plan.fingerprint():
        raise UsageError(
            f"the data in {plan.config.experiment.data} are not those that the run in {folder} "
            "began with (other files, labels or order); give the same --data, or start a new run"
        )


def load_config(folder: Path, *, adapted: bool = False) -> RunConfig:
    """The settings of the run in ``folder``. Raises UsageError where there is none, and unless
    ``adapted``, where it was adapted: its learner is no longer one of these settings alone."""
    path = folder / CONFIG
    if not path.is_file():
        raise UsageError(
            f"there is no run in {folder} (no {CONFIG}); start one with lifelong run --out {folder}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] > FORMAT:
            raise UsageError(f"{path} was written by a newer lifelong; upgrade to read it")
        if "adaptations" in content and not adapted:
            raise UsageError(
                f"the run in {folder} was adapted, and cannot be resumed; go on with it by "
                "lifelong adapt"
            )
        return RunConfig.from_dict(content["flags"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); start the run anew") from error


def changed_versions(folder: Path) -> list[str]:
    """What differs from when the run was started, as "torch 2.12 -> 2.13"."""
    try:
        before = json.loads((folder / VERSIONS).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return []
    now = versions()
    return [f"{k} {before[k]} -> {now[k]}" for k in now if k in before and before[k] != now[k]]


def resume_command(folder: Path) -> str:
    return f"lifelong run --resume {shlex.quote(str(folder))}"


def summarise(plan: Plan, results: list[SeedResult]) -> dict[str, Any]:
    """Mean, standard error (None for one seed) and values of each seed; no NaN, for json."""

    def over_seeds(name: str) -> dict[str, Any]:
        values = [getattr(result, name) for result in results]
        mean, error = mean_and_standard_error(values)
        return {
            "mean": mean,
            "standard_error": None if math.isnan(error) else error,
            "per_seed": values,
        }

    return {
        "benchmark": plan.benchmark.name,
        "prior": plan.config.experiment.prior,
        "scenario": plan.stream.scenario,
        "tasks": [task.name for task in plan.stream],
        "seeds": [result.seed for result in results],
        "accuracy": over_seeds("accuracy"),
        "forgetting": over_seeds("forgetting"),
        "seconds": over_seeds("seconds"),
        "memory_examples": max(result.memory_examples for result in results),
        "memory_bytes": max(result.memory_bytes for result in results),
        "matrices": [result.matrix for result in results],
        "config": {
            **plan.config.to_dict(),
            "training": asdict(plan.training),
            "prior_settings": dict(plan.arguments),
        },
    }


def versions() -> dict[str, str]:
    """Of lifelong, what it computes with, and the machine."""
    found = {"lifelong": _version("lifelong"), "python": platform.python_version()}
    found |= {name: _version(name) for name in ("torch", "numpy", "safetensors")}
    found |= {"platform": platform.platform(), "processor": platform.machine()}
    revision = _revision()
    return found if revision is None else {**found, "revision": revision}


def log(folder: Path, line: str) -> None:
    """Append to the run's log."""
    time = datetime.now().astimezone().isoformat(timespec="seconds")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG).open("a", encoding="utf-8") as file:
        file.write(f"{time} {line}\n")


# One seed -----------------------------------------------------------------------------------------


def _is_first(ranks: Ranks | None) -> bool:
    """Whether this process writes, and shows what is done."""
    return ranks is None or ranks.rank == 0


def _seed(
    plan: Plan, seed: int, folder: Path | None, watch: Watch | None, ranks: Ranks | None
) -> SeedResult:
    place = None if folder is None else folder / f"seed-{seed}"
    finished, begun = (
        place is not None and (place / name).is_file() for name in (ACCURACY, CHECKPOINT)
    )
    if ranks is not None:  # as the first one saw it, before it writes there
        finished, begun = ranks.objects((finished, begun))[0]
    if place is not None and finished:
        return SeedResult(**json.loads((place / ACCURACY).read_text(encoding="utf-8")))
    learner = plan.make_learner(seed, ranks)
    log_folder = folder if _is_first(ranks) else None
    if place is not None and begun:
        learner.load(place / CHECKPOINT)
        if log_folder is not None:
            log(log_folder, f"seed {seed}: resumed after {len(learner.accuracy)} tasks")
    result = learn_stream(
        learner, plan.stream, seed, folder=place, watch=watch, log_folder=log_folder
    )
    if place is not None and _is_first(ranks):
        write(place / ACCURACY, _json(asdict(result)))
    return result


def learn_stream(
    learner: Learner,
    stream: TaskStream,
    seed: int,
    *,
    folder: Path | None = None,
    watch: Watch | None = None,
    log_folder: Path | None = None,
) -> SeedResult:
    """Run a learner over a stream, from where it stands, and measure it."""
    last: list[Progress] = []

    def on_epoch(progress: Progress) -> None:
        last[:] = [progress]
        if watch is not None:
            watch(Event(seed, progress))
        asked = folder is not None and (folder.parent / STOP).exists()
        if learner.ranks is not None:  # as the first one sees it
            asked = learner.ranks.objects(asked)[0]
        if asked:
            raise StoppedError

    def on_task(index: int) -> None:
        row = tuple(learner.accuracy[index])
        if log_folder is not None:
            mean = sum(row) / len(row)
            log(log_folder, f"seed {seed}: task {index + 1}, accuracy so far {mean:.4f}")
        if watch is not None and last:
            watch(Event(seed, last[0], row, learner))

    matrix = learner.run(stream, folder=folder, on_epoch=on_epoch, on_task=on_task)
    memory = learner.prior.memory
    networks = sum(nbytes(state) for state in learner.finished)  # of "separate"
    return SeedResult(
        seed=seed,
        matrix=matrix.to_list(),
        accuracy=matrix.average_accuracy,
        forgetting=matrix.forgetting,
        seconds=learner.seconds,
        memory_examples=0 if memory is None else len(memory),
        memory_bytes=learner.prior.num_bytes + networks,
    )


# Settings of the prior ----------------------------------------------------------------------------


def _arguments(
    config: RunConfig, chosen: Benchmark, published: Mapping[str, Any], stream: TaskStream
) -> dict[str, Any]:
    name, memory = config.experiment.prior, config.experiment.memory
    defaults = options_of(PRESETS[name])
    arguments = {**published, **config.settings}
    if "memory" not in defaults:
        if memory is not None:
            raise UsageError(f"{name} keeps no chosen examples; leave out --memory")
        return arguments
    if "memory" in config.settings:
        if memory is not None:
            raise UsageError("give --memory or --set memory, not both")
        return arguments
    given = parse(chosen.memory if memory is None else memory)
    total = arguments.get("total", defaults.get("total", False))
    if total and isinstance(given, Fidelity):
        raise UsageError(
            f"{name} has one memory for all tasks, and a fidelity is of one task's; give a number "
            "or bytes, or --set total=false"
        )
    if total and isinstance(given, Bytes):
        return {**arguments, "memory": plain(Bytes(given.count * len(stream)))}
    if not isinstance(given, int):
        return {**arguments, "memory": memory}
    memory = given
    if total:
        # One memory for all tasks: the same budget as that many examples of each.
        return {**arguments, "memory": memory * len(stream)}
    smallest = min(stream, key=len)
    if memory > len(smallest):
        raise UsageError(
            f"--memory {memory} is more than task {smallest.name!r} has: {len(smallest)} examples"
        )
    return {**arguments, "memory": memory}


def options_of(preset: Callable[..., Prior]) -> dict[str, Any]:
    """The settings of a preset, with their defaults."""
    return {
        name: p.default
        for name, p in inspect.signature(preset).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    }


def _checked_settings(name: str, settings: Mapping[str, Any]) -> None:
    preset = PRESETS[name]
    known, hints = options_of(preset), get_type_hints(preset)
    for setting, value in settings.items():
        if setting not in known:
            raise UsageError(
                f"--set: {name} has no setting {setting!r}; " + suggestion(setting, known)
            )
        _require_fits(f"--set {setting}", value, hints[setting])
        if setting == "score" and value not in _SCORES:
            raise UsageError(f"--set score: expected one of {', '.join(_SCORES)}, got {value!r}")


def _require_fits(what: str, value: Any, hint: Any) -> None:
    options = get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)
    if not any(_fits(value, option) for option in options):
        names = " or ".join(_described_type(o) for o in options if o is not type(None))
        raise UsageError(f"{what}: expected {names}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _described_type(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(str(choice) for choice in get_args(hint))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}[hint]


# Files --------------------------------------------------------------------------------------------


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _described(folder: Path) -> str:
    try:
        experiment = load_config(folder).experiment
    except ValueError:
        return "damaged"
    done = sum((folder / f"seed-{s}" / ACCURACY).is_file() for s in load_config(folder).seed_list)
    return f"{experiment.prior} on {experiment.benchmark}, {done} of {experiment.seeds} seeds done"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _revision() -> str | None:
    """The git revision of lifelong's own source, where it is a checkout."""
    git = ("git", "-C", str(Path(__file__).parent))
    commands: Iterable[tuple[str, ...]] = (
        ("ls-files", "--error-unmatch", "__init__.py"),  # not the repository of a user round it
        ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
    )
    output = ""
    for command in commands:
        try:
            done = subprocess.run((*git, *command), capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        if done.returncode != 0:
            return None
        output = done.stdout.strip()
    return output or None
