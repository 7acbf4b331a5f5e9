"""Changes that take a while, one at a time, written down before they start.

The journal (jobs.json) says what was asked and how far it came. Each part of a job either is done
as a whole or not at all, and knows whether it is done, so a job whose server was killed goes on
where it was. Whoever asks says which version of the store was seen: if another tab has changed it
since, nothing is done and the asker is told.
"""

from __future__ import annotations

import json
import shutil
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from queue import Queue
from typing import Any, Literal

from ..adapted_runs import Add, Certifying, Change, Regularise, Relabel, Remove, adapt
from ..checkpoint import write
from ..run_memory import learner_file
from ..runs import LOCK, claimed, is_going_on
from . import measures
from .workspace import Step, Workspace

State = Literal["waiting", "running", "done", "failed"]
JOURNAL = "jobs.json"
UPLOAD = "upload-"  # how the files begin that a job is to learn from


class ChangedMeanwhileError(ValueError):
    """The store is not as the asker saw it."""


@dataclass(frozen=True)
class Job:
    """kind: one of ``KINDS``; given: what was asked; done: of parts, how many; said: lines about
    it; result: accuracies before and after, certificates."""

    number: int
    kind: str
    given: dict[str, Any]
    state: State = "waiting"
    done: int = 0
    parts: int = 1
    said: tuple[str, ...] = ()
    result: dict[str, Any] | None = None
    started: str = ""

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed")


class Jobs:
    """The journal, and a thread that does what it says. No other process has it meanwhile.

    Raises UsageError where one has, and as ``Workspace.tie``.
    """

    def __init__(self, place: Workspace, changed: Callable[[], None] = lambda: None) -> None:
        self.workspace, self.changed = place, changed
        self.path = place.place / JOURNAL
        self.lock = threading.RLock()
        self.waiting: Queue[int | None] = Queue()
        with ExitStack() as held:
            with suppress(OSError):  # where nobody can write there is no journal to share
                taken = (
                    f"{place.name} is shown already: open the address that the other lifelong ui "
                    f"has printed, or end it (fuser {place.place / LOCK} names its process)"
                )
                held.enter_context(claimed(place.place, taken))
                place.tie()
            self.all: dict[int, Job] = {job.number: job for job in self._read()}
            self._held = held.pop_all()
        self._remove_uploads()
        for job in self.all.values():
            if not job.over:  # of a server that was killed
                self.waiting.put(job.number)
        self.thread = threading.Thread(target=self._work, daemon=True, name="jobs")
        self.thread.start()

    def close(self) -> None:
        """Let the job at hand end, and let go of the journal."""
        self.waiting.put(None)
        self.thread.join()
        self._held.close()

    def ask(self, kind: str, given: dict[str, Any], seen: int | None) -> Job:
        """Write a job down. seen: the store's version as the asker saw it; None for a job that
        changes nothing. Raises ChangedMeanwhileError, also while the run goes on."""
        run = self.workspace.run
        with self.lock:
            if any(not job.over for job in self.all.values()):
                raise ChangedMeanwhileError("another change is being made; wait until it is done")
            if seen is not None and run is not None and is_going_on(run):
                raise ChangedMeanwhileError(
                    "the run goes on, and its next checkpoint would undo the change; let it end, "
                    "or stop it on the page Learning, then ask again"
                )
            if seen is not None:
                self._require_unchanged(seen)
            number = max(self.all, default=0) + 1
            time = datetime.now(UTC).isoformat(timespec="seconds")
            job = self._keep(Job(number, kind, given, started=time))
            self._remove_uploads()
        self.waiting.put(number)
        return job

    def again(self, number: int) -> None:
        """Go on with the newest job, which has failed, from where it failed: what is done is not
        done twice. Raises ChangedMeanwhileError for another job."""
        with self.lock:
            if number != max(self.all) or self.all[number].state != "failed":
                raise ChangedMeanwhileError(
                    "only the newest change can be tried again, where it has failed"
                )
            self._keep(replace(self.all[number], state="waiting"))
        self.waiting.put(number)

    def _remove_uploads(self) -> None:
        """Those of no job that goes on, or can be tried again; what is forgotten must not lie on
        in one."""
        newest = max(self.all, default=0)
        needed = {
            job.given.get("file")
            for job in self.all.values()
            if not job.over or (job.number == newest and job.state == "failed")
        }
        for path in self.workspace.place.glob(f"{UPLOAD}*"):
            if path.name not in needed:
                path.unlink(missing_ok=True)

    def _require_unchanged(self, seen: int) -> None:
        with self.workspace.open() as store:
            if store.version != seen:
                raise ChangedMeanwhileError(
                    f"the memory was changed since this page was loaded (version {seen}, now "
                    f"{store.version}); nothing was done. Look again, then ask again"
                )

    def get(self, number: int) -> Job:
        """Raises KeyError."""
        with self.lock:
            return self.all[number]

    def newest_first(self) -> list[Job]:
        with self.lock:
            return sorted(self.all.values(), key=lambda job: -job.number)

    # ------------------------------------------------------------------------------- the thread

    def _work(self) -> None:
        while (number := self.waiting.get()) is not None:
            job = self._keep(replace(self.get(number), state="running"))
            try:
                KINDS[job.kind](self, job)
                self._keep(replace(self.get(number), state="done"))
            except Exception as error:
                traceback.print_exc()
                self._say(number, f"{error}")
                self._keep(replace(self.get(number), state="failed"))
            self.changed()

    def _keep(self, job: Job) -> Job:
        with self.lock:
            self.all[job.number] = job
            self.path.parent.mkdir(parents=True, exist_ok=True)
            jobs = [asdict(one) for _, one in sorted(self.all.items())]
            write(self.path, json.dumps(jobs, indent=1) + "\n")
        return job

    def _say(self, number: int, line: str, **changes: Any) -> None:
        job = self.get(number)
        if line not in job.said:
            job = replace(job, said=(*job.said, line))
        self._keep(replace(job, **changes))

    def _read(self) -> list[Job]:
        if not self.path.is_file():
            return []
        content = json.loads(self.path.read_text(encoding="utf-8"))
        return [Job(**{**job, "said": tuple(job["said"])}) for job in content]

    # ------------------------------------------------------------------------------- the parts

    def adapted(self, job: Job, part: int, change: Change, run: Path, **options: Any) -> Path:
        """The run that ``change`` makes of ``run``: made once, whole or not at all."""
        out = self.workspace.place / f"{job.number}-{part}"
        if not (out / "adaptation.json").is_file():
            adapt(run, out, change, seed=self.workspace.seed, **options)
        return out

    def take_over(self, job: Job, run: Path) -> int:
        """The store has this run's prior and memory from now on, but for what was dropped; its
        version."""
        place = self.workspace
        step = next((s for s in place.steps if s.run == run.name), None)
        if step is not None:
            return step.version
        version, left_out = place.save(learner_file(run, place.seed), _named(job))
        place.record(Step(_named(job), version, run.name, left_out))
        if left_out:
            self._say(job.number, f"{len(left_out)} that were dropped before stay out of the "
                      "memory; the network knows them still")  # fmt: skip
        return version


