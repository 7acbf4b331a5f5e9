"""What a run is: plain settings, from flags or from a TOML file. Imports no torch: help is instant.

The command line and the files share these dataclasses. A file is read as if its entries were flags
put before the others, so that both are checked alike and a flag wins over the file.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from tyro.conf import OmitArgPrefixes, UseAppendAction, arg
from tyro.constructors import PrimitiveConstructorSpec

from . import budget

BenchmarkName = Literal[
    "split-digits",
    "split-mnist",
    "permuted-mnist",
    "permuted-mnist-50",
    "split-cifar-t",
    "split-tiny-imagenet",
    "imagenet-1000",
    "fromp-toy",
    "two-moons",
]
PresetName = Literal[
    "finetune",
    "weight_decay",
    "ewc",
    "online_ewc",
    "si",
    "online_laplace",
    "kprior",
    "fromp",
    "gradient_reconstruction",
    "recommended",
    "lwf",
    "experience_replay",
    "der",
    "derpp",
    "joint",
    "separate",
]
Scenario = Literal["task", "class", "domain"]
Optimizer = Literal["adam", "sgd"]
Schedule = Literal["constant", "one-cycle", "cosine", "triangular"]
Augmentation = Literal["none", "crop-flip", "shift", "elastic", "photo"]


class UsageError(ValueError):
    """Settings that make no run; the message says what to write instead."""


@dataclass(frozen=True)
class Training:
    """How each task is trained.

    memory_batch_size: remembered examples in each step; None takes all. clip: largest norm of the
    gradient of the loss, in nats per example; None clips nothing. momentum: of SGD. schedule: of
    the learning rate over one task. autocast: bfloat16 where torch thinks it safe. augment: of
    images in training, new and remembered (``lifelong.augment``). min_steps: a task too small for
    as many steps in ``epochs`` passes is passed over more often; 0 asks for none.
    """

    epochs: int = 10
    batch_size: int = 64
    memory_batch_size: int | None = None
    lr: float = 1e-3
    optimizer: Optimizer = "adam"
    momentum: float = 0.0
    clip: float | None = None
    schedule: Schedule = "constant"
    autocast: bool = False
    augment: Augmentation = "none"
    min_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "memory_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{name} must be a positive number, got {value}")
        if self.min_steps < 0:
            raise UsageError(f"min_steps must be at least 0, got {self.min_steps}")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"momentum must lie in [0, 1), got {self.momentum}")


# Flags --------------------------------------------------------------------------------------------


def _number(kind: type[int] | type[float], metavar: str, what: str) -> Any:
    def parse(values: list[str]) -> int | float:
        try:
            return kind(values[0])
        except ValueError:
            raise ValueError(f"expected {what}, got {values[0]!r}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=parse,
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: ["" if value is None else str(value)],
    )


def _choice(*choices: str) -> Any:
    def parse(values: list[str]) -> str:
        if values[0] not in choices:
            raise ValueError(f"expected {' or '.join(choices)}, got {values[0]!r}")
        return values[0]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(choices) + "}",
        instance_from_str=parse,
        is_instance=lambda value: value is None or value in choices,
        str_from_instance=lambda value: ["" if value is None else str(value)],
    )


def _default(text: str) -> Any:
    return arg(help_behavior_hint=f"(default: {text})")


_BENCHMARKS = _default("the benchmark's")


def _budget() -> Any:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT|BYTES|fidelity:F",
        instance_from_str=lambda values: budget.plain(budget.parse(values[0])),
        is_instance=lambda value: value is None or isinstance(value, int | str),
        str_from_instance=lambda value: ["" if value is None else str(value)],
    )


_Budget = Annotated[int | str | None, _budget()]
_Int = Annotated[int | None, _number(int, "INT", "a whole number")]
_Float = Annotated[float | None, _number(float, "FLOAT", "a number")]
_ScenarioFlag = Annotated[Scenario | None, _choice(*get_args(Scenario)), _BENCHMARKS]
_OptimizerFlag = Annotated[Optimizer | None, _choice(*get_args(Optimizer)), _BENCHMARKS]
_ScheduleFlag = Annotated[Schedule | None, _choice(*get_args(Schedule)), _BENCHMARKS]
_AugmentFlag = Annotated[Augmentation | None, _choice(*get_args(Augmentation)), _BENCHMARKS]
_SettingFlags = Annotated[
    UseAppendAction[tuple[str, ...]], arg(metavar="NAME=VALUE"), _default("none")
]


@dataclass(frozen=True)
class Experiment:
    """What is learned, and what is known of the past."""

    benchmark: BenchmarkName = "split-digits"
    """The tasks, in a row."""
    prior: PresetName = "fromp"
    """The method: what the past says about the weights."""
    data: Annotated[Path | None, arg(metavar="DIR"), _default("$LIFELONG_DATA")] = None
    """Folder with the data sets; MNIST as Parquet files or as torchvision keeps it."""
    scenario: _ScenarioFlag = None
    """task: the class set of each example is told; class: all classes compete; domain: the \
