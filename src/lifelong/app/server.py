"""The page: addresses, and what each shows. Everything is made here as HTML; the little script only
saves clicks and keeps what goes on up to date.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from importlib.resources import files
from pathlib import Path
from threading import BoundedSemaphore, RLock, Thread
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import FastAPI, Form, HTTPException, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException

from .. import runs, thumbnails
from ..errors import StoreError
from ..report.table import bytes_text, seconds_text
from ..store import Item, MemoryStore
from . import index, learning, measures
from .jobs import UPLOAD, ChangedMeanwhileError, Job, Jobs, by_task
from .safety import Gate
from .workspace import Step, Workspace, refresh

PAGE_SIZE = 60
REVIEW_SIZE = 24
MOST_CHOSEN = 900  # items in one request: starlette reads 1,000 fields of a form
THUMBNAILS = 4_000  # kept in memory, a few kilobytes each
Chosen = Annotated[list[int], Form(max_length=MOST_CHOSEN)]
Seen = Annotated[int, Form(ge=0)]  # the version of the store that the asker has seen
Number = Annotated[int, Query(ge=0, le=2**53)]


class ItemOut(BaseModel):
    """An item of the memory, as the interface for programs gives it."""

    item: int
    id: str
    task: int
    origin: int
    label: int | float | list[int | float] | None
    scores: dict[str, float]
    kind: str
    shape: list[int]
    note: str


class PageOut(BaseModel):
    """A part of the gallery. total: items that fit the filter."""

    version: int
    total: int
    items: list[ItemOut]


class JobOut(BaseModel):
    """How far a change is."""

    number: int
    kind: str
    state: str
    done: int
    parts: int
    said: list[str]
    result: dict[str, Any] | None = None


class DropIn(BaseModel):
    """Items to take out of today's memory. version: of the store, as it was seen."""

    items: list[Annotated[int, Field(ge=1, le=2**53)]] = Field(min_length=1, max_length=MOST_CHOSEN)
    version: Annotated[int, Field(ge=0, le=2**53)]


class VersionOut(BaseModel):
    """The store's version after a change."""

    version: int


class App:
    """One workspace being looked at. Requests share the index and the thumbnails."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.lock = RLock()
        self._index: index.Index | None = None
        self._network: tuple[int, measures.Network] | None = None
        self._decoding = BoundedSemaphore(2)  # a picture may take 160 MB while it is decoded
        self._pictures: OrderedDict[tuple[int, str], bytes | str] = OrderedDict()
        self.jobs = Jobs(workspace, self.forget_pictures)

    def forget_pictures(self) -> None:
        """A change may have erased what is kept here for speed."""
        with self.lock:
            self._pictures.clear()
            self._index = self._network = None

    def index(self, store: MemoryStore) -> index.Index:
        """Of today's version, built once for each."""
        with self.lock:
            if self._index is None or self._index.version != store.version:
                self._pictures.clear()
                found = self.measures()
                self._index = index.build(store, {} if found is None else found.scores)
            return self._index

    def measures(self) -> measures.Measures | None:
        """Of the network in force; None where it was not measured as it is now."""
        place = self.workspace
        return measures.load(place.place, place.current, place.seed)

    def network(self) -> measures.Network:
        """Read once. Raises ValueError where there is none."""
        run, seed = self.workspace.current, self.workspace.seed
        if run is None:
            raise ValueError("a store alone has no network")
        with self.lock:
            stamp = measures.stamp_of(run, seed)
            if self._network is None or self._network[0] != stamp:
                self._network = (stamp, measures.Network.of(run, seed))
            return self._network[1]

    def picture(self, store: MemoryStore, item: Item, size: str) -> bytes | str:
        """PNG, or why there is none."""
        key = (item.item, size)
        with self.lock:
            if key in self._pictures:
                self._pictures.move_to_end(key)
                return self._pictures[key]
        try:
            with self._decoding:
                made: bytes | str = thumbnails.picture(
                    store.raw(item.item), item, thumbnails.SIZES[size]
                )
        except thumbnails.NoPictureError as error:
            made = str(error)
        with self.lock:
            self._pictures[key] = made
            while len(self._pictures) > THUMBNAILS:
                self._pictures.popitem(last=False)
        return made


