"""``lifelong adapt``: its flags, its help, what it prints. Torch comes with ``adapted_runs``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from ..config import UsageError, _default, _Float, _Int, suggestion

if TYPE_CHECKING:
    from ..adapted_runs import Certifying, Change

ABOUT = """\
usage: lifelong adapt {add,remove,relabel,regularise,transfer} RUN --out NEW [OPTIONS]

Change what a saved run has learned, without learning it again.

kinds:
  add         learn the next task, or the examples of a file
  remove      unlearn examples, by id, task or class
  relabel     correct the labels of examples
  regularise  another precision of the weights
  transfer    other hidden layers, more classes, fewer classes

RUN is the folder of a run and is only read. The adapted run goes to a folder of
its own, from which it can be adapted again. Each kind has its own options:
lifelong adapt remove --help
"""

EXAMPLES = """
examples:
  lifelong run --prior kprior --out runs/x
  lifelong adapt remove runs/x --label 3 --out runs/without-3 --compare
  lifelong adapt remove runs/x --ids 17,42 --out runs/y --certificate
  lifelong adapt relabel runs/x --ids 17,42 --to 3 --out runs/corrected
  lifelong adapt regularise runs/x --precision 0.1 --out runs/z
  lifelong adapt transfer runs/x --hidden 50 --out runs/small
  lifelong adapt add runs/x --from new.parquet --out runs/more
"""

_ABOUT_KIND = {
    "add": "Learn the next task of the benchmark, or the examples of a file.",
    "remove": """\
Unlearn examples: what they said is taken out of the memory, the gradient and
the curvature, and the network is fitted to what the others say.""",
    "relabel": """\
Correct the labels of examples: what their old labels said is taken out, and
the network is fitted to what they say now. An example is known by the label
that it has in the data; --to is what it should have been.""",
    "regularise": "Change the regulariser, and fit the network again.",
    "transfer": """\
Carry what was learned to another network. Other hidden layers learn from the
remembered examples alone; a run without a memory has none.""",
}


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Flags of all kinds."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of a run, made by lifelong run or lifelong adapt."""
    out: Annotated[Path, arg(metavar="NEW")]
    """Folder for the adapted run; RUN stays as it is."""
    seed: Annotated[_Int, _default("all that RUN has")] = None
    """Adapt this seed alone."""
    data: Annotated[Path | None, arg(metavar="DIR"), _default("where they lay")] = None
    """Folder with the data sets."""
    compare: bool = False
    """Also train a fresh network on all that is left, to compare."""
    method: Literal["auto", "newton", "lbfgs", "adam"] = "auto"
    """How to fit; auto: Newton where the problem is convex, else L-BFGS, or Adam for many data."""
    max_iterations: Annotated[_Int, _default("the method's")] = None
    """Steps of the fit."""
    lr: float = 1e-3
    """Learning rate of Adam."""
    threads: int = 1
    """Threads of the processor that torch may use."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""
    quiet: bool = False
    """Show no progress."""
    debug: bool = False
    """Show the whole traceback of an error."""


@dataclass(frozen=True, kw_only=True)
class AddFlags(Shared):
    """Flags of ``lifelong adapt add``."""

    source: Annotated[Path | None, arg(name="from", metavar="FILE"), _default("none")] = None
    """Examples: a Parquet or .npz file with inputs and labels; NEW keeps a copy of them."""
    head: Annotated[str | None, arg(metavar="INT,..."), _default("all classes")] = None
    """The classes that compete for the examples of the file."""
    task: Annotated[_Int, _default("none")] = None
    """The next task of the benchmark, by its number from 1; for a run that was interrupted."""

    @property
    def change(self) -> Change:
        from ..adapted_runs import Add

        head = None if self.head is None else _numbers("--head", self.head)
        return Add(self.task, self.source, head)


@dataclass(frozen=True, kw_only=True)
class RemoveFlags(Shared):
    """Flags of ``lifelong adapt remove``."""

    ids: Annotated[str | None, arg(metavar="INT,...|@FILE"), _default("any")] = None
    """Ids of the examples (positions in the training set), or a file of them after an @."""
    task: Annotated[_Int, _default("any")] = None
    """All of this task, by its number from 1; with --ids or --label, those of it."""
    label: Annotated[_Int, _default("any")] = None
    """All of this class."""
    certificate: bool = False
    """Write a certificate of the removal with its audit, json and a page, for each seed. With \
