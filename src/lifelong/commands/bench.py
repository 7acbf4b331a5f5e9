"""``lifelong bench``: the tables, each in one command."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from ..config import UsageError
from .flags import parse

if TYPE_CHECKING:
    from ..bench.execute import Status, Watch
    from ..bench.table import Table

ABOUT = """\
Compute a table of methods at equal memory, several seeds each, and keep a record.
What was interrupted goes on with the same command; other methods, memories or
more seeds extend the record. Without a name: list the tables."""

EXAMPLES = """
examples:
  lifelong bench                                            the tables there are
  lifelong bench split-digits                               needs no files
  lifelong bench split-mnist --data DIR --seeds 3 --methods fromp ewc
  lifelong bench split-mnist --data DIR --redo fromp        after its settings changed
"""


@dataclass(frozen=True)
class BenchFlags:
    """All flags of ``lifelong bench``."""

    name: Annotated[Positional[str | None], arg(metavar="NAME")] = None
    """The table."""
    methods: Annotated[
        tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="(default: all)")
    ] = ()
    """Rows of the table."""
    memories: Annotated[
        tuple[int, ...], arg(metavar="INT ...", help_behavior_hint="(default: the table's)")
    ] = ()
    """Examples of each task that methods with memory keep."""
    seeds: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: the table's)")
    ] = None
    """How many seeds: 0, 1, ..."""
    data: Annotated[
        Path | None, arg(metavar="DIR", help_behavior_hint="(default: $LIFELONG_DATA)")
    ] = None
    """Folder with the data sets."""
    out: Annotated[
        Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/bench-NAME)")
    ] = None
    """Folder of the record."""
    jobs: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: cores)")] = None
    """Processes at once, of one thread each; 0: all in this process."""
    cache: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: OUT/cache)")] = (
        None
    )
    """For what cells share: features, first tasks."""
    redo: Annotated[
        tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="(default: none)")
    ] = ()
    """Rows whose cells are thrown away first, as after a change of their settings."""
    smoke: bool = False
    """A tiny version that shows that everything runs, and no more."""
    json: bool = False
    """Print the summary as one JSON object on standard output, and nothing else there."""
    quiet: bool = False
    """Show no progress."""
    debug: bool = False
    """Show the whole traceback of an error."""

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("jobs", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, got {value}")
        if any(m < 1 for m in self.memories):
            raise UsageError(f"memories must be at least 1 example, got {list(self.memories)}")


def bench(args: list[str]) -> int:
    """The exit code: 0, or 1 where a cell failed."""
    flags = parse(BenchFlags, "lifelong bench", ABOUT, EXAMPLES, args)
    from ..bench.execute import execute
    from ..bench.tables import table, tables

    if flags.name is None:
        given = [n for n in ("methods", "memories", "seeds", "out", "redo") if getattr(flags, n)]
        if given:
            raise UsageError(f"which table? --{given[0]} is of one; lifelong bench lists them")
        if flags.json:
            sys.stdout.write(json.dumps({"tables": [_told(t) for t in tables().values()]}) + "\n")
        else:
            list_tables(tables())
        return 0
    chosen = table(flags.name)
    data = flags.data or _data_from_environment()
    if chosen.needs_data and data is None:
        raise UsageError(
            f"{chosen.name} reads data: give --data DIR, the folder with the data sets, or set "
            "LIFELONG_DATA; split-digits needs no files"
        )
    if chosen.needs_data and data is not None and not data.is_dir():
        raise UsageError(f"--data: {data} is no folder; expected the one with the data sets")
    kind = "smoke" if flags.smoke else "bench"
    out = flags.out or Path("runs", f"{kind}-{chosen.name}")
    which = (flags.methods or None, flags.memories or None, flags.seeds)
    try:
        with progress(quiet=flags.quiet) as watch:
            summary = execute(
                chosen,
                out,
                methods=which[0],
                memories=which[1],
                seeds=which[2],
                data=None if data is None else data.absolute(),
                jobs=flags.jobs,
                smoke=flags.smoke,
                redo=flags.redo,
                cache=flags.cache,
                watch=watch,
            )
    except KeyboardInterrupt:
        sys.stderr.write(f"\nInterrupted. Go on with: {_again(args)}\n")
        return 130
    if flags.json:
        sys.stdout.write(json.dumps({**summary, "out": str(out)}, allow_nan=False) + "\n")
    else:
        show(chosen, summary, out)
    asked = chosen.tiny() if flags.smoke else chosen
    wanted = {(c.method, c.memory, c.seed) for c in asked.cells(*which)}
    failed = [
        f
        for row in summary["rows"]
        for f in row["failed"]
        if (row["method"], row["memory"], f["seed"]) in wanted
    ]
    if failed:
        sys.stderr.write(
            f"lifelong bench: {len(failed)} cells failed (see {out / 'log.txt'}); they are tried "
            f"again with: {_again(args)}\n"
        )
    return 1 if failed else 0


def _data_from_environment() -> Path | None:
    value = os.environ.get("LIFELONG_DATA")
    return Path(value) if value else None


def _again(args: list[str]) -> str:
    """The same command without what was to happen once."""
    kept: list[str] = []
    dropping = False
    for word in args:
        if word.startswith("--redo="):
            continue
        dropping = word == "--redo" or (dropping and not word.startswith("-"))
        if not dropping:
            kept.append(word)
    return shlex.join(["lifelong", "bench", *kept])


# What is shown ------------------------------------------------------------------------------------


def _told(table: Table) -> dict[str, Any]:
    """What ``list_tables`` shows, and the names of the rows, for programs."""
    return {
        "table": table.name,
        "title": table.title,
        "methods": [m.name for m in table.methods],
        "memories": list(table.memories),
        "seeds": table.seeds,
        "needs_data": table.needs_data,
    }


def list_tables(known: Mapping[str, Table]) -> None:
    """Names, titles and sizes, on standard output."""
    from rich.console import Console
    from rich.table import Table as Grid

    grid = Grid(box=None, pad_edge=False)
    for heading in ("table", "", "methods", "memories", "seeds", "data"):
        grid.add_column(heading, justify="right" if heading in ("methods", "seeds") else "left")
    for table in known.values():
        memories = " ".join(map(str, table.memories))
        needs = "files" if table.needs_data else "none"
        count, seeds = str(len(table.methods)), str(table.seeds)
        grid.add_row(table.name, table.title, count, memories, seeds, needs)
    Console().print(grid, highlight=False)


def show(table: Table, summary: Mapping[str, Any], out: Path) -> None:
    """The rows of a record, on standard output."""
    from rich.console import Console
    from rich.table import Table as Grid

    from ..report.table import bytes_text, count_text, seconds_text

    grid = Grid(title=table.title, title_justify="left", title_style="bold", box=None)
    headings = ("method", "memory", "accuracy, %", "forgetting, points", "kept", "time", "seeds")
    for heading in headings:
        grid.add_column(heading, justify="left" if heading == "method" else "right")
    for row in summary["rows"]:
        kept = ""
        if "memory_bytes" in row:
            examples = count_text(row.get("memory_examples", {"mean": 0})["mean"])
            kept = f"{examples} examples, {bytes_text(row['memory_bytes']['mean'])}"
        time = seconds_text(row["seconds"]["mean"]) if "seconds" in row else ""
        seeds = f"{len(row['seeds'])}"
        if row["failed"]:
            seeds += f", {len(row['failed'])} failed"
        cells = (_percent(row.get("accuracy")), _percent(row.get("forgetting")), kept, time, seeds)
        grid.add_row(row["method"], str(row["memory"] or ""), *cells)
    console = Console()
    console.print(grid, highlight=False)
    console.print(f"Record: {out}", highlight=False)


def _percent(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return ""
    error = estimate["standard_error"]
    return f"{100 * estimate['mean']:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


@contextmanager
def progress(*, quiet: bool) -> Iterator[Watch | None]:
    """A watch for ``execute``: a bar where somebody looks, plain lines elsewhere."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    from ..bench.execute import line
    from ..report.table import seconds_text

    def left(status: Status) -> str:
        known = status.seconds_left
        return "" if known is None else f" · about {seconds_text(known)} left"

    console = Console(stderr=True)
    if not console.is_terminal:

        def lines(status: Status) -> None:
            for content in status.ended:
                place = f"{status.done + status.failed}/{status.total}"
                sys.stderr.write(f"{place} {line(content)}{left(status)}\n")
            sys.stderr.flush()

        yield lines
        return
    columns = (BarColumn(bar_width=20), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("")

        def move(status: Status) -> None:
            for content in status.ended:
                bar.console.print(line(content), highlight=False)
            over = status.done + status.failed
            names = "; ".join(f"{r.cell} {100 * r.fraction:.0f} %" for r in status.running)
            text = f"{over}/{status.total} cells{left(status)} · {names}"
            part = over + sum(r.fraction for r in status.running)
            bar.update(task, description=text, total=status.total, completed=part)

        yield move
