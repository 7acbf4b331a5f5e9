"""Streams: the tasks, in the order in which they arrive.

A ``Task`` is a set of training examples, and perhaps of test examples; a stream is any iterable of
tasks. ``TaskStream`` is the one that the functions here make. The three scenarios of van de Ven &
Tolias 2019 differ only in the head and in the labels that the examples carry:

    "task"    the head of each example is the class set of its task; labels are the global ones
    "class"   no head: all outputs compete; labels are the global ones
    "domain"  no head; labels are positions in the class set, so that all tasks share the outputs

So Split MNIST reads as "which of the two digits", "which of ten digits" and "even or odd".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import Data, Examples, Head, as_data, batches, require_repeatable
from .models import Inputs, concat

Scenario = Literal["task", "domain", "class"]
Transform = Callable[[Inputs], Inputs]


@dataclass(frozen=True, eq=False)
class Loader:
    """Shuffled (inputs, labels) batches of ``data``: ``epochs`` passes, each in a new order.

    Every pass shows each example once (but for the remainder that ``drop_last`` leaves out). The
    order comes from ``generator`` (a CPU one), or from torch's global one where it is None; reading
    advances it. ``len`` is the number of batches over all epochs, as a scheduler needs it.

    Raises ValueError where there would be no batch.
    """

    data: Examples
    batch_size: int
    epochs: int = 1
    generator: torch.Generator | None = None
    drop_last: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.epochs < 0:
            raise ValueError(
                "expected batch_size of at least 1 and epochs of at least 0, "
                f"got batch_size={self.batch_size} and epochs={self.epochs}"
            )
        if self.drop_last and len(self.data) < self.batch_size:
            raise ValueError(
                f"drop_last leaves no batch: {len(self.data)} examples are fewer than "
                f"batch_size={self.batch_size}; lower batch_size or set drop_last=False"
            )

    def __len__(self) -> int:
        steps = len(self.data) / self.batch_size
        return self.epochs * (math.floor(steps) if self.drop_last else math.ceil(steps))

    def __iter__(self) -> Iterator[tuple[Inputs, Tensor]]:
        n = len(self.data)
        stop = n - self.batch_size + 1 if self.drop_last else n
        device = self.data.labels.device
        for _ in range(self.epochs):
            order = torch.randperm(n, generator=self.generator).to(device)
            for i in range(0, stop, self.batch_size):
                batch = self.data.batch(order[i : i + self.batch_size])
                yield batch.inputs, batch.labels


@dataclass(frozen=True, eq=False)
class Task:
    """One task of a stream; ``len(task)`` is its number of training examples.

    Raises ValueError where train or test hold no example, TypeError where they aren't Examples.
    """

    index: int
    name: str
    train: Examples
    test: Examples | None = None

    def __post_init__(self) -> None:
        for role, data in (("train", self.train), ("test", self.test)):
            if data is None and role == "test":
                continue
            if not isinstance(data, Examples):
                raise TypeError(
                    f"task {self.name!r}: {role} must be Examples, got {type(data).__name__}; "
                    "use Examples(inputs, labels)"
                )
            if len(data) == 0:
                raise ValueError(
                    f"task {self.name!r} has no {role} examples; leave the task out"
                    + ("" if role == "train" else ", or give test=None")
                )

    def __len__(self) -> int:
        return len(self.train)

    @property
    def head(self) -> Head | None:
        """The output units that compete in this task; None for all."""
        return self.train.head

    def loader(
        self,
        batch_size: int,
        epochs: int = 1,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
    ) -> Loader:
        """Shuffled (inputs, labels) batches of the training examples; see ``Loader``."""
        return Loader(self.train, batch_size, epochs, generator, drop_last)


@dataclass(frozen=True, eq=False)
class TaskStream(Sequence[Task]):
    """Tasks in order, with what a model must offer: ``num_outputs`` outputs.

    A slice is a stream of those tasks. Raises ValueError where there is no task, the scenario is
    not one of the three, or a head names an output beyond ``num_outputs``.
    """

    name: str
    tasks: tuple[Task, ...]
    num_outputs: int
    scenario: Scenario = "task"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if not self.tasks:
            raise ValueError(f"the stream {self.name!r} has no tasks; it needs at least one")
        _known_scenario(self.scenario)
        for task in self.tasks:
            if task.head and max(task.head) >= self.num_outputs:
                raise ValueError(
                    f"task {task.name!r} uses output {max(task.head)}, but num_outputs is "
                    f"{self.num_outputs}; raise it to at least {max(task.head) + 1}"
                )

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> TaskStream: ...
    def __getitem__(self, index: int | slice) -> Task | TaskStream:
        if isinstance(index, slice):
            return replace(self, tasks=self.tasks[index])
        return self.tasks[index]


def as_examples(data: Data) -> Examples:
    """Any data that ``batches`` reads, in memory; Examples are returned as they are.

    Raises NotRepeatableError where the data shuffle or augment: one draw would be frozen.
    """
    data = as_data(data)
    if isinstance(data, Examples):
        return data
    require_repeatable(data)
    parts = list(batches(data))
    inputs, labels = concat([b.inputs for b in parts]), torch.cat([b.labels for b in parts])
    return Examples(inputs, labels, head=getattr(data, "head", None))


# Class splits -------------------------------------------------------------------------------------


def split_by_class(
    train: Data,
    test: Data | None = None,
    *,
    classes_per_task: int | Sequence[Sequence[int] | AbstractSet[int]] = 2,
    class_order: Sequence[int] | None = None,
    scenario: Scenario = "task",
    num_outputs: int | None = None,
    name: str = "split",
) -> TaskStream:
    """Tasks of some classes each; ``scenario`` as in the module's table.

    ``classes_per_task`` is a number (the last task takes the classes that remain), or the class
    sets themselves. ``class_order`` is the order in which a number deals the classes out, by
    default ascending; classes that it, or the sets, do not name are left out. ``num_outputs`` is
    by default the largest label + 1, and for "domain" the size of the largest class set. Ids are
    those of ``train`` and ``test``: positions, unless the examples say otherwise.

    Raises ValueError where a class is named twice, has no training examples, is in ``test`` only,
    or where a task has no test examples; TypeError where the labels are not integers (N,).
    """
    _known_scenario(scenario)
    train = _with_class_labels(as_examples(train), "train")
    test = None if test is None else _with_class_labels(as_examples(test), "test")
    present = train.labels.unique().tolist()
    class_sets = _class_sets(present, classes_per_task, class_order)
    _check_class_sets(class_sets, present)
    if test is not None:
        unknown = sorted(set(test.labels.unique().tolist()) - set(present))
        if unknown:
            raise ValueError(
                f"test holds classes {unknown[:10]} of which train has no example; "
                "drop them, or give train and test of the same data set"
            )
    if num_outputs is None:
        widest = max(len(classes) for classes in class_sets)
        num_outputs = widest if scenario == "domain" else max(present) + 1
    tasks = tuple(
        Task(
            index,
            _name_of(classes),
            _restrict(train, classes, scenario),
            None if test is None else _restrict(test, classes, scenario),
        )
        for index, classes in enumerate(class_sets)
    )
    return TaskStream(name, tasks, num_outputs, scenario)


def _class_sets(
    present: list[int],
    classes_per_task: int | Sequence[Sequence[int] | AbstractSet[int]],
    class_order: Sequence[int] | None,
) -> list[Head]:
    if not isinstance(classes_per_task, int):
        if class_order is not None:
            raise ValueError("give class_order or the class sets themselves, not both")
        # A set has no order of its own; the position of a class must not depend on its hash.
        return [
            tuple(int(c) for c in (sorted(s) if isinstance(s, AbstractSet) else s))
            for s in classes_per_task
        ]
    if classes_per_task < 1:
        raise ValueError(f"classes_per_task must be at least 1, got {classes_per_task}")
    order = present if class_order is None else [int(c) for c in class_order]
    size = classes_per_task
    return [tuple(order[i : i + size]) for i in range(0, len(order), size)]


def _check_class_sets(class_sets: list[Head], present: list[int]) -> None:
    named = [c for classes in class_sets for c in classes]
    if not named or not all(class_sets):
        raise ValueError(f"a task has no classes: got the class sets {class_sets[:10]}")
    repeated = sorted({c for c in named if named.count(c) > 1})
    if repeated:
        raise ValueError(
            f"classes {repeated[:10]} are named more than once; each class belongs to one task "
            "(for tasks that share classes, make the Tasks yourself)"
        )
    missing = sorted(set(named) - set(present))
    if missing:
        raise ValueError(
            f"classes {missing[:10]} have no training examples; the data hold {present[:20]}"
        )


def _restrict(data: Examples, classes: Head, scenario: Scenario) -> Examples:
    chosen = torch.tensor(classes, device=data.labels.device)
    part = data[torch.isin(data.labels, chosen).nonzero().squeeze(1)]
    if scenario == "task":
        return replace(part, head=classes)
    if scenario == "class":
        return replace(part, head=None)
    ordered, position = chosen.sort()
    return replace(part, labels=position[torch.searchsorted(ordered, part.labels)], head=None)


def _with_class_labels(data: Examples, role: str) -> Examples:
    labels = data.labels
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise TypeError(
            f"{role}: expected integer class labels of shape (N,), got {labels.dtype} of shape "
            f"{tuple(labels.shape)}; by_time also takes other labels"
        )
    if len(labels) == 0:
        raise ValueError(f"{role} holds no examples")
    if int(labels.min()) < 0:
        raise ValueError(f"{role}: class labels must be 0 or larger, got {int(labels.min())}")
    return replace(data, labels=labels.long())


def _name_of(classes: Head) -> str:
    if len(classes) <= 5:
        return "/".join(str(c) for c in classes)
    return f"{classes[0]}..{classes[-1]} ({len(classes)} classes)"


def _known_scenario(scenario: str) -> None:
    if scenario not in get_args(Scenario):
        raise ValueError(f"scenario must be one of {get_args(Scenario)}, got {scenario!r}")


# Changed inputs -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Permute:
    """Reorders the flattened inputs of each example: out[:, j] = in[:, permutation[j]].

    permutation: (D,) int64, a bijection of 0..D-1, where D is the number of values of an example.
    """

    permutation: Tensor

    def __call__(self, inputs: Inputs) -> Inputs:
        x = _tensor(inputs, "a permutation")
        flat = x.flatten(1)
        if flat.shape[1] != len(self.permutation):
            raise ValueError(
                f"expected inputs of {len(self.permutation)} values each, got {flat.shape[1]}"
            )
        return flat.index_select(1, self.permutation.to(x.device)).reshape(x.shape)

    def inverse(self) -> Permute:
        """The permutation that restores the inputs."""
        return Permute(self.permutation.argsort())


@dataclass(frozen=True)
class Rotate:
    """Turns images (B, C, H, W) counter-clockwise about their centre.

    Bilinear; what comes from outside of the image is 0.
    """

    degrees: float

    def __call__(self, inputs: Inputs) -> Inputs:
        x = _tensor(inputs, "a rotation")
        if x.ndim != 4 or not x.is_floating_point():
            raise ValueError(
                "a rotation needs floating point images of shape (N, C, H, W), "
                f"got {x.dtype} of shape {tuple(x.shape)}"
            )
        height, width = x.shape[-2:]
        angle = math.radians(self.degrees)
        cos, sin = math.cos(angle), math.sin(angle)
        # The grid's coordinates run from -1 to 1 along either side, so a turn in them needs the
        # ratio of the sides.
        matrix = x.new_tensor([[cos, -sin * height / width, 0], [sin * width / height, cos, 0]])
        grid = F.affine_grid(
            matrix.expand(len(x), 2, 3), [len(x), x.shape[1], height, width], align_corners=False
        )
        return F.grid_sample(x, grid, align_corners=False)


@dataclass(frozen=True)
class Chain:
    """``first``, then ``second``."""

    first: Transform
    second: Transform

    def __call__(self, inputs: Inputs) -> Inputs:
        return self.second(self.first(inputs))


def permuted(
    train: Data,
    test: Data | None = None,
    *,
    num_tasks: int = 10,
    seed: int = 0,
    identity_first: bool = True,
    name: str = "permuted",
) -> TaskStream:
    """The same data in each task, the values of each input in another fixed order.

    With ``identity_first`` the first task is the data as they are (FROMP); else it is permuted
    too. The data are not copied: a task holds them with a transform. Task t of a seed does not
    depend on ``num_tasks``. Scenario "domain". Source: Goodfellow et al. 2013.

    Raises ValueError where ``num_tasks`` is below 1, TypeError where inputs aren't one tensor.
    """
    if num_tasks < 1:
        raise ValueError(f"num_tasks must be at least 1, got {num_tasks}")
    train = _with_class_labels(as_examples(train), "train")
    size = _tensor(train.batch(slice(0, 1)).inputs, "a permutation").numel()
    generator = torch.Generator().manual_seed(seed)
    changes: list[Transform | None] = [None] if identity_first else []
    while len(changes) < num_tasks:
        changes.append(Permute(torch.randperm(size, generator=generator)))
    names = [
        "identity" if change is None else f"permutation {t}" for t, change in enumerate(changes)
    ]
    return _transformed(name, train, test, changes, names)


def rotated(
    train: Data,
    test: Data | None = None,
    *,
    angles: Sequence[float],
    name: str = "rotated",
) -> TaskStream:
    """The same images (N, C, H, W) in each task, turned by ``angles[t]`` degrees; see ``Rotate``.

    Scenario "domain". Raises ValueError where no angle is given or inputs are no images.
    """
    train = _with_class_labels(as_examples(train), "train")
    changes = [Rotate(float(a)) if a % 360 else None for a in angles]
    for change in changes:
        if change is not None:
            change(train.batch(slice(0, 1)).inputs)  # a wrong shape shows here, not mid-training
    return _transformed(name, train, test, changes, [f"{a:g} degrees" for a in angles])


def _transformed(
    name: str,
    train: Examples,
    test: Data | None,
    changes: Sequence[Transform | None],
    names: Sequence[str],
) -> TaskStream:
    test = None if test is None else _with_class_labels(as_examples(test), "test")
    tasks = tuple(
        Task(t, names[t], _then(train, change), None if test is None else _then(test, change))
        for t, change in enumerate(changes)
    )
    return TaskStream(name, tasks, int(train.labels.max()) + 1, "domain")


def _then(data: Examples, change: Transform | None) -> Examples:
    if change is None:
        return data
    return replace(
        data, transform=change if data.transform is None else Chain(data.transform, change)
    )


def _tensor(inputs: Inputs, what: str) -> Tensor:
    if isinstance(inputs, Mapping):
        raise TypeError(
            f"{what} needs one input tensor, got a dict with the keys {sorted(inputs)[:5]}"
        )
    return inputs


# Streams without boundaries -----------------------------------------------------------------------


def blurred(
    stream: Sequence[Task],
    *,
    overlap: float = 0.2,
    num_chunks: int | None = None,
    seed: int = 0,
    name: str | None = None,
) -> TaskStream:
    """The examples of a stream in an order that moves gradually from each task to the next.

    Task t fills the time from t to t + 1, its examples in random order; each time then gets a
    uniform jitter of ± ``overlap``, so that around a boundary the share of the new task rises
    linearly over 2 x ``overlap`` of a task's length; 0 keeps the boundaries sharp. The examples
    are cut, in order of time, into ``num_chunks`` (default: four for each task) of equal size, give
    or take one; each occurs exactly once.

    A chunk's test set is that of the task most of its examples come from. Ids stay where they
    are unique over the stream; else they are positions in its tasks, one after another. Tasks
    with different transforms (``permuted``) are copied, since each example needs its own.

    Raises ValueError where examples carry heads, or the arguments are out of range.
    """
    tasks = list(stream)
    if not tasks:
        raise ValueError("the stream has no tasks to blur")
    if any(task.head is not None for task in tasks):
        raise ValueError(
            "cannot blur a task-incremental stream: its heads tell each example's task, and a "
            'chunk mixes several; use scenario="class" or scenario="domain"'
        )
    if not 0 <= overlap <= 0.5:
        raise ValueError(f"overlap must lie in [0, 0.5] of a task's length, got {overlap}")
    pool = _pool([task.train for task in tasks])
    owner = torch.repeat_interleave(
        torch.arange(len(tasks)), torch.tensor([len(task) for task in tasks])
    )
    num_chunks = 4 * len(tasks) if num_chunks is None else num_chunks
    _check_num_chunks(num_chunks, len(pool))

    generator = torch.Generator().manual_seed(seed)
    within = [(torch.randperm(len(task), generator=generator) + 0.5) / len(task) for task in tasks]
    jitter = overlap * (2 * torch.rand(len(pool), generator=generator) - 1)
    time = owner + torch.cat(within) + jitter
    chunks = []
    for i, index in enumerate(time.argsort(stable=True).tensor_split(num_chunks)):
        main = tasks[int(owner[index].bincount().argmax())]
        chunks.append(
            Task(i, f"chunk {i}, mostly {main.name}", pool[index.to(pool.labels.device)], main.test)
        )
    scenario: Any = getattr(stream, "scenario", "domain")
    num_outputs = getattr(stream, "num_outputs", None) or _num_outputs(pool.labels)
    title = name or f"blurred {getattr(stream, 'name', 'stream')}"
    return TaskStream(title, tuple(chunks), num_outputs, scenario)


def _pool(parts: list[Examples]) -> Examples:
    """All examples, with one transform where they share it, else transformed and copied."""
    shared = all(part.transform is parts[0].transform for part in parts)
    inputs = concat(
        [part.inputs if shared else part.batch(slice(0, None)).inputs for part in parts]
    )
    ids = torch.cat([part.ids for part in parts])
    unique = len(ids.unique()) == len(ids)
    return Examples(
        inputs,
        torch.cat([part.labels for part in parts]),
        ids if unique else None,  # type: ignore[arg-type]
        transform=parts[0].transform if shared else None,
    )


def by_time(
    inputs: Any,
    labels: Any,
    num_chunks: int,
    *,
    test_fraction: float = 0.0,
    num_outputs: int | None = None,
    name: str = "by time",
) -> TaskStream:
    """Consecutive chunks of equal size, give or take one, in the order of the data.

    The last ``test_fraction`` of each chunk, at least one example, is its test set; 0 gives none.
    ``num_outputs`` is by default the largest label + 1 for integer labels, and the width of the
    labels otherwise. Ids are positions. Scenario "domain".

    Raises ValueError where there are more chunks than examples, or a chunk keeps none to train.
    """
    data = Examples(inputs, labels)
    if not 0 <= test_fraction < 1:
        raise ValueError(f"test_fraction must lie in [0, 1), got {test_fraction}")
    _check_num_chunks(num_chunks, len(data))
    bounds = [len(data) * t // num_chunks for t in range(num_chunks + 1)]
    tasks = []
    for t, (start, end) in enumerate(pairwise(bounds)):
        held_out = max(1, round(test_fraction * (end - start))) if test_fraction else 0
        cut = end - held_out
        test = data[cut:end] if held_out else None
        tasks.append(Task(t, f"{start} to {end - 1}", data[start:cut], test))
    return TaskStream(name, tuple(tasks), num_outputs or _num_outputs(data.labels), "domain")


def _num_outputs(labels: Tensor) -> int:
    if labels.ndim > 1:
        return labels.shape[1]
    return 1 if labels.is_floating_point() else int(labels.max()) + 1


def _check_num_chunks(num_chunks: int, n: int) -> None:
    if not 1 <= num_chunks <= n:
        raise ValueError(f"expected between 1 and {n} chunks for {n} examples, got {num_chunks}")