--compare the audit has the network that was trained afresh beside it."""
    key: Annotated[Path | None, arg(metavar="PEM"), _default("unsigned")] = None
    """Private key that signs the certificate; lifelong certificate key makes one."""
    note: str = ""
    """For the certificate: who asked, and why."""

    @property
    def certifying(self) -> Certifying | None:
        from ..adapted_runs import Certifying

        if not self.certificate and (self.key is not None or self.note):
            raise UsageError("--key and --note are of a certificate; give --certificate, too")
        if self.key is not None and not self.key.is_file():
            raise UsageError(
                f"--key: there is no file {self.key}; lifelong certificate key {self.key} makes one"
            )
        return Certifying(self.key, self.note) if self.certificate else None

    @property
    def change(self) -> Change:
        from ..adapted_runs import Remove

        if self.label is not None and not -(2**63) <= self.label < 2**63:
            raise UsageError(f"--label wants a class below 2**63, got {self.label}")
        return Remove(None if self.ids is None else _ids(self.ids), self.task, self.label)


@dataclass(frozen=True, kw_only=True)
class RelabelFlags(Shared):
    """Flags of ``lifelong adapt relabel``."""

    ids: Annotated[str | None, arg(metavar="INT,...|@FILE"), _default("none")] = None
    """Ids of the examples (positions in the training set), or a file of them after an @."""
    to: Annotated[str | None, arg(metavar="INT,..."), _default("none")] = None
    """Their right label; or one for each of them, in the order of the ids."""
    task: Annotated[_Int, _default("any")] = None
    """Of this task, by its number from 1."""

    @property
    def change(self) -> Change:
        from ..adapted_runs import Relabel

        if self.ids is None or self.to is None:
            raise UsageError("say what to correct: --ids 17,42 --to 3")
        ids, labels = _ids(self.ids), _numbers("--to", self.to)
        if len(set(ids)) < len(ids):
            raise UsageError("--ids: give each id once")
        return Relabel(ids, labels[0] if len(labels) == 1 else labels, self.task)


@dataclass(frozen=True, kw_only=True)
class RegulariseFlags(Shared):
    """Flags of ``lifelong adapt regularise``."""

    precision: Annotated[_Float, _default("none")] = None
    """Of the weights round 0: R = precision / 2 times the sum of their squares, in nats."""

    @property
    def change(self) -> Change:
        from ..adapted_runs import Regularise

        if self.precision is None:
            raise UsageError("say what to change: --precision 0.1")
        if not 0 <= self.precision < float("inf"):
            raise UsageError(f"--precision must be a number of at least 0, got {self.precision}")
        return Regularise(self.precision)


@dataclass(frozen=True, kw_only=True)
class TransferFlags(Shared):
    """Flags of ``lifelong adapt transfer``."""

    hidden: Annotated[str | None, arg(metavar="INT,..."), _default("as they are")] = None
    """Widths of the hidden layers; none for no hidden layer."""
    classes: Annotated[_Int, _default("as they are")] = None
    """Number of classes; the new ones come last. What is remembered says that they are \