def make(workspace: Workspace, *, token: str, hosts: frozenset[str]) -> Gate:
    """The ASGI application. hosts: "name:port" that it answers to; token: what lets one in."""
    app = App(workspace)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        app.jobs.close()

    api = FastAPI(
        title="lifelong ui",
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/openapi.json",
        lifespan=life,
    )
    _pages(api, app)
    _changes(api, app)
    _programs(api, app)
    _errors(api, app)
    return Gate(api, token=token, hosts=hosts, close=app.jobs.close)


def new_token() -> str:
    return secrets.token_urlsafe(24)


# ------------------------------------------------------------------------------- templates

_ENVIRONMENT = Environment(
    loader=PackageLoader("lifelong.app"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


def _points(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} points"


def _label(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_label(v) for v in value[:4]) + (", …" if len(value) > 4 else "")
    return f"{value:g}" if isinstance(value, float) else str(value)


_ENVIRONMENT.filters |= {
    "percent": _percent,
    "points": _points,
    "label": _label,
    "bytes": lambda n: "" if n is None else bytes_text(n),
    "seconds": lambda s: "" if s is None else seconds_text(s),
    "query": lambda values: urlencode({k: v for k, v in values.items() if v not in (None, "")}),
}


def _page(app: App, name: str, status: int = 200, **values: Any) -> HTMLResponse:
    template = _ENVIRONMENT.get_template(name)
    shared = {
        "workspace": app.workspace,
        "busy": next((job for job in app.jobs.newest_first() if not job.over), None),
        "page": name.removesuffix(".html"),
        "assets": _assets(),
    }
    return HTMLResponse(template.render(**shared, **values), status)


def _assets() -> dict[str, str]:
    """Name -> digest, so that a new version of a file has another address."""
    return {name: hashlib.sha256(data).hexdigest()[:12] for name, data in _static().items()}


def _static() -> dict[str, bytes]:
    folder = files("lifelong.app").joinpath("static")
    return {name: folder.joinpath(name).read_bytes() for name in ("app.css", "app.js")}


# ------------------------------------------------------------------------------- looking


def _opened(app: App) -> MemoryStore:
    if not app.workspace.has_store:
        refresh(app.workspace)
    if not app.workspace.has_store:
        raise HTTPException(
            404, "There is no memory yet: the run has not finished its first task, or its method "
            "keeps none.")  # fmt: skip
    return app.workspace.open()


def _one(store: MemoryStore, number: int) -> Item:
    found = store.items(after=number - 1, limit=1)
    if not found or found[0].item != number:
        raise HTTPException(404, f"There is no item {number} in today's memory.")
    return found[0]


def _many(store: MemoryStore, numbers: list[int]) -> list[Item]:
    return [_one(store, number) for number in dict.fromkeys(numbers)]


def _arranged(
    app: App,
    store: MemoryStore,
    sort: str,
    ascending: bool,
    task: int | None,
    label: float | None,
    since: int | None,
    text: str,
) -> tuple[index.Index, Any]:
    known = app.index(store)
    among = index.named(store, text) if text else None
    try:
        places = known.arranged(
            sort, ascending=ascending, task=task, label=label, since=since, among=among
        )
    except ValueError as error:
        raise HTTPException(404, str(error)) from error
    return known, places


def _number(text: str, kind: Callable[[str], Any] = float) -> Any:
    """Of a filter in a form, where none is ""."""
    if not text.strip():
        return None
    try:
        value = kind(text)
    except ValueError:
        raise HTTPException(422, f"{text!r} is no number.") from None
    if not abs(value) < 2**53:
        raise HTTPException(422, f"{text!r} is too large.")
    return value


def _pages(api: FastAPI, app: App) -> None:
    get = partial(api.get, include_in_schema=False)

    @get("/")
    def start() -> Response:
        return RedirectResponse("/memory", 303)

    @get("/static/{name}")
    def static(name: str) -> Response:
        held = _static()
        if name not in held:
            raise HTTPException(404, "There is no such file.")
        kind = "text/css" if name.endswith(".css") else "text/javascript"
        return Response(
            held[name], media_type=kind, headers={"Cache-Control": "private, max-age=86400"}
        )

    @get("/memory")
    def memory(
        sort: str = "newest",
        ascending: bool = False,
        task: str = "",
        label: str = "",
        since: str = "",
        text: Annotated[str, Query(max_length=200)] = "",
        page: Annotated[int, Query(ge=1, le=10**9)] = 1,
    ) -> Response:
        wanted = _number(task, int), _number(label), _number(since, int)
        with _opened(app) as store:
            known, places = _arranged(app, store, sort, ascending, *wanted, text)
            pages = max(1, -(-len(places) // PAGE_SIZE))
            page = min(page, pages)
            shown = places[(page - 1) * PAGE_SIZE : page * PAGE_SIZE]
            items = [(_one(store, int(known.number[p])), p) for p in shown]
            cards = [_card(app, store, known, item, p, sort) for item, p in items]
            asked = {"sort": sort, "ascending": "true" if ascending else "", "task": task,
                     "label": label, "since": since, "text": text}  # fmt: skip
            return _page(
                app, "memory.html", cards=cards, known=known, asked=asked, number=page,
                pages=pages, total=len(places), version=store.version,
            )  # fmt: skip

    @get("/items/{number}")
    def item(number: int) -> Response:
        with _opened(app) as store:
            one = _one(store, number)
            known = app.index(store)
            place = int((known.number == number).argmax())
            scores = {n: float(v[place]) for n, v in known.scores.items() if v[place] == v[place]}
            past = []
            for version in store.history()[-12:]:
                if version.number >= one.since and version.size:
                    try:
                        past.append((version, index.soft_label(store, one, version.number)))
                    except (StoreError, ValueError, IndexError):
                        continue
            shown = app.picture(store, one, "large")
            return _page(
                app, "item.html", item=one, scores=scores, past=past, version=store.version,
                picture=isinstance(shown, bytes), why=shown if isinstance(shown, str) else "",
                words=thumbnails.words(store.raw(number), one),
            )  # fmt: skip

    @get("/items/{number}/neighbours")
    def near(number: int) -> Response:
        with _opened(app) as store:
            one = _one(store, number)
            found = app.measures()
            key = measures.key_of(one.task, one.origin)
            cards = None
            if found is not None and key in found.scores:
                alike = measures.neighbours(app.network(), found.scores, key)
                pairs = [(index.number_of(store, other), rho) for other, rho in alike]
                known = app.index(store)
                cards = [
                    (_card(app, store, known, _one(store, n), 0, ""), rho)
                    for n, rho in pairs if n is not None
                ]  # fmt: skip
            return _page(app, "neighbours.html", item=one, cards=cards, measured=found is not None)

    @get("/review")
    def review(page: Annotated[int, Query(ge=1, le=10**9)] = 1) -> Response:
        _require_run(app)
        with _opened(app) as store:
            known = app.index(store)
            order = next((n for n in ("sensitivity", "residual") if n in known.scores), "newest")
            places = known.arranged(order)
            pages = max(1, -(-len(places) // REVIEW_SIZE))
            page = min(page, pages)
            shown = places[(page - 1) * REVIEW_SIZE : page * REVIEW_SIZE]
            items = [_one(store, int(known.number[p])) for p in shown]
            cards = [_card(app, store, known, i, p, order) for i, p in zip(items, shown)]
            for card, (belief, competing) in zip(cards, _believed(store, items), strict=True):
                says = max(competing, key=lambda c: belief[c], default=None)
                card |= {"competing": competing, "says": says,
                         "sure": None if says is None else belief[says]}  # fmt: skip
            return _page(
                app, "review.html", cards=cards, order=order, number=page, pages=pages,
                version=store.version, measured=app.measures(),
            )  # fmt: skip

    @get("/items/{number}/picture")
    def picture(number: int, size: str = "small") -> Response:
        if size not in thumbnails.SIZES:
            raise HTTPException(422, f"size is one of {', '.join(thumbnails.SIZES)}.")
        with _opened(app) as store:
            made = app.picture(store, _one(store, number), size)
        if isinstance(made, str):
            raise HTTPException(404, f"It cannot be shown: {made}.")
        return Response(made, media_type="image/png")

    @get("/learning")
    def learned() -> Response:
        return _page(app, "learning.html", **_learning(app))

    @get("/learning/now")
    def now() -> Response:
        return _page(app, "now.html", **_learning(app))

    @get("/compare")
    def compare() -> Response:
        named = app.workspace.called
        runs = [learning.learning(run, named(run)) for run in _comparable(app.workspace)]
        runs = [run for run in runs if run.seeds or run.reached or run.changed][:12]
        rows = [(run, learning.numbers(run)) for run in runs]
        return _page(
            app, "compare.html", rows=rows, chart=learning.curves(runs),
            legend=learning.legend(runs),
        )  # fmt: skip

    @get("/changes")
    def changes() -> Response:
        with _opened(app) as store:
            history = store.history()[::-1]
            return _page(
                app, "changes.html", history=history[:50], version=store.version,
                jobs=app.jobs.newest_first(), since=app.workspace.since,
            )  # fmt: skip

    @get("/forget")
    def ask(items: Annotated[list[int], Query(max_length=MOST_CHOSEN)]) -> Response:
        with _opened(app) as store:
            chosen = _many(store, items)
            return _page(app, "forget.html", items=chosen, version=store.version)

    @get("/jobs/{number}")
    def job(number: int) -> Response:
        return _page(app, "job.html", job=_job(app, number))

    @get("/jobs/{number}/now")
    def job_now(number: int) -> Response:
        return _page(app, "job_now.html", job=_job(app, number))

    @get("/jobs/{number}/certificate/{part}")
    def certificate(number: int, part: int, as_json: bool = False) -> Response:
        found = (_job(app, number).result or {}).get("changes", [])
        if not 0 <= part < len(found) or found[part]["certificate"] is None:
            raise HTTPException(404, "That change has no certificate.")
        path = app.workspace.place / found[part]["certificate"]
        path = path.with_suffix(".json") if as_json else path
        return FileResponse(path, filename=f"certificate-{number}-{part + 1}{path.suffix}")


def _card(
    app: App, store: MemoryStore, known: index.Index, item: Item, place: Any, sort: str
) -> dict[str, Any]:
    value = known.scores[sort][place] if sort in known.scores else None
    text = "" if item.kind in ("image",) else thumbnails.words(store.raw(item.item), item, 160)
    shown = item.kind in ("image", "tensor") and isinstance(
        app.picture(store, item, "small"), bytes
    )
    return {
        "item": item,
        "picture": shown,
        "words": text,
        "score": None
        if value is None or value != value
        else f"{value:{'.3g' if abs(value) >= 0.001 else '.2g'}}",
    }


def _believed(store: MemoryStore, items: list[Item]) -> list[tuple[list[float], list[int]]]:
    """Soft labels, and the classes that compete; nothing where the labels are no classes."""
    try:
        found = index.believed(store, items)
    except (ValueError, RuntimeError):
        return [([], [])] * len(items)
    return [
        pair if isinstance(item.label, int) else ([], [])
        for item, pair in zip(items, found, strict=True)
    ]


def _learning(app: App) -> dict[str, Any]:
    run = app.workspace.run
    if run is None:
        raise HTTPException(404, "A store alone has no network that learned; open a run's folder.")
    found = learning.learning(run, app.workspace.called(run))
    measured = app.measures()
    return {
        "run": found,
        "going": runs.is_going_on(run) and not _is_forgetting(app),
        "reliability": learning.reliability(measured),
        "fidelity": learning.fidelity(measured),
        "legend": learning.fidelity_legend(measured),
        "matrix": learning.matrix(found),
        "curves": learning.curves([found]),
        "numbers": learning.numbers(found),
        "measured": measured,
    }


def _comparable(workspace: Workspace) -> list[Path]:
    """The run, those adapted from it, and those in folders beside it, by name."""
    if workspace.run is None:
        return []
    beside = sorted(p.parent for p in workspace.run.parent.glob("*/config.json"))
    return list(dict.fromkeys([*workspace.runs(), *beside]))


def _job(app: App, number: int) -> Job:
    try:
        return app.jobs.get(number)
    except KeyError:
        raise HTTPException(404, f"There is no change {number}.") from None


# ------------------------------------------------------------------------------- changing


def _changes(api: FastAPI, app: App) -> None:
    post = partial(api.post, include_in_schema=False)

    @post("/changes/drop")
    def drop(items: Chosen, version: Seen) -> Response:
        _drop(app, items, version)
        return RedirectResponse("/changes", 303)

    @post("/changes/restore")
    def restore(to: Annotated[int, Form(ge=1)], version: Seen) -> Response:
        _require_idle(app)
        if to < app.workspace.since:
            raise HTTPException(
                409,
                f"The network of version {to} had learned what has been forgotten since; versions "
                f"from {app.workspace.since} on can be had back.",
            )
        then = app.workspace.at(to)
        with _seen(app, version) as store:
            after = store.restore(to, message=f"as version {to}")
            left_out = app.workspace.dropped(store, then)
        if app.workspace.steps:
            run = None if then is None else then.run
            app.workspace.record(Step(f"as version {to}", after, run, left_out))
        app.forget_pictures()
        return RedirectResponse("/changes", 303)

    @post("/changes/forget")
    def forget(
        items: Chosen,
        version: Seen,
        sure: Annotated[str, Form(max_length=20)] = "",
        note: Annotated[str, Form(max_length=2_000)] = "",
    ) -> Response:
        if sure.strip().lower() != "forget":
            raise HTTPException(
                422, "Nothing was forgotten: type the word forget to say that you are sure."
            )
        with _opened(app) as store:
            chosen = _many(store, items)
        given = {"items": [i.item for i in chosen], "tasks": by_task(chosen), "note": note}
        return _asked(app, "forget", given, version)

    @post("/changes/relabel")
    async def relabel(request: Request) -> Response:
        form = await request.form()
        return await run_in_threadpool(_relabelled, app, dict(form.items()))

    @post("/jobs/{number}/again")
    def again(number: int) -> Response:
        _job(app, number)
        try:
            app.jobs.again(number)
        except ChangedMeanwhileError as error:
            raise HTTPException(409, str(error)) from error
        return RedirectResponse(f"/jobs/{number}", 303)

    @post("/measure")
    def measure() -> Response:
        _require_run(app)
        return _asked(app, "measure", {}, None)

    @post("/learning/stop")
    def stop() -> Response:
        run = _require_run(app)
        _require_not_held(app)
        runs.ask_to_stop(run)
        return RedirectResponse("/learning", 303)

    @post("/learning/resume")
    def resume() -> Response:
        run = _require_run(app)
        _require_not_held(app)
        if runs.is_going_on(run):
            raise HTTPException(409, "It goes on already.")
        if learning.learning(run, run.name).finished:
            raise HTTPException(409, "It is finished.")
        _resumed(app.workspace.place, run)
        return RedirectResponse("/learning", 303)

    @post("/changes/regularise")
    def regularise(precision: Annotated[float, Form(ge=0, le=1e12)], version: Seen) -> Response:
        _require_run(app)
        return _asked(app, "regularise", {"precision": precision}, version)

    @post("/changes/add")
    def add(file: UploadFile, version: Seen) -> Response:
        _require_run(app)
        suffix = Path(file.filename or "").suffix.lower()
        if suffix not in (".npz", ".parquet"):
            raise HTTPException(422, "Expected a .npz or .parquet file with inputs and labels.")
        app.workspace.place.mkdir(parents=True, exist_ok=True)
        path = app.workspace.place / f"{UPLOAD}{secrets.token_hex(8)}{suffix}"
        try:
            with path.open("wb") as out:
                shutil.copyfileobj(file.file, out)
            return _asked(app, "add", {"file": path.name}, version)
        except BaseException:  # no job will ever remove it
            path.unlink(missing_ok=True)
            raise


def _relabelled(app: App, form: dict[str, Any]) -> Response:
    """form: version, and for each item whose label is wrong to-NUMBER, the right one."""
    _require_run(app)
    version = _number(str(form.get("version", "")), int)
    chosen = {
        _number(name.removeprefix("to-"), int): _number(str(value), int)
        for name, value in form.items()
        if name.startswith("to-") and str(value).strip()
    }
    if version is None or None in chosen:
        raise HTTPException(422, "Some of what was sent is not as expected.")
    if not chosen:
        raise HTTPException(422, "Nothing was relabelled: choose the right label of an example.")
    labels: dict[str, dict[str, int]] = {}
    with _opened(app) as store:
        items = _many(store, list(chosen))
        for item, (_, competing) in zip(items, _believed(store, items), strict=True):
            label = chosen[item.item]
            if label not in competing:
                raise HTTPException(422, f"{label} is none of the classes of item {item.item}.")
            if label != item.label:
                labels.setdefault(str(item.task), {})[str(item.origin)] = label
    if not labels:
        raise HTTPException(422, "Nothing was relabelled: those are the labels that they have.")
    return _asked(app, "relabel", {"labels": labels}, version)


def _resumed(place: Path, run: Path) -> None:
    """Go on with a run, in a process of its own that does not end with this one."""
    place.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "lifelong", "run", "--resume", str(run), "--quiet"]
    with (place / "resumed.log").open("ab") as out:
        going = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    Thread(target=going.wait, daemon=True, name="resumed").start()  # else it stays a zombie


def _drop(app: App, items: list[int], version: int) -> int:
    _require_idle(app)
    with _seen(app, version) as store:
        _many(store, items)
        after = store.drop(items, message="in the page")
    app.forget_pictures()
    return after


def _asked(app: App, kind: str, given: dict[str, Any], version: int | None) -> Response:
    try:
        job = app.jobs.ask(kind, given, version)
    except ChangedMeanwhileError as error:
        raise HTTPException(409, str(error)) from error
    return RedirectResponse(f"/jobs/{job.number}", 303)


def _seen(app: App, version: int) -> MemoryStore:
    """The store to write to, where it still is as it was seen."""
    if not app.workspace.has_store:
        raise HTTPException(404, "There is no memory yet.")
    store = app.workspace.open("a")
    if store.version != version:
        now = store.version
        store.close()
        raise HTTPException(
            409,
            f"The memory was changed since this page was loaded (version {version}, now {now}). "
            "Nothing was done: look again, then ask again.",
        )
    return store


def _require_idle(app: App) -> None:
    if any(not job.over for job in app.jobs.newest_first()):
        raise HTTPException(409, "Another change is being made; wait until it is done.")


def _is_forgetting(app: App) -> bool:
    """Then it is the page itself that holds the run."""
    return any(job.kind == "forget" and not job.over for job in app.jobs.newest_first())


def _require_not_held(app: App) -> None:
    if _is_forgetting(app):
        raise HTTPException(409, "Examples are being forgotten; wait until that is done.")


def _require_run(app: App) -> Path:
    if app.workspace.run is None:
        raise HTTPException(422, "A store alone has no network; open a run's folder for this.")
    return app.workspace.run


# ------------------------------------------------------------------------------- for programs


def _programs(api: FastAPI, app: App) -> None:
    def told(item: Item, known: index.Index) -> ItemOut:
        place = int((known.number == item.item).argmax())
        scores = {n: float(v[place]) for n, v in known.scores.items() if v[place] == v[place]}
        return ItemOut(
            item=item.item, id=item.id, task=item.task, origin=item.origin, label=item.label,
            scores=scores, kind=item.kind, shape=list(item.shape), note=item.note,
        )  # fmt: skip

    refusals: Mapping[int | str, dict[str, Any]] = {
        403: {"description": "Without the token, or from another page"},
        404: {"description": "There is no such thing"},
        409: {"description": "The memory was changed meanwhile"},
        422: {"description": "Values that are none"},
    }
    get = partial(api.get, responses=dict(refusals))
    post = partial(api.post, responses=dict(refusals))

    @get("/api/memory")
    def memory(
        sort: str = "newest",
        ascending: bool = False,
        task: Annotated[int | None, Query(ge=-(2**53), le=2**53)] = None,
        label: Annotated[float | None, Query(ge=-(2**53), le=2**53)] = None,
        since: Annotated[int | None, Query(ge=1, le=2**53)] = None,
        text: Annotated[str, Query(max_length=200)] = "",
        skip: Number = 0,
        limit: Annotated[int, Query(ge=1, le=1_000)] = PAGE_SIZE,
    ) -> PageOut:
        """Items of today's memory, sorted and filtered as in the gallery."""
        with _opened(app) as store:
            known, places = _arranged(app, store, sort, ascending, task, label, since, text)
            shown = places[skip : skip + limit]
            items = [told(_one(store, int(known.number[p])), known) for p in shown]
            return PageOut(version=store.version, total=len(places), items=items)

    @get("/api/items/{number}")
    def item(number: Annotated[int, Field(ge=1, le=2**53)]) -> ItemOut:
        """One item of today's memory."""
        with _opened(app) as store:
            return told(_one(store, number), app.index(store))

    @get("/api/jobs/{number}")
    def job(number: Annotated[int, Field(ge=1, le=2**53)]) -> JobOut:
        """How far a change is."""
        found = asdict(_job(app, number))
        return JobOut(**{name: found[name] for name in JobOut.model_fields})

    @post("/api/drop")
    def drop(wanted: DropIn) -> VersionOut:
        """Take items out of today's memory; restoring a version brings them back."""
        return VersionOut(version=_drop(app, wanted.items, wanted.version))


# ------------------------------------------------------------------------------- what goes wrong


def _errors(api: FastAPI, app: App) -> None:
    def answer(request: Request, status: int, text: str) -> Response:
        if request.url.path.startswith("/api/"):
            from fastapi.responses import JSONResponse

            return JSONResponse({"detail": text}, status)
        return _page(app, "error.html", status, text=text)

    @api.exception_handler(StarletteHTTPException)
    async def told(request: Request, error: StarletteHTTPException) -> Response:
        text = str(error.detail)
        found = answer(request, error.status_code, text)
        found.headers.update(error.headers or {})
        return found

    @api.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: RequestValidationError) -> Response:
        said = "; ".join(f"{e['loc'][-1]}: {e['msg']}" for e in error.errors()[:3])
        return answer(request, 422, f"Some of what was sent is not as expected: {said}.")

    @api.exception_handler(StoreError)
    async def store(request: Request, error: StoreError) -> Response:
        return answer(request, 409, f"The store says: {error}")

    @api.exception_handler(ValueError)
    async def value(request: Request, error: ValueError) -> Response:
        return answer(request, 422, str(error))
