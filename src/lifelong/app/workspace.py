"""What the page works on: a store, and the run whose memory lies in it.

    RUN         the run, which stays as it is until one of its examples is forgotten
    RUN.ui/     made beside it: memory/ (the store), 1-0/, 2-0/, ... (adapted runs), and journals

Of a store alone there is no network: its items can be looked at, dropped and forgotten, and no
accuracy changes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import write
from ..config import UsageError
from ..errors import StoreError
from ..run_memory import import_prior, is_run, learner_file
from ..store import MemoryStore, open_store

_STATE = "state.json"


@dataclass(frozen=True)
class Step:
    """One change that the page made. version: of the store after it; run: the one in force then."""

    what: str
    version: int
    run: str | None


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

    @property
    def steps(self) -> list[Step]:
        try:
            content = json.loads((self.place / _STATE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        return [Step(**step) for step in content["steps"]]

    @property
    def current(self) -> Path | None:
        """The run in force: the newest adapted one, or that which the page was opened with."""
        steps = self.steps
        run = steps[-1].run if steps else None
        return self.run if run is None else Path(run)

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
        steps = [asdict(s) for s in (*self.steps, step)]
        self.place.mkdir(parents=True, exist_ok=True)
        write(self.place / _STATE, json.dumps({"steps": steps}, indent=1) + "\n")

    def runs(self) -> list[Path]:
        """The run and all that were adapted from it here, oldest first."""
        if self.run is None:
            return []
        known = dict.fromkeys(Path(s.run) for s in self.steps if s.run is not None)
        return [self.run, *(path for path in known if path != self.run and path.is_dir())]


def workspace(path: Path | str, seed: int | None = None) -> Workspace:
    """Of a run's folder, a store's folder, or a store's address; the run's memory is brought into
    its store once. A run that has learned nothing yet has no store.

    Raises UsageError for anything else.
    """
    text = str(path)
    if "://" in text:
        return Workspace(Path.cwd() / ".lifelong-ui", text, None)
    folder = Path(path).absolute()
    if not folder.is_dir():
        raise UsageError(
            f"there is no run and no store in {path}; lifelong run --out {path} makes a run"
        )
    if is_run(folder):
        place = folder.with_name(folder.name + ".ui")
        found = Workspace(place, str(place / "memory"), folder, seed)
        refresh(found)
        return found
    try:
        with open_store(text, "r"):
            pass
    except (StoreError, ValueError, OSError) as error:
        raise UsageError(f"{path} is neither a run nor a store: {error}") from error
    return Workspace(folder.with_name(folder.name + ".ui"), str(folder), None)


def refresh(found: Workspace) -> None:
    """Bring a run's memory into its store, where that has not been done since it last changed."""
    if found.run is None or found.steps:
        return
    try:
        path = learner_file(found.run, found.seed)
    except UsageError:
        if any(found.run.glob("seed-*/learner.safetensors")):
            raise  # several seeds: which one must be said
        return
    mark = found.place / "imported.json"
    stamp = {"file": str(path), "time": path.stat().st_mtime_ns}
    if mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) == stamp:
        return
    found.place.mkdir(parents=True, exist_ok=True)
    import_prior(path, found.store, message=f"imported from {found.run.name}")
    write(mark, json.dumps(stamp) + "\n")