def _named(job: Job) -> str:
    return f"{job.kind}, change {job.number}"


def _summed_up(run: Path) -> dict[str, Any]:
    content = json.loads((run / "adaptation.json").read_text(encoding="utf-8"))
    (result, *_) = content["seeds"]
    names = ["accuracy_before", "accuracy_after"]
    names += [f"{n}{end}" for n in ("removed", "relabelled") for end in ("", "_before", "_after")]
    found = {name: result.get(name) for name in names}
    certificate = result.get("certificate")
    found["certificate"] = None if certificate is None else str(run / certificate)
    return {**found, "notes": result["notes"], "seconds": result["seconds"]}


def _forget(jobs: Jobs, job: Job) -> None:
    """Take the influence of items out of network and prior (of a run), then erase them. Meanwhile
    the run does not go on: its next checkpoint would hold them again."""
    run = jobs.workspace.run
    with nullcontext() if run is None else claimed(run):
        _forgotten(jobs, job)


def _forgotten(jobs: Jobs, job: Job) -> None:
    numbers: list[int] = job.given["items"]
    tasks: dict[str, list[int]] = job.given["tasks"]
    place = jobs.workspace
    taken = next((s for s in place.steps if s.what == _named(job)), None)
    run = place.current
    if run is not None and taken is None:
        jobs._say(job.number, "taking out what was learned from them", parts=len(tasks) + 1)
        results = []
        for part, (task, origins) in enumerate(sorted(tasks.items())):
            change = Remove(ids=tuple(origins), task=int(task) + 1)
            certifying = Certifying(note=job.given.get("note", ""))
            run = jobs.adapted(job, part, change, run, certifying=certifying)
            results.append(_summed_up(run))
            jobs._say(job.number, f"task {int(task) + 1}: done", done=part + 1)
        changes = _certificates(place, job, results)
        jobs._say(job.number, "certified", result={"items": len(numbers), "changes": changes})
        jobs.take_over(job, run)
    jobs._say(job.number, "erasing them from every version and every file")
    _erase(jobs, job, numbers)
    _clear(place, job, run, len(tasks))
    if place.run is not None:
        jobs._say(job.number, f"the weights in {place.run} itself had learned from them and are "
                  "left as they are, with its logs and settings: remove that folder once you need "
                  f"it no more, and open {run} instead")  # fmt: skip
    for other in place.other_seeds():
        jobs._say(job.number, "the page's memory of another seed may hold them: forget them there "
                  f"too (lifelong ui {place.run} --seed {other})")  # fmt: skip
    result = jobs.get(job.number).result or {"items": len(numbers), "changes": []}
    jobs._say(job.number, f"{len(numbers)} erased", result=result, done=len(tasks) + 1)


