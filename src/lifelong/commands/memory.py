"""``lifelong memory``: look into a memory on disk, and change it.

Commands that only look open the store for reading. Results go to standard output, what is said
about them to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext, redirect_stderr
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from ..config import UsageError, suggestion
from .flags import parse

if TYPE_CHECKING:
    from rich.table import Table

    from ..store import Item, MemoryStore, Where

HELP = """\
usage: lifelong memory COMMAND STORE [OPTIONS]

Look into a memory on disk, and change it. STORE is its folder; a name that ends
in .lance, or an address such as s3://bucket/name, is kept by Lance.

look:
  ls        list items
  show      one item: label, soft label, scores; its image as a file
  history   the versions
  diff      what changed between two versions
  verify    read everything and compare it with its digests
change, in a new version:
  import    the prior and the memory of a run, into a store
  drop      take items out of today's memory; restore brings them back
  restore   make today's memory what it was at a version
and in all versions:
  forget    erase items from every version and file; final
  compact   give up old versions, and their room
and:
  export    one portable file of all items

examples:
  lifelong memory import runs/x memories/x
  lifelong memory ls memories/x --label 3 --limit 20
  lifelong memory drop memories/x --ids 3,5,9
  lifelong memory forget memories/x --ids @withdrawn.txt --run runs/x

lifelong memory COMMAND --help says more about one of them.
"""


# Flags --------------------------------------------------------------------------------------------

_ANY = arg(help_behavior_hint="(default: any)")
_NONE = arg(help_behavior_hint="(default: none)")
_Store = Annotated[Positional[str], arg(metavar="STORE")]


@dataclass(frozen=True, kw_only=True)
class Output:
    """What every command takes."""

    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""
    quiet: bool = False
    """Leave out what is said about the results; forget still asks, where --yes is missing."""
    debug: bool = False
    """Show the whole traceback of an error."""

    def check(self) -> None:
        """Raises UsageError for flags that do not go together."""


@dataclass(frozen=True, kw_only=True)
class Common(Output):
    store: _Store
    """Folder or address of the store."""


@dataclass(frozen=True, kw_only=True)
class Selecting(Common):
    """Which items: all that is given must hold."""

    ids: Annotated[str | None, arg(metavar="3,5,9|@FILE"), _ANY] = None
    """Items by number, or by the id that they were given (one of digits alone as id=17), with \
commas between; @FILE reads them from a file, one or more a line."""
    task: Annotated[int | None, arg(metavar="INT"), _ANY] = None
    """Items of this task, counted from 0 as ids are (0:17); lifelong adapt counts it from 1."""
    label: Annotated[float | None, arg(metavar="NUMBER"), _ANY] = None
    """Items with this label."""
    text: Annotated[str | None, arg(metavar="TEXT"), _ANY] = None
    """Items with this in their id, note or text."""

    def check(self) -> None:
        if self.ids is not None and self.where is not None:
            raise UsageError("give --ids, or --task, --label and --text, not both")

    @property
    def where(self) -> dict[str, Any] | None:
        """Arguments of ``Where``; None where there are none."""
        given = {"task": self.task, "label": self.label, "text": self.text}
        return {k: v for k, v in given.items() if v is not None} or None


_Version = Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the newest)")]


@dataclass(frozen=True, kw_only=True)
class Ls(Selecting):
    version: _Version = None
    """As the memory was then."""
    limit: int = 50
    """How many to show at most."""
    offset: int = 0
    """How many to leave out before."""

    def check(self) -> None:
        super().check()
        for name, least in (("limit", 1), ("offset", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Show(Common):
    item: Annotated[Positional[str], arg(metavar="ITEM")]
    """Its number, or its id (one of digits alone as id=17)."""
    version: _Version = None
    """As the memory was then."""
    image: Annotated[Path | None, arg(metavar="FILE.png"), _NONE] = None
    """Write its input there, as a PNG."""
    shape: Annotated[str | None, arg(metavar="H,W|C,H,W"), _NONE] = None
    """Of the image, where the item holds it as one long row of numbers."""


@dataclass(frozen=True, kw_only=True)
class History(Common):
    pass


@dataclass(frozen=True, kw_only=True)
class DiffFlags(Common):
    a: Annotated[Positional[int], arg(metavar="A")]
    """The version to start from."""
    b: Annotated[Positional[int], arg(metavar="B")]
    """The version to compare it with."""


@dataclass(frozen=True, kw_only=True)
class Import(Output):
    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of the run, or the learner.safetensors of one of its seeds."""
    store: _Store
    """Folder or address of the store; made where it is missing."""
    seed: Annotated[int | None, arg(metavar="INT"), _NONE] = None
    """Which seed of the run; must be said where there are several."""
    readmit: bool = False
    """Also items that were forgotten."""
    message: str = ""
    """In words, for the history."""


