"""The demo: ten handwritten digits, two at a time, learned with six methods; a table and a page.

    found = learn(seeds=range(3))
    write(found, Path("runs/demo/report.html"))

Scenario task-incremental: the two digits to choose from are told. Class-incremental: all ten
compete, and the network was never shown two digits of different tasks together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from .benchmarks import learner_options, mlp
from .config import Scenario, Training
from .data import Examples
from .identify import identify, outputs
from .learner import Learner, Progress
from .likelihoods import Categorical
from .models import evaluating
from .presets import PRESETS, finetune
from .report import Gallery, MethodResult, Picture, Report, RunSummary, Section
from .report import write as write_report
from .runs import Event, learn_stream, versions
from .streams import Task, TaskStream, split_by_class
from .toys import digits

# Chosen on a quarter of the *training* digits that was held out (seed 1 of the split), with two
# seeds; the test digits took no part. The network and the rate are those at which plain training
# forgets in both scenarios: with one hidden layer it hardly does where the task is told.
TRAINING = Training(epochs=15, batch_size=32, lr=5e-3)
HIDDEN = (64, 64)
MEMORY = 20  # digits of each task, ten of each class: 7 % of them

SCENARIOS: Mapping[Scenario, str] = MappingProxyType(
    {
        "task": "Which of these two digits? (task-incremental)",
        "class": "Which of ten digits? (class-incremental)",
    }
)
_ABOUT: Mapping[Scenario, str] = MappingProxyType(
    {
        "task": "Five tasks of two digits each, seen once, one after another. In training and "
        "testing the network is told which two digits it must choose from.",
        "class": "The same five tasks, but all ten digits compete all the time: the network must "
        "also know which task it looks at, although it never saw two tasks together.",
    }
)


@dataclass(frozen=True)
class Method:
    """A preset under the name that people know, and its settings for each scenario."""

    preset: str
    label: str
    note: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    class_settings: Mapping[str, Any] | None = None  # where they differ in "class"

    def settings_for(self, scenario: Scenario) -> Mapping[str, Any]:
        if scenario == "class" and self.class_settings is not None:
            return self.class_settings
        return self.settings


METHODS = (
    Method("finetune", "Plain training", "nothing is kept of the past"),
    Method("ewc", "EWC", "one importance for each weight", {"strength": 1.0}),
    Method(
        "fromp",
        "FROMP",
        "what the network said of a few digits",
        {"strength": 100.0, "memory": MEMORY},
    ),
    Method(
        "gradient_reconstruction",
        "Gradient reconstruction",
        "weights for most digits, functions for a few",
        {"memory": MEMORY},
    ),
    Method("joint", "Joint training", "all digits are kept, and learned anew for each task"),
)

GALLERY_SIZE = 20


@dataclass(frozen=True)
class Step:
    """Where the demo is: ``done`` of ``total`` epochs."""

    scenario: Scenario
    label: str
    seed: int
    progress: Progress
    done: int
    total: int


Watch = Callable[[Step], None]


def learn(
    seeds: Iterable[int] = range(3),
    watch: Watch | None = None,
    *,
    training: Training = TRAINING,
    methods: Iterable[Method] = METHODS,
) -> Report:
    """Run every method on both scenarios and choose the digits to show.

    Sets torch's global seed for each run. Raises ImportError where scikit-learn is missing.
    """
    seeds, methods = tuple(seeds), tuple(methods)
    train, test = digits()
    streams: dict[Scenario, TaskStream] = {
        scenario: split_by_class(train, test, scenario=scenario, name="digits")
        for scenario in SCENARIOS
    }
    tasks = sum(len(stream) for stream in streams.values())
    total = tasks * training.epochs * len(methods) * len(seeds)
    done = itertools.count(1)

    def result(method: Method, scenario: Scenario) -> MethodResult:
        def watched(event: Event) -> None:
            if event.accuracies is None and watch is not None:
                at = event.progress
                watch(Step(scenario, method.label, event.seed, at, next(done), total))

        stream = streams[scenario]
        runs = (_one(method, scenario, stream, seed, training, watched) for seed in seeds)
        return MethodResult(method.preset, method.label, tuple(runs), method.note)

    sections = [
        Section(
            title,
            _ABOUT[scenario],
            tuple(task.name for task in streams[scenario]),
            tuple(result(method, scenario) for method in methods),
            examples="digits",
        )
        for scenario, title in SCENARIOS.items()
    ]
    return Report(
        title="Five tasks in a row",
        subtitle="The same network learns ten handwritten digits, two at a time, and is tested on "
        "all that it has seen.",
        sections=tuple(sections),
        galleries=galleries(train, training),
        settings=_settings(training, methods, seeds, train, test),
        versions=versions(),
        date=date.today().isoformat(),
    )


def _one(
    method: Method,
    scenario: Scenario,
    stream: TaskStream,
    seed: int,
    training: Training,
    watch: Callable[[Event], None],
) -> RunSummary:
    torch.manual_seed(seed)
    model = mlp(64, *HIDDEN, stream.num_outputs)
    prior = PRESETS[method.preset](Categorical(), **method.settings_for(scenario))
    learner = Learner(model, prior, seed=seed, **learner_options(training))
    result = learn_stream(learner, stream, seed, watch=watch)
    return RunSummary(
        seed,
        tuple(tuple(row) for row in result.matrix),
        result.seconds,
        result.memory_examples,
        result.memory_bytes,
    )


def galleries(train: Examples, training: Training = TRAINING) -> tuple[Gallery, Gallery]:
    """The most and the least memorable digits, by lambda, for a network trained on all of them."""
    likelihood = Categorical()
    torch.manual_seed(0)
    model = mlp(64, *HIDDEN, 10)
    learner = Learner(model, finetune(likelihood), seed=0, **learner_options(training))
    learner.fit(Task(0, "all digits", train))
    scores = identify(model, train, likelihood, score="lambda")
    order = scores.argsort(descending=True, stable=True)
    with evaluating(model):
        f = outputs(model, train.batch(slice(None)), likelihood, None)
    probabilities = likelihood.mean(f)

    def pictures(which: torch.Tensor) -> tuple[Picture, ...]:
        return tuple(_picture(train, scores, probabilities, int(i)) for i in which)

    return (
        Gallery(
            "The most memorable digits",
            "Those of which a network that was trained on all of them is least sure: the largest "
            "λ = Σ p (1 - p) over the ten probabilities p. They lie at the boundaries between the "
            "digits, and FROMP remembers such ones.",
            pictures(order[:GALLERY_SIZE]),
        ),
        Gallery(
            "The least memorable digits",
            "The smallest λ: plain examples of their kind, which teach the network little that "
            "it does not know.",
            pictures(order.flip(0)[:GALLERY_SIZE]),
        ),
    )


def _picture(
    train: Examples, scores: torch.Tensor, probabilities: torch.Tensor, index: int
) -> Picture:
    label = int(train.labels[index])
    (p, c), (q, d) = zip(*(part.tolist() for part in probabilities[index].topk(2)), strict=True)
    batch = train.batch(torch.tensor([index]))
    pixels = torch.as_tensor(batch.inputs)[0, 0]
    image = (255 * (1 - pixels)).round().to(torch.uint8).numpy()  # ink on paper
    guesses = f"{c}: {_percent(p)}, {d}: {_percent(q)}"
    return Picture(
        image,
        f"a {label}, λ {scores[index]:.2g}. {guesses}",
        f"A handwritten {label}; the network says {guesses}",
    )


def _percent(probability: float) -> str:
    if probability > 0.995:
        return "> 99 %"
    return "< 1 %" if probability < 0.005 else f"{100 * probability:.0f} %"


def _settings(
    training: Training,
    methods: tuple[Method, ...],
    seeds: tuple[int, ...],
    train: Examples,
    test: Examples,
) -> dict[str, str]:
    sizes = "-".join(str(n) for n in (64, *HIDDEN, 10))
    found = {
        "digits": f"scikit-learn's, 8 × 8; {len(train)} to learn, {len(test)} to test",
        "network": f"MLP {sizes}, ReLU",
        "training": f"Adam, learning rate {training.lr:g}, {training.epochs} epochs for each task, "
        f"batches of {training.batch_size}",
        "seeds": ", ".join(str(seed) for seed in seeds),
    }
    for method in methods:
        per_scenario = {s: _listed(method.settings_for(s)) for s in SCENARIOS}
        if any(per_scenario.values()):
            same = len(set(per_scenario.values())) == 1
            found[method.label] = (
                per_scenario["task"]
                if same
                else "; ".join(f"{s}-incremental: {text}" for s, text in per_scenario.items())
            )
    return found


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" if not isinstance(value, str) else f"{name} {value}"
                     for name, value in settings.items())  # fmt: skip


def require_writable(folder: Path) -> None:
    """Raise OSError where the page could not be written: better now than after the training."""
    from .checkpoint import write as write_file

    probe = folder / ".lifelong"
    write_file(probe, b"")
    probe.unlink()


def write(report: Report, path: Path) -> Path:
    """The page, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_report(report, path)
