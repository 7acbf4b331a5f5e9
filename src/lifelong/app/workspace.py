"""What the page works on: a store, and the run whose memory lies in it.

    RUN              the run, which stays as it is until one of its examples is forgotten
    RUN.ui/seed-0/   made beside it: memory/ (the store), 1-0/, 2-0/, ... (adapted runs), journals
    .lifelong-ui/    in the folder at hand: journals of stores that have an address, by its digest

Of a store alone there is no network: its items can be looked at, dropped and forgotten, and no
accuracy changes. Paths in the page's own files are relative, so that both folders can be moved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import write
from ..config import UsageError
from ..errors import StoreError
from ..learner import CHECKPOINT
from ..run_memory import is_run, learner_file, prior_in, without
from ..runs import CONFIG, LOG, load_config
from ..store import MemoryStore, open_store

_STATE = "state.json"


@dataclass(frozen=True)
class Step:
    """One change that the page made, or the import before the first. version: of the store after
    it; run: the folder, within the page's own, of the run in force then; None for the run itself;
    left_out: (task, origin) of what that run remembers and the version does not: it was dropped."""

    what: str
    version: int
    run: str | None
    left_out: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Step:
        places = tuple((task, origin) for task, origin in content.get("left_out", ()))
        return cls(**{**content, "left_out": places})


@dataclass(frozen=True)
class Workspace:
    """place: the folder with the page's own files; store: a folder or an address; run: that the
    page was opened with, None for a store alone; seed: which of the run's."""

    place: Path
    store: str
    run: Path | None
    seed: int | None = None

    @property
    def name(self) -> str:
        return Path(self.store).name if self.run is None else self.run.name

    def open(self, mode: Any = "r") -> MemoryStore:
        return open_store(self.store, mode)

    @property
    def has_store(self) -> bool:
        return "://" in self.store or Path(self.store).is_dir()

    # ------------------------------------------------------------ what was changed by the page

    def _state(self) -> dict[str, Any]:
        try:
            return json.loads((self.place / _STATE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}

    def _keep(self, **changes: Any) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        write(self.place / _STATE, json.dumps({**self._state(), **changes}, indent=1) + "\n")

    @property
    def steps(self) -> list[Step]:
        return [Step.of(step) for step in self._state().get("steps", [])]

    def at(self, version: int | None = None) -> Step | None:
        """The change, or the import, whose run was in force at a version, by default now."""
        steps = [s for s in self.steps if version is None or s.version <= version]
        if steps:
            return steps[-1]
        imported = self._state().get("imported")
        return None if imported is None else Step.of(imported["step"])

    def dropped(self, store: MemoryStore, since: Step | None) -> tuple[tuple[int, int], ...]:
        """(task, origin) of what the run in force since then remembers, and today's memory not.

        Of versions that ``compact`` gave up only what the oldest that is kept still held.
        """
        if since is None:
            return ()
        first = max(since.version, store.history()[0].number)
        if not since.left_out and not store.diff(first, store.version).dropped:
            return ()
        held = _places(store, first).union(since.left_out)
        return tuple(sorted(held - _places(store, store.version)))

    @property
    def current(self) -> Path | None:
        """The run in force: the newest adapted one, or that which the page was opened with."""
        step = self.at()
        return self.run if step is None or step.run is None else self.place / step.run

    @property
    def since(self) -> int:
        """The version before which networks had learned what has been forgotten; 0 for none."""
        forgot = [s.version for s in self.steps if s.what.startswith("forget")]
        return max(forgot, default=0)

    def called(self, run: Path) -> str:
        """A run's name for people: "x", "x, change 2"."""
        made_here = run.parent == self.place
        return f"{self.name}, change {run.name.partition('-')[0]}" if made_here else run.name

    def record(self, step: Step) -> None:
        """A change is done: its run is in force from now on."""
        self._keep(steps=[asdict(s) for s in (*self.steps, step)])

    def runs(self) -> list[Path]:
        """The run and all that were adapted from it here, oldest first."""
        if self.run is None:
            return []
        known = dict.fromkeys(self.place / s.run for s in self.steps if s.run is not None)
        return [self.run, *(path for path in known if path.is_dir())]

    def save(self, path: Path, message: str) -> tuple[int, tuple[tuple[int, int], ...]]:
        """Make a learner's prior and memory today's, but for what was dropped, which is as the
        user wants it: (the new version, what was left out)."""
        prior = prior_in(path)
        with self.open("a") as store:
            left_out = self.dropped(store, self.at())
            if left_out:
                message += f", without {len(left_out)} dropped before"
            return store.save_prior(without(prior, left_out), message=message), left_out

    def other_seeds(self) -> list[int]:
        """Those of the same run whose memory the page has shown."""
        if self.seed is None:
            return []
        found = self.place.parent.glob("seed-*/memory")
        numbers = [path.parent.name.removeprefix("seed-") for path in found]
        return sorted({int(n) for n in numbers if n.isdecimal()} - {self.seed})

    # ------------------------------------------------------------ whose files these are

    def tie(self) -> None:
        """Write down which run and store the page's files are of.

        Raises UsageError where they are of others that lay at the same place before: the numbers
        in their journals mean other items here.
        """
        now = {} if self.run is None else {"run": _identity(self.run)}
        if self.has_store:
            with self.open() as store:
                now["store"] = store.identity
        kept = self._state().get("of", {})
        for what, known in kept.items():
            if now.get(what, known) != known:
                raise UsageError(
                    f"{self.place} has what the page keeps of another {what}, which lay at the "
                    "same place before: remove that folder, or move it away, and open this one "
                    "again"
                )
        if {**kept, **now} != kept:
            self._keep(of={**kept, **now})


def _places(store: MemoryStore, version: int) -> set[tuple[int, int]]:
    """(task, origin) of a version's items."""
    found: set[tuple[int, int]] = set()
    after = 0
    while page := store.items(version=version, after=after):
        found.update((item.task, item.origin) for item in page)
        after = page[-1].item
    return found


def _identity(run: Path) -> str:
    """A digest of its settings and of when it was begun: a run that is made anew has another."""
    found = hashlib.sha256()
    for name in (CONFIG, LOG):
        if (run / name).is_file():
            text = (run / name).read_bytes()
            found.update(text if name == CONFIG else text.partition(b"\n")[0])
    return found.hexdigest()


def workspace(path: Path | str, seed: int | None = None) -> Workspace:
    """Of a run's folder, a store's folder, or a store's address; the run's memory is brought into
    its store once. A run that has learned nothing yet has no store.

    seed: of a run; by default the only one that has learned, or that will learn first.
    Raises UsageError for anything else, and as ``Workspace.tie``.
    """
    text = str(path)
    if "://" in text:
        name = hashlib.sha256(text.rstrip("/").encode()).hexdigest()[:16]
        return Workspace(Path.cwd() / ".lifelong-ui" / name, text, None)
    folder = Path(path).absolute()
    if not folder.is_dir():
        raise UsageError(
            f"there is no run and no store in {path}; lifelong run --out {path} makes a run"
        )
    if is_run(folder):
        seed = _seed(folder, seed)
        place = folder.with_name(folder.name + ".ui")
        place = place if seed is None else place / f"seed-{seed}"
        found = Workspace(place, str(place / "memory"), folder, seed)
        refresh(found)
        return found
    try:
        with open_store(text, "r"):
            pass
    except (StoreError, ValueError, OSError) as error:
        raise UsageError(f"{path} is neither a run nor a store: {error}") from error
    return Workspace(folder.with_name(folder.name + ".ui"), str(folder), None)


def _seed(run: Path, seed: int | None) -> int | None:
    """None for a learner that is not of a seed. Raises UsageError where it must be said."""
    if seed is not None:
        return seed
    if not any(run.glob(f"seed-*/{CHECKPOINT}")) and (run / CONFIG).is_file():
        return load_config(run, adapted=True).seed_list[0]
    try:
        number = learner_file(run).parent.name.removeprefix("seed-")
    except UsageError:
        if any(run.glob(f"seed-*/{CHECKPOINT}")):
            raise  # several: which one must be said
        return None
    return int(number) if number.isdecimal() else None


def refresh(found: Workspace) -> None:
    """Bring a run's memory into its store, where that has not been done since it last changed.
    Raises as ``Workspace.tie``."""
    if found.run is None:
        return
    found.tie()
    if found.steps:
        return
    try:
        path = learner_file(found.run, found.seed)
    except UsageError:
        if any(found.run.glob(f"seed-*/{CHECKPOINT}")):
            raise  # there are others
        return
    stamp = {"file": path.relative_to(found.run).as_posix(), "time": path.stat().st_mtime_ns}
    before = found._state().get("imported", {})
    if {name: before.get(name) for name in stamp} == stamp:
        return
    found.place.mkdir(parents=True, exist_ok=True)
    version, left_out = found.save(path, f"imported from {found.run.name}")
    found._keep(imported={**stamp, "step": asdict(Step("import", version, None, left_out))})
    found.tie()