def _erase(jobs: Jobs, job: Job, numbers: list[int]) -> None:
    place = jobs.workspace
    with place.open("a") as store:
        try:
            found = store.find(numbers)
        except ValueError:
            return  # done before the server was killed
        done = store.forget(found, runs=[r for r in (place.run,) if r is not None])
    if done.influenced:
        jobs._say(job.number, "today's prior was made with some of them, and there is no network "
                  "here to take that out of it")  # fmt: skip


def _clear(place: Workspace, job: Job, run: Path | None, parts: int) -> None:
    """Remove the page's own runs whose networks had learned them, and what names them."""
    measures.remove(place.place)
    own = [*place.runs()[1:], *(place.place / f"{job.number}-{part}" for part in range(parts))]
    for old in own:
        if old != run:
            shutil.rmtree(old, ignore_errors=True)


def _certificates(
    place: Workspace, job: Job, results: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The same results, their certificates copied to where they stay."""
    folder, kept = place.place / "certificates", []
    folder.mkdir(parents=True, exist_ok=True)
    for part, result in enumerate(results):
        path = Path(result["certificate"])
        to = folder / f"{job.number}-{part}.html"
        for suffix in (".html", ".json"):
            shutil.copyfile(path.with_suffix(suffix), to.with_suffix(suffix))
        kept.append({**result, "certificate": to.relative_to(place.place).as_posix()})
    return kept


def _relabel(jobs: Jobs, job: Job) -> None:
    """Other labels for items: task -> origin -> label."""
    run = jobs.workspace.current
    if run is None:
        raise ValueError("a store alone has no network that learned from the labels")
    taken = next((s for s in jobs.workspace.steps if s.what == _named(job)), None)
    if taken is not None:
        return
    labels: dict[str, dict[str, int]] = job.given["labels"]
    jobs._say(job.number, "fitting to the right labels", parts=len(labels))
    results = []
    for part, (task, of_task) in enumerate(sorted(labels.items())):
        ids = tuple(int(origin) for origin in of_task)
        change = Relabel(ids, tuple(of_task.values()), task=int(task) + 1)
        run = jobs.adapted(job, part, change, run)
        results.append(_summed_up(run))
        jobs._say(job.number, f"task {int(task) + 1}: done", done=part + 1)
    jobs._say(job.number, "relabelled", result={"changes": results})
    jobs.take_over(job, run)


def _measure(jobs: Jobs, job: Job) -> None:
    place = jobs.workspace
    if place.current is None:
        raise ValueError("a store alone has no network to measure")
    measures.measure(
        place.place, place.current, place.seed, lambda line: jobs._say(job.number, line)
    )
    jobs._say(job.number, "measured", result={"changes": []}, done=1)


def _regularise(jobs: Jobs, job: Job) -> None:
    run = jobs.workspace.current
    if run is None:
        raise ValueError("a store alone has no network to fit again")
    out = jobs.adapted(job, 0, Regularise(job.given["precision"]), run)
    jobs.take_over(job, out)
    jobs._say(job.number, "fitted again", result={"changes": [_summed_up(out)]}, done=1)


def _add(jobs: Jobs, job: Job) -> None:
    run = jobs.workspace.current
    if run is None:
        raise ValueError("a store alone has no network to learn with")
    file = jobs.workspace.place / job.given["file"]
    out = jobs.adapted(job, 0, Add(None, file, None), run)
    jobs.take_over(job, out)
    file.unlink(missing_ok=True)  # the run has its own copy
    jobs._say(job.number, "learned", result={"changes": [_summed_up(out)]}, done=1)


KINDS: dict[str, Callable[[Jobs, Job], None]] = {
    "forget": _forget,
    "relabel": _relabel,
    "measure": _measure,
    "regularise": _regularise,
    "add": _add,
}


def by_task(items: Sequence[Any]) -> dict[str, list[int]]:
    """Task -> origins of these items, as a job keeps them."""
    found: dict[str, list[int]] = {}
    for item in items:
        found.setdefault(str(item.task), []).append(item.origin)
    return found