@dataclass(frozen=True, kw_only=True)
class Drop(Selecting):
    message: str = ""
    """In words, for the history."""


@dataclass(frozen=True, kw_only=True)
class Restore(Common):
    number: Annotated[Positional[int], arg(metavar="VERSION")]
    """The version to go back to; see lifelong memory history."""
    message: str = ""
    """In words, for the history."""


@dataclass(frozen=True, kw_only=True)
class Forget(Selecting):
    run: Annotated[UseAppendAction[tuple[Path, ...]], arg(metavar="RUN")] = ()
    """Folder of a run whose checkpoints hold the items too; say it again for the next one."""
    yes: bool = False
    """Do not ask."""
    message: str = ""
    """In words, for the history; name nobody here who wants to be forgotten."""


@dataclass(frozen=True, kw_only=True)
class Verify(Common):
    pass


@dataclass(frozen=True, kw_only=True)
class Compact(Common):
    keep: int = 1
    """How many of the newest versions stay, beside the one that compact makes."""

    def check(self) -> None:
        if self.keep < 1:
            raise UsageError(f"--keep must be at least 1, got {self.keep}")


@dataclass(frozen=True, kw_only=True)
class Export(Common):
    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """Where to: a name that ends in .safetensors or .parquet."""
    version: _Version = None
    """As the memory was then."""


@dataclass(frozen=True)
class Command:
    """flags: as parsed; work: does it, returns the exit code; about: above the help."""

    flags: type[Any]
    work: Callable[[Any], int]
    about: str
    examples: tuple[str, ...]