tasks share their labels."""
    memory: Annotated[_Budget, _BENCHMARKS] = None
    """What to remember of each task: examples (200), bytes (20MB: powers of 1000, 20MiB: of \
1024), or as few as reach a fidelity (fidelity:0.95). A method with one memory for all tasks \
(reservoir) gets as much in total: this number times the number of tasks."""
    set: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="NAME=VALUE"), _default("none")
    ] = ()
    """Any other setting of the prior, as in strength=10; say it again for the next one."""
    seed: int = 0
    """The first seed: of the initial weights, the order of the data, and draws from memory."""
    seeds: int = 1
    """How many seeds, one after another: seed, seed + 1, ..."""


@dataclass(frozen=True)
class Overrides:
    """How each task is trained; by default as published for the benchmark and the prior."""

    epochs: Annotated[_Int, _BENCHMARKS] = None
    """Passes over each task."""
    batch_size: Annotated[_Int, _BENCHMARKS] = None
    """New examples in each step."""
    memory_batch_size: Annotated[_Int, _default("all of them")] = None
    """Remembered examples in each step."""
    lr: Annotated[_Float, _BENCHMARKS] = None
    """Learning rate."""
    optimizer: _OptimizerFlag = None
    """Made afresh for each task."""
    momentum: Annotated[_Float, _BENCHMARKS] = None
    """Of SGD."""
    clip: Annotated[_Float, _BENCHMARKS] = None
    """Largest norm of the gradient, in nats per example; inf clips nothing."""
    schedule: _ScheduleFlag = None
    """Of the learning rate, over each task."""
    augment: _AugmentFlag = None
    """Images changed at random in training; crop-flip: moved by up to an eighth of a side, and \
mirrored; shift: moved by up to a fourteenth; elastic: moved, turned, stretched and bent a bit; \
photo: a random part of a photo that is read from its file."""
    min_steps: Annotated[_Int, _BENCHMARKS] = None
    """Steps that a small task gets at least, by more epochs."""
    autocast: bool = False
    """Mixed precision: bfloat16."""
    threads: int = 1
    """Threads of the processor that torch may use."""


@dataclass(frozen=True)
class Output:
    """Where it goes, and what is shown."""

    out: Annotated[Path | None, arg(metavar="DIR"), _default("runs/BENCHMARK-PRIOR")] = None
    """Folder of the run: settings, versions, log, checkpoints and results."""
    resume: Annotated[Path | None, arg(metavar="DIR"), _default("none")] = None
    """Go on with the interrupted run in this folder, with its settings."""
    config: Annotated[Path | None, arg(metavar="FILE"), _default("none")] = None
    """A TOML file of these flags without the dashes; flags win over it."""
    track: Annotated[
        UseAppendAction[tuple[str, ...]], arg(metavar="KIND[:WHERE]"), _default("none")
    ] = ()
    """Also tell tensorboard[:DIR], mlflow[:URI], wandb[:PROJECT] or trackio[:PROJECT]; say it \
again for the next one; none: with --resume, no longer those that the run has."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""
    quiet: bool = False
    """Show no progress."""
    debug: bool = False
    """Show the whole traceback of an error."""


@dataclass(frozen=True)
class RunFlags:
    """All flags of ``lifelong run``."""

    experiment: OmitArgPrefixes[Experiment] = field(default_factory=Experiment)
    training: OmitArgPrefixes[Overrides] = field(default_factory=Overrides)
    output: OmitArgPrefixes[Output] = field(default_factory=Output)


