"""The demo: ten handwritten digits, two at a time, learned with five methods; a table and a page.

    found = learn(seeds=range(3))
    write(found, Path("runs/demo/report.html"))

Scenario task-incremental: the two digits to choose from are told. Class-incremental: all ten
compete, and the network was never shown two digits of different tasks together.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from .benchmarks import BENCHMARKS, learner_options
from .checkpoint import write as write_file
from .config import Scenario, Training
from .data import Examples
from .learner import Learner, Progress
from .likelihoods import Categorical
from .models import evaluating
from .presets import PRESETS, finetune
from .report import Gallery, MethodResult, Picture, Report, RunSummary, Section, summary_rows
from .report import write as write_report
from .runs import Event, learn_stream, options_of, versions
from .scores import identify, outputs
from .streams import Task, TaskStream, split_by_class
from .toys import digits

DIGITS = BENCHMARKS["split-digits"]  # its network, training and settings, and how they were chosen

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
    """A preset under the name that people know."""

    preset: str
    label: str
    note: str

    @property
    def settings(self) -> dict[str, Any]:
        """The benchmark's for this preset."""
        chosen = dict(DIGITS.settings(self.preset).prior)
        if "memory" in options_of(PRESETS[self.preset]):
            chosen["memory"] = DIGITS.memory
        return chosen


METHODS = (
    Method("finetune", "Plain training", "nothing is kept of the past"),
    Method("ewc", "EWC", "one importance for each weight"),
    Method("fromp", "FROMP", "what the network said of a few digits"),
    Method(
        "gradient_reconstruction",
        "Gradient reconstruction",
        "weights for most digits, functions for a few",
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
    training: Training = DIGITS.training,
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
        runs = (_one(method, stream, seed, training, watched) for seed in seeds)
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
    stream: TaskStream,
    seed: int,
    training: Training,
    watch: Callable[[Event], None],
) -> RunSummary:
    torch.manual_seed(seed)
    model = DIGITS.make_model(stream.num_outputs)
    prior = PRESETS[method.preset](Categorical(), **method.settings)
    learner = Learner(model, prior, seed=seed, **learner_options(training))
    result = learn_stream(learner, stream, seed, watch=watch)
    return RunSummary(
        seed,
        tuple(tuple(row) for row in result.matrix),
        result.seconds,
        result.memory_examples,
        result.memory_bytes,
    )


def galleries(train: Examples, training: Training = DIGITS.training) -> tuple[Gallery, Gallery]:
    """The most and the least memorable digits, by lambda, for a network trained on all of them."""
    likelihood = Categorical()
    torch.manual_seed(0)
    model = DIGITS.make_model(10)
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
    guesses = f"{c} {_percent(p)}, {d} {_percent(q)}"
    score = float(scores[index])
    size = f"λ {score:.3f}" if score >= 0.001 else "λ < 0.001"
    return Picture(
        image,
        f"{label}: {size}; says {guesses}",
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
    found = {
        "digits": f"scikit-learn's, 8 × 8; {len(train)} to learn, {len(test)} to test",
        "network": DIGITS.description.rpartition("; ")[2],
        "training": f"Adam, learning rate {training.lr:g}, {training.epochs} epochs for each task, "
        f"batches of {training.batch_size}",
        "seeds": ", ".join(str(seed) for seed in seeds),
    }
    listed = {
        method.label: ", ".join(f"{name} {value:g}" for name, value in method.settings.items())
        for method in methods
    }
    return found | {label: text for label, text in listed.items() if text}


def require_writable(folder: Path) -> None:
    """Raise OSError where the page could not be written: better now than after the training."""
    probe = folder / ".lifelong"
    write_file(probe, b"")
    probe.unlink()


def write(report: Report, path: Path) -> Path:
    """The page, whole or not at all, and its numbers as result.json beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = asdict(replace(report, settings={}, versions={}, galleries=()))
    numbers |= {"settings": dict(report.settings), "versions": dict(report.versions)}
    for section, plain in zip(report.sections, numbers["sections"], strict=True):
        plain["table"] = summary_rows(section)
    write_file(path.with_name("result.json"), json.dumps(numbers, indent=1) + "\n")
    return write_report(report, path)