def memory(args: list[str]) -> int:
    """``lifelong memory ARGS``; the exit code."""
    if not args or args[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0 if args else 2
    name, *rest = args
    if name not in COMMANDS:
        raise UsageError(f"there is no command {name!r}; {suggestion(name, COMMANDS)}")
    command = COMMANDS[name]
    examples = "\nexamples:\n" + "".join(f"  lifelong memory {e}\n" for e in command.examples)
    prog = f"lifelong memory {name}"
    flags = parse(command.flags, prog, command.about, examples, rest)
    flags.check()
    asks = isinstance(flags, Forget) and not flags.yes
    try:
        with redirect_stderr(StringIO()) if flags.quiet and not asks else nullcontext():
            return command.work(flags)  # results go to standard output, remarks to the other
    except (ValueError, OSError) as error:
        said = str(error)
        for call, command_ in _SAYS.items():
            said = said.replace(call, command_)
        if said == str(error):
            raise
        raise type(error)(said) from error


_SAYS = {  # what the library says to a program -> to a person at a terminal
    "store.items() lists them, and store.forgotten(id) tells whether one was forgotten": (
        "lifelong memory ls lists them"
    ),
    "store.history()": "lifelong memory history",
    "store.items()": "lifelong memory ls",
    "store.verify()": "lifelong memory verify",
    "call lifelong": "run lifelong",
    "open_store(path) makes one": "lifelong memory import RUN STORE makes one",
    "pass readmit=True": "say --readmit",
}


# Look ---------------------------------------------------------------------------------------------


def _ls(flags: Ls) -> int:
    with _reading(flags.store) as store:
        if flags.ids is None:
            where = _where(flags)
            total = store.count(where, version=flags.version)
            wanted = flags.offset + flags.limit
            items = list(_pages(store, where, flags.version, wanted))[flags.offset :]
        else:
            found = _named(store, _keys(flags.ids), flags.version)
            total, items = len(found), found[flags.offset : flags.offset + flags.limit]
        version = store.version if flags.version is None else flags.version
    if flags.json:
        return _json({"version": version, "total": total, "items": [_plainly(i) for i in items]})
    if not total:
        selected = flags.ids is not None or flags.where is not None
        _say("no item is like that" if selected else f"version {version} holds no items")
        return 0
    _print(_listing(items, f"{_items(total)} in version {version} of {flags.store}"))
    shown = flags.offset + len(items)
    if shown < total:
        _say(f"{_items(total - shown)} more: --offset {shown}, or --limit {total}")
    elif not items:
        _say(f"there are {_items(total)}, and --offset {flags.offset} leaves out all of them")
    return 0


def _listing(items: list[Item], title: str) -> Table:
    from ..report.table import bytes_text

    scores = list(dict.fromkeys(name for item in items for name in item.scores))
    table = _table(title, "item", "id", "task", "label", "input", "soft", "hard", *scores, "since")
    noted = any(item.note for item in items)
    if noted:
        table.add_column("note", overflow="fold")
    for item in items:
        of = f"{_input_text(item)}, {bytes_text(item.num_bytes)}"
        weights = (f"{item.soft_weight:g}", f"{item.hard_weight:g}")
        each = [f"{item.scores[s]:.4g}" if s in item.scores else "" for s in scores]
        row = [str(item.item), item.id, str(item.task), _label_text(item.label), of, *weights]
        row += [*each, str(item.since), *([item.note] if noted else [])]
        table.add_row(*map(_plain, row))
    return table


def _show(flags: Show) -> int:
    with _reading(flags.store) as store:
        found = _named(store, [_key(flags.item)], flags.version)
        if len(found) > 1:
            numbers = ", ".join(str(item.item) for item in found)
            raise UsageError(f"{len(found)} items are called {flags.item}: say {numbers}")
        (item,) = found
        outputs, beliefs = _beliefs(store, item, flags.version)
        if flags.image is not None:
            raw = store.raw(item.item)
            _write_png(flags.image, raw, item, flags.shape)
        words = store.raw(item.item) if item.kind == "text" else None
        when = next((v.time for v in store.history() if v.number == item.since), None)
    if flags.json:
        found_item = _plainly(item) | {"memorised": when, "outputs": outputs, "soft_label": beliefs}
        return _json(found_item | ({} if words is None else {"input": words}))
    from ..report.table import bytes_text

    table = _table(f"item {item.item} of {flags.store}", "", "")
    table.show_header = False
    soft, hard = f"{item.soft_weight:g}", f"{item.hard_weight:g}"
    rows = {
        "Id": item.id,
        "Task": f"{item.task}, example {item.origin} there",
        "Label": _label_text(item.label),
        "Input": f"{_input_text(item)}, {bytes_text(item.num_bytes)}",
        "Stands for": f"{soft} by its soft label, {hard} by its label (past examples)",
        "Scores": ", ".join(f"{name} {value:.4g}" for name, value in item.scores.items()),
        "Memorised": f"version {item.since}" + (f", {_time_text(when)}" if when else ""),
        "Note": item.note,
        "Text": words or "",
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, _plain(value))
    _print(table)
    _print(_bars(item, outputs, beliefs))
    if flags.image is not None:
        _say(f"its image is in {flags.image}")
    return 0


def _plainly(item: Item) -> dict[str, Any]:
    return {name: value for name, value in asdict(item).items() if name != "layout"}


def _beliefs(
    store: MemoryStore, item: Item, version: int | None
) -> tuple[list[float], list[float] | None]:
    """f*, and E[y | f*] by the likelihood of the prior that was saved with it; None without one."""
    remembered = store.memory([item.item], version=version, decode=lambda raw: _no_inputs(len(raw)))
    outputs = remembered.outputs
    try:
        likelihood = store.load_prior(version).likelihood
    except ValueError:  # there is none, or it is damaged: ``verify`` tells
        return outputs[0].tolist(), None
    mean = likelihood.mean(likelihood.mask(outputs, remembered.mask))
    return outputs[0].tolist(), mean[0].tolist()


def _no_inputs(n: int) -> Any:
    import torch

    return torch.zeros(n, 0)


def _bars(item: Item, outputs: list[float], beliefs: list[float] | None) -> Table:
    title = "What the model believed: outputs" if beliefs is None else "What the model believed"
    table = _table(title, "class" if len(outputs) > 1 else "output", "outputs")
    if beliefs is not None:
        table.add_column("soft label", justify="right")
        table.add_column("")
    bars = beliefs is not None and all(0 <= p <= 1 for p in beliefs)
    for c, f in enumerate(outputs):
        if item.head is not None and c not in item.head:
            continue
        row = [f"{c}{' *' if c == item.label and len(outputs) > 1 else ''}", f"{f:.3f}"]
        if beliefs is not None:
            row += [f"{beliefs[c]:.3f}", "█" * round(24 * beliefs[c]) if bars else ""]
        table.add_row(*row)
    if len(outputs) > 1 and isinstance(item.label, int):
        table.caption = "* its label"
        table.caption_justify = "left"
    return table


def _write_png(path: Path, raw: Any, item: Item, shape: str | None) -> None:
    """Raises UsageError where the input is no image."""
    import io

    from PIL import Image

    from ..checkpoint import write

    if path.suffix.lower() != ".png":
        raise UsageError(f"--image writes a PNG: name it {path.with_suffix('.png').name}")
    if path.exists() and not (path.is_file() and path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"):
        raise UsageError(
            f"--image {path} is there, and is no PNG, which may be replaced; choose another name, "
            "or remove it"
        )
    if item.kind == "image":
        picture = Image.open(io.BytesIO(raw))
        if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
            picture = picture.convert("RGB")  # such as CMYK, which a PNG cannot hold
    elif item.kind == "tensor":
        picture = Image.fromarray(_pixels(raw, item, shape))
    else:
        raise UsageError(f"item {item.item} is {_input_text(item)}: it has no image")
    out = io.BytesIO()
    picture.save(out, "PNG")
    write(path, out.getvalue())


def _pixels(x: Any, item: Item, shape: str | None) -> Any:
    """(H, W) or (H, W, 3) uint8; other numbers than bytes are stretched from least to largest."""
    if shape is not None:
        try:
            sizes = tuple(int(s) for s in shape.split(","))
            x = x.reshape(sizes)
        except (ValueError, RuntimeError):
            raise UsageError(
                f"--shape {shape} does not hold the {x.numel()} numbers of item {item.item}"
            ) from None
    if x.ndim == 2:
        x = x[None]
    if x.ndim != 3 or x.shape[0] not in (1, 3) or not x.numel():
        raise UsageError(
            f"item {item.item} is {_input_text(item)}, not an image: say --shape H,W or C,H,W if "
            "its numbers are one"
        )
    if x.dtype.is_floating_point or x.dtype.itemsize > 1:
        x = x.double()
        low, high = x.min(), x.max()
        x = (255 * (x - low) / (high - low).clamp(min=1e-300)).round().byte()
    x = x.byte().permute(1, 2, 0).contiguous().numpy()
    return x[:, :, 0] if x.shape[2] == 1 else x


def _history(flags: History) -> int:
    with _reading(flags.store) as store:
        versions = store.history()
    if flags.json:
        return _json({"versions": [asdict(v) for v in versions]})
    if not versions:
        _say(f"{flags.store} is empty: nothing was committed yet")
        return 0
    table = _table(
        f"Versions of {flags.store}", "version", "when", "what", "came", "went", "items", "prior"
    )
    table.add_column("message", overflow="fold")
    for v in versions:
        came, went = (str(n) if n else "" for n in (v.added, v.dropped))
        row = [str(v.number), _time_text(v.time), v.kind, came, went, str(v.size)]
        prior = "saved" if v.prior else "as before" if v.in_force else ""
        table.add_row(*map(_plain, [*row, prior, v.message]))
    _print(table)
    return 0


def _diff(flags: DiffFlags) -> int:
    with _reading(flags.store) as store:
        diff = store.diff(flags.a, flags.b)
    if flags.json:
        return _json(asdict(diff))
    parts = {"came": diff.added, "went": diff.dropped, "other beliefs": diff.changed}
    if not any(parts.values()):
        _say(f"versions {diff.a} and {diff.b} hold the same items, with the same beliefs")
        return 0
    table = _table(f"From version {diff.a} to {diff.b}", "", "items", "numbers")
    for name, numbers in parts.items():
        table.add_row(name, str(len(numbers)), _numbers(numbers))
    _print(table)
    return 0


def _verify(flags: Verify) -> int:
    with _reading(flags.store) as store:
        report = store.verify()
    if flags.json:
        _json({**asdict(report), "ok": report.ok})
    else:
        for finding in report.findings:
            kind = "damage" if finding.damage else "note"
            sys.stdout.write(f"{kind}: {finding.place}: {finding.problem}\n")
        read = f"{_items(report.items)} and {_many(report.files, 'file')} read"
        verdict = "all as they were written" if report.ok else "the store is damaged"
        sys.stdout.write(f"version {report.version}: {read}; {verdict}\n")
    return 0 if report.ok else 1


def _export(flags: Export) -> int:
    with _reading(flags.store) as store:
        size = store.count(version=flags.version)
        path = store.export(flags.file, version=flags.version)
    if flags.json:
        return _json({"file": str(path), "items": size})
    sys.stdout.write(f"{_items(size)} in {path}\n")
    return 0


# Change -------------------------------------------------------------------------------------------


def _import(flags: Import) -> int:
    from ..run_memory import import_prior, learner_file

    path = learner_file(flags.run, flags.seed)
    _require_no_other(flags.store)
    message = flags.message or f"imported from {flags.run}"
    version, size = import_prior(path, flags.store, message=message, readmit=flags.readmit)
    if flags.json:
        return _json({"version": version, "items": size, "from": str(path)})
    if not size:
        _say("this method keeps no examples: the store holds the prior alone")
    sys.stdout.write(f"{_items(size)} from {path} in version {version} of {flags.store}\n")
    return 0


def _drop(flags: Drop) -> int:
    which = _which(flags, "drop")
    _require_store(flags.store)
    with _opened(flags.store, "a") as store:
        before, old = len(store), store.version
        version = store.drop(which, message=flags.message)
        dropped = before - len(store)
    if flags.json:
        return _json({"version": version, "dropped": dropped})
    sys.stdout.write(f"{_items(dropped)} dropped in version {version}\n")
    _say(
        f"undo it with: lifelong memory restore {_shell(flags.store)} {old}; older versions still "
        "hold what was dropped: to erase it, lifelong memory forget"
    )
    return 0


def _restore(flags: Restore) -> int:
    _require_store(flags.store)
    with _opened(flags.store, "a") as store:
        version = store.restore(flags.number, message=flags.message)
        size = len(store)
    if flags.json:
        return _json({"version": version, "items": size})
    sys.stdout.write(f"version {version} is as version {flags.number} was: {_items(size)}\n")
    return 0


FINAL = """\
forget erases {what} from every version, soft labels, thumbnails and priors of the store
{also}. It cannot be undone.
What it does not reach: exports, backups and copies made elsewhere; other runs and reports;
files of runs that are no checkpoints, such as logs and certificates, which may name an item
(they are listed afterwards); weights that were trained on the items (Prior.forget takes their
influence out of a prior); and blocks that the disk or an object store keeps until they are
overwritten or expire.
"""
GOING_ON = "No run may be going on in {runs}: a checkpoint that is being written would be lost.\n"


def _forget(flags: Forget) -> int:
    from ..runs import LOCK, claimed

    for run in flags.run:
        if not run.is_dir():
            raise UsageError(f"--run {run}: there is no such folder")
    with ExitStack() as held:
        for run in dict.fromkeys(path.resolve() for path in flags.run):
            if (run / LOCK).exists():  # of lifelong run; other folders have none
                going = f"a run goes on in {run}: let it end, or stop it, then forget"
                held.enter_context(claimed(run, going))
        return _forgotten(flags)


def _forgotten(flags: Forget) -> int:
    which = _which(flags, "forget")
    with _reading(flags.store) as store:
        what = _what(store, flags, which)
    runs = ", ".join(str(run) for run in flags.run)
    also = f"and from the checkpoints of {runs}" if runs else "(of runs, name them with --run)"
    sys.stderr.write(FINAL.format(what=what, also=also))
    if runs:
        sys.stderr.write(GOING_ON.format(runs=runs))
    if not flags.yes and not _agreed():
        _say("nothing was forgotten")
        return 1
    with _opened(flags.store, "a") as store:
        done = store.forget(which, runs=flags.run, message=flags.message)
    if flags.json:
        return _json(asdict(done))
    files, priors = _many(len(done.files), "file"), _many(done.priors, "older prior")
    sys.stdout.write(
        f"{_items(done.items)} erased: {files} rewritten or removed, {priors} removed; now version "
        f"{done.version}\n"
    )
    for file in done.files:
        sys.stdout.write(f"  {file}\n")
    if done.influenced:
        _say(
            "today's prior was made with some of them: take their influence out with Prior.forget, "
            "and save the new prior"
        )
    for file in done.foreign:
        _say(f"{file} was not looked into: remove it if it holds or names an item")
    return 0


def _what(store: MemoryStore, flags: Forget, which: Any) -> str:
    """In words, what is about to go: "3 items (1, 2, 5)". ValueError where there is nothing."""
    found = store.find(which)
    said = _numbers(found if flags.ids is None else which)
    if flags.task is not None:
        said = f"of task {flags.task}, which lifelong adapt counts as {flags.task + 1}: {said}"
    return f"{_items(len(found))} ({said})"


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise UsageError("forget is final, and there is nobody to ask: say --yes")
    sys.stderr.write("Type 'forget' to go on: ")
    sys.stderr.flush()
    return sys.stdin.readline().strip() == "forget"


def _compact(flags: Compact) -> int:
    _require_store(flags.store)
    with _opened(flags.store, "a") as store:
        before, old = store.num_bytes, len(store.history())
        version = store.compact(keep=flags.keep)
        after, left = store.num_bytes, len(store.history())
    if flags.json:
        return _json({"version": version, "bytes_before": before, "bytes_after": after})
    from ..report.table import bytes_text

    sys.stdout.write(
        f"{_many(old, 'version')} before, {left} now; {bytes_text(before)} before, "
        f"{bytes_text(after)} now\n"
    )
    return 0


# Stores and items ---------------------------------------------------------------------------------


def _opened(path: str, mode: Any) -> MemoryStore:
    from ..store import open_store

    return open_store(path, mode)


def _reading(path: str) -> MemoryStore:
    _require_store(path)
    return _opened(path, "r")


def _require_store(path: str) -> None:
    """Raises UsageError for what is seen at a glance to be no store, with what to do."""
    if "://" in path:
        return
    folder = Path(path)
    if not folder.exists():
        raise UsageError(
            f"there is no store in {path}; lifelong memory import RUN {path} makes one"
        )
    _require_no_other(path)
    if not any(folder.iterdir()):
        raise UsageError(
            f"{path} is empty, not a store; lifelong memory import RUN {path} fills it"
        )


def _require_no_other(path: str) -> None:
    """Raises UsageError for a file, and for the folder of a run."""
    folder = Path(path)
    if "://" in path:
        return
    if folder.is_file():
        raise UsageError(f"{path} is a file; a store is a folder")
    marks = ("config.toml", "learner.safetensors")
    if any((folder / name).is_file() for name in marks) or any(folder.glob("seed-*")):
        raise UsageError(
            f"{path} is a run, not a store; make one of it, in a folder of its own: "
            f"lifelong memory import {_shell(path)} STORE"
        )


def _where(flags: Selecting) -> Where | None:
    from ..store import Where

    return None if flags.where is None else Where(**flags.where)


def _which(flags: Selecting, verb: str) -> Any:
    """Raises UsageError where nothing says which items."""
    if flags.ids is not None:
        return _keys(flags.ids)
    where = _where(flags)
    if where is None:
        raise UsageError(f"say which items to {verb}: --ids, or --task, --label and --text")
    return where


def _keys(text: str) -> list[int | str]:
    """Numbers and ids of "3,5,9" or of "@file". Raises UsageError for none, and for no file."""
    source = text
    if text.startswith("@"):
        path = Path(text[1:])
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise UsageError(f"--ids {source}: cannot read {path}: {reason}") from None
    keys = [part.strip() for part in text.replace("\n", ",").split(",") if part.strip()]
    if not keys:
        raise UsageError(f"--ids {source}: there are no ids; write them as in --ids 3,5,9")
    return list(dict.fromkeys(_key(key) for key in keys))


def _key(text: str) -> int | str:
    if text.startswith("id="):
        return text[3:]
    return int(text) if text.isascii() and text.isdigit() else text


def _named(store: MemoryStore, keys: list[int | str], version: int | None) -> list[Item]:
    """The items of those numbers and ids. Raises UsageError, naming what is not there."""
    from ..store import Where

    found: list[Item] = []
    missing = []
    for key in keys:
        if isinstance(key, int):
            page = store.items(version=version, after=key - 1, limit=1)
            mine = [item for item in page if item.item == key]
        else:
            mine = [i for i in _pages(store, Where(text=key), version) if i.id == key]
        missing += [] if mine else [key]
        found += mine
    if missing:
        place = "today's memory" if version is None else f"version {version}"
        gone = [k for k in missing if isinstance(k, str) and store.forgotten(k) is not None]
        hint = f"; forgotten: {_numbers(gone)}" if gone else "; lifelong memory ls shows what is"
        raise UsageError(f"not in {place}: {_numbers(missing)}{hint}")
    return found


def _pages(
    store: MemoryStore, where: Where | None, version: int | None, most: int | None = None
) -> Iterator[Item]:
    after, left = 0, most
    while left is None or left > 0:
        size = 1000 if left is None else min(1000, left)
        page = store.items(where, version=version, after=after, limit=size)
        yield from page
        if len(page) < size:
            return
        after = page[-1].item
        left = None if left is None else left - len(page)


# Text ---------------------------------------------------------------------------------------------


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, box=None)
    words = ("", "id", "input", "what", "when", "prior", "numbers", "class")
    for column in columns:
        whole = column == "when"
        table.add_column(column, justify="left" if column in words else "right", no_wrap=whole)
    return table


def _plain(text: str) -> Any:
    """As it is: an id with brackets is no markup, and one with escapes moves no cursor."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() else "�" for c in text))


def _print(table: Table) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print(Text(str(table.title), "bold"))  # within the table it would wrap at its width
    table.title = None
    console.print(table, highlight=False)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _json(content: dict[str, Any]) -> int:
    sys.stdout.write(json.dumps(content) + "\n")
    return 0


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _items(count: int) -> str:
    return _many(count, "item")


def _numbers(numbers: Any) -> str:
    """ "3, 5, 9 and 12 more"."""
    numbers = list(numbers)
    listed = ", ".join(str(n) for n in numbers[:20])
    return listed + (f" and {len(numbers) - 20} more" if len(numbers) > 20 else "")


def _label_text(label: Any) -> str:
    if isinstance(label, list | tuple):
        few = ", ".join(_label_text(value) for value in label[:4])
        return f"{few}{', ...' if len(label) > 4 else ''}"
    return f"{label:g}" if isinstance(label, float) else str(label)


def _input_text(item: Item) -> str:
    kind = {"dict": "several tensors", "image": "encoded image"}.get(item.kind, item.kind)
    return kind + (f" {' × '.join(map(str, item.shape))}" if item.shape else "")


def _time_text(time: str) -> str:
    """To the second; UTC, as the store keeps it."""
    return time[:19].replace("T", " ") + " UTC"


def _shell(path: str) -> str:
    import shlex

    return shlex.quote(path)


COMMANDS: dict[str, Command] = {
    "ls": Command(
        Ls,
        _ls,
        "List the items of a memory on disk, in the order in which they came.",
        ("ls memories/x", "ls memories/x --task 2 --label 3", "ls memories/x --version 1 --json"),
    ),
    "show": Command(
        Show,
        _show,
        "Show one item: label, soft label, scores, task, and when it was memorised.",
        ("show memories/x 17", "show memories/x 0:4711 --image digit.png --shape 28,28"),
    ),
    "history": Command(
        History, _history, "List the versions that are kept, oldest first.", ("history memories/x",)
    ),
    "diff": Command(
        DiffFlags, _diff, "What changed from version A to version B.", ("diff memories/x 3 5",)
    ),
    "verify": Command(
        Verify,
        _verify,
        "Read everything and compare it with its digests. Exit code 1 where something is\ndamaged.",
        ("verify memories/x",),
    ),
    "export": Command(
        Export,
        _export,
        "Write all items into one portable file.",
        ("export memories/x items.safetensors", "export memories/x items.parquet --version 3"),
    ),
    "import": Command(
        Import,
        _import,
        "Put the prior and the memory of a run into a store, which is made where it is\nmissing. "
        "The memory becomes today's memory there.",
        ("import runs/x memories/x", "import runs/x memories/x --seed 2"),
    ),
    "drop": Command(
        Drop,
        _drop,
        "Take items out of today's memory. Older versions keep them, and restore brings\n"
        "them back; "
        "to erase them, use forget.",
        ("drop memories/x --ids 3,5,9", "drop memories/x --task 0 --label 3"),
    ),
    "restore": Command(
        Restore,
        _restore,
        "Make today's memory, and prior, what they were at a version. That is a new\nversion: "
        "nothing is lost. What was forgotten does not come back.",
        ("restore memories/x 3",),
    ),
    "forget": Command(
        Forget,
        _forget,
        "Erase items from every version and every file of a store, at once. This is\nfinal: "
        "nothing brings them back. It asks first; --yes does not.\n\n"
        "It does not reach exports, backups and copies elsewhere, nor what weights have\nlearned: "
        "see Prior.forget for that.",
        ("forget memories/x --ids 3,5,9", "forget memories/x --ids @withdrawn.txt --run runs/x"),
    ),
    "compact": Command(
        Compact,
        _compact,
        "Give up old versions, and the room that they and erased items took. That is a\nversion of "
        "its own, so --keep 1 leaves two.",
        ("compact memories/x", "compact memories/x --keep 5"),
    ),
}