impossible, and for DER, whose squares cannot say so, nothing of them."""
    keep: Annotated[str | None, arg(metavar="INT,..."), _default("all")] = None
    """Classes to keep, in their new order; examples of the others are given up."""

    @property
    def change(self) -> Change:
        from ..adapted_runs import Transfer

        hidden = None if self.hidden is None else self.hidden.strip()
        return Transfer(
            None if hidden is None else () if hidden == "none" else _sizes(hidden),
            self.classes,
            None if self.keep is None else _numbers("--keep", self.keep),
        )


KINDS: dict[str, type[Shared]] = {
    "add": AddFlags,
    "remove": RemoveFlags,
    "relabel": RelabelFlags,
    "regularise": RegulariseFlags,
    "transfer": TransferFlags,
}


def main(args: list[str], parse: Callable[..., Any]) -> int:
    """Run ``lifelong adapt ...``; parse: flags of a dataclass, as ``cli`` reads them."""
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(ABOUT + EXAMPLES)
        return 0 if args else 2
    kind, *rest = args
    if kind not in KINDS:
        raise UsageError(f"there is no kind {kind!r} of adaptation; " + suggestion(kind, KINDS))
    flags = parse(KINDS[kind], f"lifelong adapt {kind}", _ABOUT_KIND[kind], EXAMPLES, rest)
    for name in ("threads", "max_iterations"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 < flags.lr < float("inf"):
        raise UsageError(f"--lr must be a positive number, got {flags.lr}")

    import torch

    from .. import adapted_runs

    torch.set_num_threads(flags.threads)
    change = flags.change

    def watch(line: str) -> None:
        sys.stderr.write(line + "\n")

    summary = adapted_runs.adapt(
        flags.run,
        flags.out,
        change,
        seed=flags.seed,
        data=flags.data,
        compare=flags.compare,
        certifying=flags.certifying if isinstance(flags, RemoveFlags) else None,
        watch=None if flags.quiet else watch,
        method=flags.method,
        max_iterations=flags.max_iterations,
        lr=flags.lr,
    )
    if flags.json:
        sys.stdout.write(json.dumps({**summary, "out": str(flags.out)}, allow_nan=False) + "\n")
    else:
        _table(kind, summary, flags.out)
    return 0


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    found = _whole(text)
    if found is None:
        raise UsageError(
            f"{flag} wants whole numbers below 2**63, as in {flag} 3,5,9, got {text!r}"
        )
    return found


def _whole(text: str) -> tuple[int, ...] | None:
    """Numbers that int64 holds, divided by commas or blanks; None for anything else, or none."""
    parts = text.replace(",", " ").split()
    if not all(part.isdecimal() and len(part) < 20 for part in parts):
        return None
    found = tuple(int(part) for part in parts)
    return found if found and max(found) < 2**63 else None


def _sizes(text: str) -> tuple[int, ...]:
    sizes = _numbers("--hidden", text)
    if min(sizes) < 1:
        raise UsageError("--hidden wants widths of at least 1, or none for no hidden layer")
    return sizes


def _ids(text: str) -> tuple[int, ...]:
    if not text.startswith("@"):
        return _numbers("--ids", text)
    path = Path(text[1:])
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise UsageError(f"--ids: cannot read {path}: {why}") from None
    found = _whole(content)
    if found is None:
        raise UsageError(
            f"--ids: {path} should hold whole numbers below 2**63, divided by commas or lines"
        )
    return found


def _table(kind: str, summary: dict[str, Any], out: Path) -> None:
    """What it came to: a column for each seed."""
    from rich.console import Console
    from rich.table import Table

    from ..report.table import count_text, seconds_text

    seeds = summary["seeds"]
    table = Table(title=f"{kind}: {summary['from']}", title_justify="left", title_style="bold",
                  box=None, show_header=len(seeds) > 1)  # fmt: skip
    table.add_column()
    for result in seeds:
        table.add_column(f"seed {result['seed']}", justify="right")

    def row(name: str, values: list[str]) -> None:
        if any(values):
            table.add_row(name, *values)

    row("Accuracy before", [_percent(r["accuracy_before"]) for r in seeds])
    row("Accuracy after", [_percent(r["accuracy_after"]) for r in seeds])
    compared = [r.get("retrained") or {} for r in seeds]
    row("  trained afresh", [_percent(c.get("accuracy")) for c in compared])
    for name in ("removed", "relabelled"):
        if name in seeds[0]:
            row(f"{name.capitalize()} examples", [count_text(r[name]) for r in seeds])
            row("  accuracy before", [_percent(r[f"{name}_before"]) for r in seeds])
            row("  accuracy after", [_percent(r[f"{name}_after"]) for r in seeds])
    row("Gradients", [count_text(r["gradients"]) for r in seeds])
    row("  trained afresh", [count_text(c["gradients"]) if c else "" for c in compared])
    row("Time", [seconds_text(r["seconds"]) for r in seeds])
    row("  trained afresh", [seconds_text(c["seconds"]) if c else "" for c in compared])
    row("Fitted by", [_ended(kind, r) for r in seeds])
    console = Console()
    console.print(table, highlight=False)
    for note in dict.fromkeys(note for r in seeds for note in r["notes"]):
        console.print(f"Note: {note}", highlight=False)
    for result in seeds:
        if "certificate" in result:
            console.print(f"Certificate: {out / result['certificate']}", highlight=False)
    console.print(f"Folder: {out}", highlight=False)


def _ended(kind: str, result: dict[str, Any]) -> str:
    """A network leaves removed examples in a few chosen steps, which is no failure to converge."""
    method, steps = result["method"], result["iterations"]
    if result["converged"]:
        return method
    return (
        f"{method}, {steps} steps" if kind in ("remove", "relabel") else f"{method}, not at its end"
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"