@dataclass(frozen=True)
class DemoFlags:
    """All flags of ``lifelong demo``."""

    out: Annotated[Path, arg(metavar="DIR")] = Path("runs/demo")
    """Folder for report.html."""
    seeds: int = 3
    """How many seeds: 0, 1, ..."""
    threads: int = 1
    """Threads of the processor that torch may use; the networks are too small to gain by more."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""
    quiet: bool = False
    """Show no progress."""
    debug: bool = False
    """Show the whole traceback of an error."""

    def __post_init__(self) -> None:
        for name in ("seeds", "threads"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class RunConfig:
    """What decides the numbers of a run, and nothing else. ``data`` is where the data lie."""

    experiment: Experiment = field(default_factory=Experiment)
    training: Overrides = field(default_factory=Overrides)

    def __post_init__(self) -> None:
        if self.experiment.seeds < 1:
            raise UsageError(f"seeds must be at least 1, got {self.experiment.seeds}")
        if self.experiment.seed < 0:
            raise UsageError(f"seed must not be negative, got {self.experiment.seed}")
        if self.experiment.seed + self.experiment.seeds > 2**63:  # as much as torch takes
            raise UsageError(f"all seeds must lie below 2**63, got seed {self.experiment.seed}")
        if self.training.threads < 1:
            raise UsageError(f"threads must be at least 1, got {self.training.threads}")
        try:
            memory = budget.parse(self.experiment.memory)
        except (TypeError, ValueError) as error:
            raise UsageError(f"memory: {error}") from None
        if memory == 0:
            raise UsageError(
                f"memory must be at least 1 example, got {self.experiment.memory}; to keep none, "
                "choose a prior without memory, such as ewc"
            )
        self.settings  # noqa: B018  # a wrong --set shows before anything is loaded

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the prior that ``--set`` gives, by name."""
        return dict(_setting(text) for text in self.experiment.set)

    @property
    def seed_list(self) -> tuple[int, ...]:
        first = self.experiment.seed
        return tuple(range(first, first + self.experiment.seeds))

    def applied(self, training: Training) -> Training:
        """``training`` with what this run changes."""
        known = {f.name for f in fields(Training)}
        changed = {
            name: value
            for name, value in asdict(self.training).items()
            if name in known and value is not None
        }
        if changed["autocast"] is False:
            del changed["autocast"]
        if changed.get("clip") == float("inf"):
            changed["clip"] = None
        return replace(training, **changed)

    def to_dict(self) -> dict[str, Any]:
        """Flat, by flag name, without what was left at None; ``set`` is a table. For json, which
        has no infinity, a clip of inf is the text "inf"."""
        flat = {**asdict(self.experiment), **asdict(self.training), "set": self.settings}
        if self.experiment.data is not None:
            flat["data"] = str(self.experiment.data)
        if self.training.clip == float("inf"):
            flat["clip"] = "inf"
        return {name: value for name, value in flat.items() if value not in (None, {})}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The inverse of ``to_dict``. Raises UsageError for unknown names."""
        known = {f.name for part in (Experiment, Overrides) for f in fields(part)}
        _require_known(values, known, "the settings of a run")
        values = dict(values)
        if "set" in values:
            values["set"] = tuple(f"{k}={_toml(v)}" for k, v in values["set"].items())
        if "data" in values:
            values["data"] = Path(values["data"])
        if values.get("clip") == "inf":
            values["clip"] = float("inf")

        def part(kind: type[Any]) -> Any:
            return kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})

        return cls(part(Experiment), part(Overrides))

    def to_toml(self) -> str:
        """As a file for ``--config``, which runs this again."""
        flat = self.to_dict()
        settings = flat.pop("set", {})
        lines = [f"{name} = {_toml(value)}" for name, value in flat.items()]
        if settings:
            lines += ["", "[set]", *(f"{name} = {_toml(v)}" for name, v in settings.items())]
        return "\n".join(lines) + "\n"


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not equals or not name.isidentifier():
        raise UsageError(f"--set wants NAME=VALUE, as in --set strength=10, got {text!r}")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        if value.strip().isidentifier():  # spares the quotes, which a shell would eat
            return name, {"True": True, "False": False}.get(value.strip(), value.strip())
        raise UsageError(
            f"--set {name}: {value!r} is not a value; write a number, true, false or a name"
        ) from None


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'
    raise UsageError(f"cannot write a {type(value).__name__} into a TOML file: {value!r}")


# Files --------------------------------------------------------------------------------------------


def flags_of(path: Path) -> list[str]:
    """The TOML file as command line flags. Raises UsageError for unknown keys, with a suggestion.

    Keys are the flags' names, with dashes or underscores; ``[set]`` is a table.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a TOML file: {error}") from None
    content = {name.replace("-", "_"): value for name, value in content.items()}
    switches = {"autocast", "json", "quiet", "debug"}
    known = {f.name for part in (Experiment, Overrides, Output) for f in fields(part)}
    _require_known(content, known - {"config", "resume"}, str(path))
    return list(_flags(content, switches, path))


def _flags(content: Mapping[str, Any], switches: Iterable[str], path: Path) -> Iterator[str]:
    for name, value in content.items():
        flag = "--" + name.replace("_", "-")
        if name in switches:
            if not isinstance(value, bool):
                raise UsageError(f"{path}: {name} must be true or false, got {value!r}")
            yield flag if value else f"--no-{flag[2:]}"
        elif name == "set":
            if not isinstance(value, Mapping):
                raise UsageError(f"{path}: write the settings of the prior as a table, [set]")
            for setting, given in value.items():
                yield from (flag, f"{setting}={_toml(given)}")
        elif name == "track" and isinstance(value, list):
            yield from (part for one in value for part in (flag, str(one)))
        elif isinstance(value, bool | Mapping | list):
            raise UsageError(f"{path}: {name} cannot be {value!r}")
        else:
            yield from (flag, str(value))


def _require_known(values: Iterable[str], known: Iterable[str], where: str) -> None:
    for name in values:
        if name not in known:
            raise UsageError(f"{where}: there is no setting {name!r}; " + suggestion(name, known))


def suggestion(name: str, known: Iterable[str]) -> str:
    """ "did you mean 'strength'?", or the list of what there is."""
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"choose from {', '.join(choices)}" if choices else "there is nothing to set"
