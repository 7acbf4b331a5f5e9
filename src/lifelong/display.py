"""What a run shows in the terminal: a bar where somebody looks, plain lines elsewhere.

Progress goes to standard error, results to standard output.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from .demo import Step
from .report import Report, answer, summary_table
from .report.results import Estimate
from .report.table import bytes_text, count_text, estimate_text, seconds_text
from .runs import Event, Plan, Watch


@contextmanager
def run_progress(plan: Plan, *, quiet: bool) -> Iterator[Watch | None]:
    """A watch for ``runs.execute``."""
    if quiet:
        yield None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda event: _line(plan, event)
        return
    with _bar(console) as progress:
        yield _Bar(plan, progress)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=8),
        _TimeLeft(),
        console=console,
        transient=True,
    )


class _TimeLeft(ProgressColumn):
    """ "12 s left", once it is known."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        seconds = task.time_remaining
        return Text("" if seconds is None else f"{seconds_text(seconds)} left")


class _Bar:
    """Moves the bar to where an event is; a line stays for each task learned."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self.plan, self.progress = plan, progress
        self.id: TaskID | None = None
        self.accuracy = ""

    def __call__(self, event: Event) -> None:
        plan, at = self.plan, event.progress
        if event.accuracies is not None:
            self.accuracy = f" · acc {_percent(event.accuracies)} %"
            self.progress.console.print(_task_line(plan, event), highlight=False)
            return
        text = f"{_place(plan, event)} · epoch {at.epoch}/{at.epochs} · loss {at.loss:.2f}"
        if at.task == 0:
            self.accuracy = ""  # that of another seed
        done = (
            plan.config.seed_list.index(event.seed) * sum(plan.epochs)
            + sum(plan.epochs[: at.task])
            + at.epoch
        )
        if self.id is None:
            # A run that was resumed starts its clock here, not at the first seed.
            self.id = self.progress.add_task(text, total=plan.steps, completed=done)
        self.progress.update(self.id, description=text + self.accuracy, completed=done)


def _line(plan: Plan, event: Event) -> None:
    if event.accuracies is not None:
        sys.stderr.write(_task_line(plan, event) + "\n")
        sys.stderr.flush()


def _place(plan: Plan, event: Event) -> str:
    seeds = f"seed {event.seed} · " if len(plan.config.seed_list) > 1 else ""
    return f"{seeds}task {event.progress.task + 1}/{len(plan.stream)}"


def _task_line(plan: Plan, event: Event) -> str:
    name = plan.stream[event.progress.task].name
    each = " ".join(f"{100 * a:.1f}" for a in event.accuracies or ())
    return (
        f"{_place(plan, event)} ({name}) learned in {seconds_text(event.progress.seconds)}: "
        f"accuracy so far {_percent(event.accuracies or ())} % ({each})"
    )


def _percent(accuracies: tuple[float, ...]) -> str:
    return f"{100 * sum(accuracies) / max(1, len(accuracies)):.1f}"


@contextmanager
def demo_progress(*, quiet: bool) -> Iterator[Callable[[Step], None] | None]:
    """A watch for ``demo.learn``."""
    if quiet:
        yield None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        shown: list[tuple[str, str]] = []

        def line(step: Step) -> None:
            what = (step.scenario, step.label)
            if shown[-1:] != [what]:
                shown.append(what)
                percent = 100 * (step.done - 1) // step.total
                sys.stderr.write(f"{percent:3d} % {step.scenario}-incremental: {step.label}\n")
                sys.stderr.flush()

        yield line
        return
    with _bar(console) as progress:
        task = progress.add_task("")

        def move(step: Step) -> None:
            at = step.progress
            where = f"seed {step.seed} · task {at.task + 1}"
            text = f"{step.label}, {step.scenario}-incremental · {where}"
            progress.update(task, description=text, total=step.total, completed=step.done)

        yield move


def demo_tables(report: Report, page: Path) -> None:
    """One table for each scenario, and where the page is."""
    console = Console()
    for section in report.sections:
        console.print(summary_table(section))
        console.print(Text(answer(section)))
        console.print()
    console.print(Text(f"Pictures and accuracy matrices: {page}"))


def run_table(plan: Plan, summary: dict[str, Any], folder: Path) -> None:
    """The summary of a run, and where it lies."""
    experiment = plan.config.experiment
    seeds = len(summary["seeds"])
    title = f"{experiment.prior} on {plan.benchmark.name}, {summary['scenario']}-incremental"
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=False
    )
    table.add_column()
    table.add_column()
    over = f"mean ± standard error over {seeds} seeds" if seeds > 1 else "one seed"
    table.add_row("Final accuracy", f"{_estimate(summary['accuracy'])} %, {over}")
    table.add_row("Forgetting", f"{_estimate(summary['forgetting'])} points")
    memory = f"{count_text(summary['memory_examples'])} examples"
    table.add_row("Memory", f"{memory}, {bytes_text(summary['memory_bytes'])}")
    table.add_row("Time", f"{seconds_text(summary['seconds']['mean'])} of training for each seed")
    table.add_row("Folder", str(folder))
    Console().print(table, highlight=False)


def _estimate(over_seeds: dict[str, Any]) -> str:
    return estimate_text(Estimate(over_seeds["mean"], over_seeds["standard_error"]))
