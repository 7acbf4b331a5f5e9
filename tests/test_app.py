"""The page without a browser: what it shows, who may ask, what changes, what is never lost."""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from app_client import TOKEN, Client, served
from lifelong import Categorical, Examples, Memory, runs, thumbnails
from lifelong.adapted_runs import restored
from lifelong.app import index, jobs, learning, measures, workspace
from lifelong.app.jobs import Job, Jobs
from lifelong.app.workspace import Workspace
from lifelong.cli import main
from lifelong.commands.ui import newest
from lifelong.config import Experiment, Overrides, RunConfig, UsageError
from lifelong.data import Batch
from lifelong.memory import remember
from lifelong.metrics import evaluate
from lifelong.run_memory import learner_file, prior_in
from lifelong.sensitivity import sensitivities
from lifelong.store import Item, open_store
from lifelong.thumbnails import NoPictureError


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five tasks with four digits of each class remembered."""
    folder = tmp_path_factory.mktemp("page") / "run"
    config = RunConfig(
        Experiment(benchmark="split-digits", prior="kprior", memory=8), Overrides(epochs=2)
    )
    plan = runs.prepare(config)
    runs.create(plan, folder)
    runs.execute(plan, folder)
    return folder


@pytest.fixture
def run(learned: Path, tmp_path: Path) -> Path:
    shutil.copytree(learned, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def page(run: Path) -> Iterator[Client]:
    with served(workspace(run)) as client:
        yield client


def items_of(n: int = 6, size: int = 16) -> Memory:
    g = torch.Generator().manual_seed(0)
    batch = Batch(torch.rand(n, size, generator=g), torch.arange(n) % 3, torch.arange(n))
    return remember(batch, torch.randn(n, 3, generator=g), task=0)


def store_of(folder: Path, memory: Memory | None = None, **options: Any) -> Path:
    with open_store(folder, "a") as store:
        store.append(items_of() if memory is None else memory, **options)
    return folder


# ------------------------------------------------------------------------------- looking


def test_the_gallery_sorts_filters_and_pages(page: Client, run: Path) -> None:
    every = page.get("/api/memory?limit=100").json
    assert every["total"] == 40
    assert [i["item"] for i in every["items"]] == list(range(40, 0, -1))
    for name in ("lambda", "residual"):
        values = [i["scores"][name] for i in page.get(f"/api/memory?sort={name}").json["items"]]
        assert values == sorted(values, reverse=True)
        up = page.get(f"/api/memory?sort={name}&ascending=true&limit=40").json["items"]
        assert [i["scores"][name] for i in up] == sorted(values)
    of_task = page.get("/api/memory?task=2&limit=100").json
    assert of_task["total"] == 8
    assert {i["task"] for i in of_task["items"]} == {2}
    of_class = page.get("/api/memory?label=3&skip=1&limit=2").json
    assert of_class["total"] == 4
    assert [i["label"] for i in of_class["items"]] == [3, 3]
    id = every["items"][0]["id"]
    assert id in [i["id"] for i in page.get(f"/api/memory?text={id}").json["items"]]
    first = page.get("/memory?sort=lambda&task=2")
    assert first.status == 200
    assert first.text.count('name="items"') == 8
    assert "page 1 of 1" in first.words
    assert "No item is like that" in page.get("/memory?text=zzz").words
    assert page.get("/memory?page=99&sort=newest").status == 200


def test_the_gallery_shows_what_came_with_one_import(tmp_path: Path) -> None:
    place = store_of(tmp_path / "store", message="imported from runs/a")
    store_of(place, items_of(4), message="imported from <i>")
    with served(workspace(place)) as page:
        shown = page.get("/memory")
        assert "imported from runs/a (1)" in shown.words
        assert "<i>" not in shown.text
        second = page.get("/memory?since=2")
        assert second.text.count('name="items"') == 4
        assert "4 fit the filter" in second.words
        assert page.get("/api/memory?since=1").json["total"] == 6
        assert page.get("/api/memory?since=3").json["total"] == 0
        assert page.get("/memory?since=x").status == 422


def test_without_a_place_the_newest_run_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["ui"]) == 2
    assert "there is no run in runs/" in capsys.readouterr().err
    for age, name in enumerate(("newest", "older", "no-run")):
        folder = Path("runs", name)
        folder.mkdir(parents=True)
        if name != "no-run":
            (folder / "config.json").write_text("{}")
            os.utime(folder / "config.json", (10_000 - age, 10_000 - age))
    assert newest() == Path("runs/newest")


def test_scores_are_those_of_the_memory(run: Path) -> None:
    memory = prior_in(learner_file(run)).memory
    assert memory is not None
    with workspace(run).open() as store:
        known = index.build(store)
    f = Categorical().mask(memory.reference, memory.mask)
    wanted = Categorical().hessian_trace(f).double().numpy()
    order = np.argsort(known.number)
    np.testing.assert_allclose(known.scores["lambda"][order], wanted, rtol=1e-6)
    np.testing.assert_array_equal(known.label[order], memory.labels.numpy())


def test_an_item_and_its_picture(page: Client) -> None:
    shown = page.get("/items/7")
    assert "Stands for" in shown.words
    assert "What the model believed" in shown.words
    picture = page.get("/items/7/picture?size=large")
    assert picture.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(picture.body)).size == (384, 384)
    assert page.get("/items/7/picture").headers["cache-control"] == "no-store"
    assert page.get("/items/999").status == 404
    assert page.get("/items/seven").status == 422
    assert page.get("/items/7/picture?size=huge").status == 422


def test_learning_and_comparison(page: Client, run: Path) -> None:
    shown = page.get("/learning")
    assert shown.text.count("<svg") == 2
    accuracy = json.loads((run / "result.json").read_text())["accuracy"]["mean"]
    assert f"{100 * accuracy:.2f} %" in shown.words
    shutil.copytree(run, run.with_name("other"))
    compared = page.get("/compare").words
    assert "other kprior split-digits 1" in compared


def test_a_run_that_goes_on(run: Path) -> None:
    (run / "result.json").unlink()
    (run / "seed-0" / "accuracy.json").unlink()
    with served(workspace(run)) as page:
        now = page.get("/learning/now")
        assert 'data-state="running"' in now.text
        assert "5 tasks learned" in now.words
        assert "--resume" in now.words


def test_a_run_that_has_learned_nothing_yet(run: Path) -> None:
    shutil.rmtree(run / "seed-0")
    (run / "result.json").unlink()
    (run / "log.txt").write_text("")
    with served(workspace(run)) as page:
        assert page.get("/memory").status == 404
        assert "No task is learned yet" in page.get("/learning").words


# ------------------------------------------------------------------------------- who may ask


def test_without_the_token_nothing_is_told(page: Client) -> None:
    stranger = Client(page.port)
    for path in ("/", "/memory", "/items/1/picture", "/api/memory", "/static/app.js"):
        found = stranger.get(path)
        assert found.status == 403
        assert "token" in found.text
    assert stranger.get("/?token=wrong").status == 403
    assert not stranger.cookie
    assert stranger.get(f"/memory?token={TOKEN}&task=2").text.count('name="items"') == 8
    assert stranger.cookie.endswith(TOKEN)


def test_another_name_for_this_machine_is_refused(page: Client) -> None:
    assert page.get("/memory", Host="evil.example").status == 421
    assert page.get(f"/?token={TOKEN}", Host=f"evil.example:{page.port}").status == 421


@pytest.mark.parametrize("origin", ["http://evil.example", "null", ""])
def test_another_page_cannot_change_anything(page: Client, origin: str) -> None:
    before = page.get("/api/memory").json
    asked = page.post("/changes/drop", [("items", 1), ("version", 1)], Origin=origin)
    assert asked.status == 403
    assert page.get("/api/memory").json == before


@pytest.mark.parametrize("path", ["/changes/drop", "/changes/forget", "/api/drop"])
def test_no_get_changes_anything(page: Client, path: str) -> None:
    before = page.get("/api/memory").json
    assert page.get(f"{path}?items=1&version=1&sure=forget").status == 405
    assert page.get("/api/memory").json == before


def test_every_answer_forbids_what_is_not_from_here(page: Client) -> None:
    for path in ("/memory", "/items/1/picture", "/api/memory", "/nothing", "/static/app.css"):
        headers = page.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert headers["x-content-type-options"] == "nosniff"
    for path in ("/memory", "/learning", "/changes", "/items/1", "/compare"):
        text = page.get(path).text
        assert "http://" not in text.replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert "<script>" not in text


def test_as_many_as_may_be_chosen_are_dropped(tmp_path: Path) -> None:
    from lifelong.app.server import MOST_CHOSEN

    place = store_of(tmp_path / "store", items_of(MOST_CHOSEN + 2))
    with served(workspace(place)) as page:
        chosen = [("items", n) for n in range(1, MOST_CHOSEN + 1)]
        more = [*chosen, ("items", MOST_CHOSEN + 1), ("version", 1)]
        assert page.post("/changes/drop", more).status == 422
        assert page.post("/changes/drop", [*chosen, ("version", 1)]).status == 200
        assert page.get("/api/memory").json["total"] == 2


def test_too_much_at_once_is_refused(page: Client) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded", "Origin": page.origin}
    found = page.send("POST", "/changes/drop", b"", {**form, "Content-Length": str(10**9)})
    assert found.status == 413


def test_hostile_text_is_inert(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    place = store_of(tmp_path / "store", ids=[f"{bad}{k}" for k in range(6)], notes=[bad] * 6)
    with served(workspace(place)) as page:
        for path in ("/memory", "/items/1", "/forget?items=1", f"/memory?text={bad[1:7]}"):
            found = page.get(path)
            assert found.status == 200
            assert bad not in found.text
        assert "&lt;script&gt;" in page.get("/items/1").text


def item(kind: Any, shape: tuple[int, ...] = ()) -> Item:
    return Item(1, "x", 0, 0, 0, None, 1.0, 0.0, {}, "", kind, shape, 1, 1, "")


def encoded(size: tuple[int, int], kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size).save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "be read"),
        (encoded((9, 9))[:40], "be read"),
        (b"", "be read"),
        (encoded((7000, 7000)), "too many to show"),
    ],
)
def test_images_that_cannot_be_shown(raw: bytes, why: str) -> None:
    with pytest.raises(NoPictureError, match=why):
        thumbnails.picture(raw, item("image"), 96)


@pytest.mark.parametrize(
    "x", [torch.zeros(5), torch.zeros(2, 3, 4, 5), torch.full((4, 4), torch.nan), torch.zeros(0)]
)
def test_numbers_that_are_no_picture(x: torch.Tensor) -> None:
    with pytest.raises(NoPictureError):
        thumbnails.picture(x, item("tensor", tuple(x.shape)), 96)


@pytest.mark.parametrize("shape", [(1, 8, 6), (3, 8, 6), (8, 6), (64,)])
def test_pictures_of_numbers(shape: tuple[int, ...]) -> None:
    made = thumbnails.picture(torch.rand(shape), item("tensor", shape), 96)
    assert max(Image.open(io.BytesIO(made)).size) == 96


def test_a_photo_is_made_smaller_and_comes_as_png() -> None:
    made = thumbnails.picture(encoded((300, 150), "JPEG"), item("image"), 96)
    picture = Image.open(io.BytesIO(made))
    assert (picture.format, picture.size) == ("PNG", (96, 48))


def test_rows_and_texts_are_shown_as_words() -> None:
    assert thumbnails.words(torch.tensor([1.5, 2.0]), item("tensor")) == "1.5, 2"
    assert thumbnails.words("a\x1b[2Jb", item("text")) == "a\N{REPLACEMENT CHARACTER}[2Jb"
    assert thumbnails.words({"b": torch.ones(1), "a": torch.zeros(1)}, item("dict")) == "a: 0\nb: 1"
    assert thumbnails.words("x" * 9_000, item("text")).endswith(" …")


# ------------------------------------------------------------------------------- changing


def test_a_drop_is_undone(page: Client) -> None:
    version = page.get("/memory").value("version")
    shown = page.post("/changes/drop", [("items", 1), ("items", 2), ("version", version)])
    assert shown.status == 200
    assert page.get("/api/memory").json["total"] == 38
    assert page.get("/items/1").status == 404
    page.post("/changes/restore", [("to", 1), ("version", shown.value("version"))])
    assert page.get("/api/memory").json["total"] == 40
    assert page.get("/items/1").status == 200


def test_two_tabs_at_once_lose_nothing(page: Client) -> None:
    version = page.get("/memory").value("version")
    page.post("/changes/drop", [("items", 1), ("version", version)])
    before = page.get("/api/memory").json
    second = [("items", 2), ("version", version)]
    for path, more in (
        ("/changes/drop", []),
        ("/changes/forget", [("sure", "forget")]),
        ("/changes/restore", [("to", 1)]),
    ):
        found = page.post(path, [*second, *more])
        assert found.status == 409
        assert "changed since this page was loaded" in found.words
    wanted = {"items": [2], "version": int(version)}
    assert page.post_json("/api/drop", wanted).status == 409
    assert page.get("/api/memory").json == before
    done = page.post_json("/api/drop", {"items": [2], "version": before["version"]})
    assert done.json == {"version": before["version"] + 1}


def test_forgetting_says_so_first_and_is_final(page: Client, run: Path) -> None:
    asked = page.get("/forget?items=3&items=30")
    assert "This is final" in asked.words
    fields = [("items", 3), ("items", 30), ("version", asked.value("version"))]
    assert page.post("/changes/forget", fields).status == 422
    assert page.get("/api/memory").json["total"] == 40
    page.post("/changes/forget", [*fields, ("sure", "forget"), ("note", "the patient asked")])
    job = page.job()
    assert job["state"] == "done", job
    assert page.get("/api/memory").json["total"] == 38
    assert page.get("/items/3").status == 404
    shown = page.get("/jobs/1")
    assert shown.words.count("Accuracy on the tests") == 2  # of two tasks
    assert "no sign that it remembers it" in shown.words
    for part in (0, 1):
        content = page.get(f"/jobs/1/certificate/{part}?as_json=true").json
        assert "the patient asked" in json.dumps(content)
        sheet = page.get(f"/jobs/1/certificate/{part}")
        assert sheet.status == 200
        assert "from memory 1 example given again" in " ".join(sheet.words.split())
        assert "AUC is the chance" not in sheet.words  # nothing was attacked
    assert page.get("/jobs/1/certificate/2").status == 404
    memory = prior_in(learner_file(run)).memory
    assert memory is not None
    assert len(memory) == 38  # of the run that the page was opened with, too
    after = page.get("/changes")
    assert "stay closed" in after.words
    old = page.post("/changes/restore", [("to", 1), ("version", after.value("version"))])
    assert old.status == 409
    assert "had learned what has been forgotten since" in old.words
    assert not (workspace(run).place / "1-0").exists()


def test_another_regulariser_and_back(page: Client, run: Path) -> None:
    place = workspace(run)
    fields = [("precision", 3.0), ("version", page.get("/changes").value("version"))]
    page.post("/changes/regularise", fields)
    job = page.job()
    assert job["state"] == "done", job
    assert place.current == workspace(run).place / "1-0"
    assert "run, change 1" in page.get("/compare").words
    back = [("to", 1), ("version", page.get("/changes").value("version"))]
    assert page.post("/changes/restore", back).status == 200
    assert place.current == run
    wrong = [("precision", "nan"), ("version", page.get("/changes").value("version"))]
    assert page.post("/changes/regularise", wrong).status == 422


def test_added_examples_are_learned(page: Client, tmp_path: Path) -> None:
    out = io.BytesIO()
    g = np.random.default_rng(0)
    inputs = g.random((10, 1, 8, 8), dtype=np.float32)
    stored = page.get("/api/items/1").json["shape"]
    np.savez(out, inputs=inputs.reshape(10, *stored), labels=np.arange(10) % 2)
    version = page.get("/changes").value("version")
    assert page.upload("/changes/add", {"version": version}, "x.exe", b"MZ").status == 422
    page.upload("/changes/add", {"version": version}, "../../more.npz", out.getvalue())
    job = page.job()
    assert job["state"] == "done", job
    assert not list((tmp_path / "run.ui" / "seed-0").glob("upload-*"))
    broken = {"version": page.get("/changes").value("version")}
    page.upload("/changes/add", broken, "broken.npz", b"not a file of numbers")
    assert page.job(2)["state"] == "failed"
    assert "Failed" in page.get("/jobs/2").words


def test_no_upload_lies_on(page: Client, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload that failed can be tried again as long as it is the newest change; no longer."""
    folder = workspace(run).place

    def uploads() -> int:
        return len(list(folder.glob("upload-*")))

    def refused(*args: Any, **options: Any) -> Any:
        raise OSError("no space left on device")

    assert page.upload("/changes/add", {"version": "99"}, "a.npz", b"not yet").status == 409
    assert uploads() == 0
    page.upload("/changes/add", {"version": "1"}, "a.npz", b"not a file of numbers")
    assert page.job()["state"] == "failed"
    assert uploads() == 1
    assert page.post("/jobs/1/again", []).status == 200
    assert page.job()["state"] == "failed"
    assert uploads() == 1
    page.post("/changes/forget", [("items", 3), ("sure", "forget"), ("version", 1)])
    assert page.job(2)["state"] == "done"
    assert uploads() == 0
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", refused)
        answer = page.upload("/changes/add", {"version": "3"}, "a.npz", b"does not fit")
        assert answer.status == 500
    assert uploads() == 0


def test_uploads_of_a_server_that_was_killed_go(run: Path) -> None:
    place = workspace(run)
    for name in ("upload-1.npz", "upload-2.npz"):
        (place.place / name).write_bytes(b"not a file of numbers")
    journal = Jobs(place)
    journal.close()
    assert not list(place.place.glob("upload-*"))
    (place.place / "upload-2.npz").write_bytes(b"not a file of numbers")
    journal._keep(Job(1, "add", {"file": "upload-2.npz"}))
    for _ in range(2):  # the second one could be asked to try again
        journal = Jobs(place)
        journal.close()
        assert journal.get(1).state == "failed"
        assert [path.name for path in place.place.glob("upload-*")] == ["upload-2.npz"]


@pytest.mark.parametrize("stop", ["before", "adapted", "taken", "erased"])
def test_a_server_that_is_killed_goes_on(
    run: Path, stop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is killed, the job ends as if nothing had happened."""

    class Killed(BaseException):
        pass

    def kill(*args: Any, **options: Any) -> Any:
        raise Killed

    place = workspace(run)
    with place.open() as store:
        chosen = [store.items(after=n - 1, limit=1)[0] for n in (3, 30)]
        seen = store.version
    given = {"items": [3, 30], "tasks": jobs.by_task(chosen), "note": ""}
    asked = replace(Job(1, "forget", given), state="running")
    where = {"before": "adapt", "adapted": "save", "taken": "_erase", "erased": "_clear"}[stop]
    journal = Jobs(place)
    journal.close()
    journal._keep(asked)
    with monkeypatch.context() as patch:
        patch.setattr(Workspace if where == "save" else jobs, where, kill)
        with pytest.raises(Killed):
            jobs.KINDS["forget"](journal, asked)
    again = Jobs(place)
    again.close()  # lets it end
    done = again.get(1)
    assert done.state == "done", done.said
    assert len((done.result or {})["changes"]) == 2
    with place.open() as store:
        assert len(store) == 38
        assert store.version > seen
    assert len(place.steps) == 1
    assert place.current is not None
    assert place.current.is_dir()


def test_what_has_failed_is_tried_again_from_where_it_failed(
    page: Client, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network has forgotten, the disk is full, the store still has it: nothing else reaches
    an item that is not of today any more."""

    def full(*args: Any, **options: Any) -> Any:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "_erase", full)
        version = page.get("/memory").value("version")
        page.post("/changes/forget", [("items", 3), ("sure", "forget"), ("version", version)])
        assert page.job()["state"] == "failed"
    shown = page.get("/jobs/1")
    assert "no space left on device" in shown.words
    assert "Try again" in shown.words
    with workspace(run).open() as store:
        assert store.count(version=1) == 40
    assert page.post("/jobs/1/again", []).status == 200
    assert page.job()["state"] == "done"
    with workspace(run).open() as store:
        assert store.count(version=1) == 39
    assert len(workspace(run).steps) == 1
    again = page.post("/jobs/1/again", [])
    assert again.status == 409
    assert "where it has failed" in again.words
    assert page.post("/jobs/7/again", []).status == 404


def test_one_change_at_a_time(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = workspace(run)
    held = Jobs(place)
    held.close()
    held._keep(replace(Job(1, "regularise", {"precision": 1.0}), state="running"))
    with pytest.raises(jobs.ChangedMeanwhileError, match="another change is being made"):
        held.ask("regularise", {"precision": 2.0}, 1)


# ------------------------------------------------------------------------------- whose files


def waiting_forget(place: Workspace) -> None:
    """A server that was asked to forget items 1 and 2, and killed before it did."""
    journal = Jobs(place)
    journal.close()
    journal._keep(Job(1, "forget", {"items": [1, 2], "tasks": {"0": [0, 1]}, "note": ""}))


def test_each_address_has_a_journal_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, other = (f"file://{tmp_path}/{name}" for name in ("one", "other"))
    for address in (one, other):
        with open_store(address) as store:
            store.append(items_of())
    waiting_forget(workspace(one))
    shown = Jobs(workspace(other))
    shown.close()
    assert shown.all == {}
    with open_store(other, "r") as store:
        assert len(store) == 6
    again = Jobs(workspace(one + "/"))  # the same place, spelled otherwise
    again.close()
    assert again.get(1).state == "done"
    with open_store(one, "r") as store:
        assert len(store) == 4


def test_a_store_made_anew_does_not_get_the_old_ones_journal(tmp_path: Path) -> None:
    place = store_of(tmp_path / "store")
    waiting_forget(workspace(place))
    shutil.copytree(place, tmp_path / "copy")
    shutil.rmtree(place)
    store_of(place)
    with pytest.raises(UsageError, match=r"store\.ui has what the page keeps of another store"):
        Jobs(workspace(place))
    with open_store(place, "r") as store:
        assert len(store) == 6
    shutil.rmtree(place)
    shutil.move(tmp_path / "copy", place)  # a copy is the store that it is of
    again = Jobs(workspace(place))
    again.close()
    assert again.get(1).state == "done"


def places_in(memory: Memory | None) -> set[tuple[int, int]]:
    assert memory is not None
    return set(zip(memory.task.tolist(), memory.origin.tolist(), strict=True))


def test_each_seed_has_a_memory_of_its_own(tmp_path: Path) -> None:
    config = RunConfig(
        Experiment(benchmark="two-moons", prior="kprior", memory=4, seeds=2), Overrides(epochs=1)
    )
    plan = runs.prepare(config)
    runs.create(plan, tmp_path / "run")
    runs.execute(plan, tmp_path / "run")
    wanted = []
    for seed in (0, 1):
        found = workspace(tmp_path / "run", seed)
        adapted(found, 0.1 * (seed + 1))
        assert found.current == found.place / "1-0"
        with found.open() as store:
            shown = places_in(store.memory())
        wanted.append(places_in(prior_in(learner_file(tmp_path / "run", seed)).memory))
        assert shown == wanted[-1]
    assert wanted[0] != wanted[1]
    with served(workspace(tmp_path / "run", 0)) as page:
        version = page.get("/memory").value("version")
        page.post("/changes/forget", [("items", 1), ("sure", "forget"), ("version", version)])
        said = page.job(2)["said"]
    assert said[-2].endswith(f"forget them there too (lifelong ui {tmp_path / 'run'} --seed 1)")


def adapted(place: Workspace, precision: float, number: int = 1) -> Job:
    """Once it is over."""
    journal = Jobs(place)
    with place.open() as store:
        asked = journal.ask("regularise", {"precision": precision}, store.version)
    journal.close()
    assert asked.number == number
    assert journal.get(number).state == "done", journal.get(number).said
    return journal.get(number)


def test_both_folders_can_be_moved(run: Path, tmp_path: Path) -> None:
    adapted(workspace(run), 0.1)
    measures.measure(workspace(run).place, run, None, lambda line: None)
    (tmp_path / "elsewhere").mkdir()
    for folder in (run, run.with_name("run.ui")):
        shutil.move(folder, tmp_path / "elsewhere" / folder.name)
    moved = workspace(tmp_path / "elsewhere" / "run")
    assert moved.current == moved.place / "1-0"
    with moved.open() as store:
        assert store.version == 2  # nothing was brought in once more
    assert measures.load(moved.place, moved.run, None) is not None
    adapted(moved, 0.2, 2)
    assert moved.current == moved.place / "2-0"


def test_a_run_made_anew_does_not_get_the_old_ones_memory(run: Path) -> None:
    adapted(workspace(run), 0.1)
    begun, *lines = (run / "log.txt").read_text().splitlines(keepends=True)
    (run / "log.txt").write_text("".join([begun, *lines, "2030-01-01T00:00:00+00:00 later\n"]))
    workspace(run)  # as before
    before = sorted(run.with_name("run.ui").rglob("*"))
    (run / "log.txt").write_text("2030" + begun[4:] + "".join(lines))
    with pytest.raises(UsageError, match="of another run, which lay at the same place before"):
        workspace(run)
    assert sorted(run.with_name("run.ui").rglob("*")) == before


def test_a_second_server_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two journals would overwrite each other, and both say "done" of what one of them undid."""
    with served(workspace(run)) as page:
        with pytest.raises(UsageError, match=r"run is shown already.*\.lock names its process"):
            Jobs(workspace(run))
        assert main(["ui", str(run)]) == 2
        assert "open the address that the other lifelong ui has printed" in capsys.readouterr().err
        page.post("/changes/regularise", [("precision", 3.0), ("version", 1)])
        assert page.job()["state"] == "done"
    with served(workspace(run)) as page:  # once the first has ended
        assert page.job()["state"] == "done"


def test_where_nobody_can_write_there_is_still_something_to_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any) -> Any:
        raise PermissionError

    monkeypatch.setattr(jobs, "claimed", refused)
    place = workspace(store_of(tmp_path / "store"))
    with served(place) as page:
        assert page.get("/api/memory").json["total"] == 6
    assert not place.place.exists()


def test_what_is_dropped_stays_dropped_over_changes(run: Path) -> None:
    """Until the version before the drop is made today's, over any number of changes between."""
    place = workspace(run)
    with place.open("a") as store:
        every = places_in(store.memory())
        gone = {(i.task, i.origin) for i in store.items(limit=3)}
        store.drop([1, 2, 3])
    for number in (1, 2):
        said = adapted(place, 0.1 * number, number).said
        assert "3 that were dropped before stay out of the memory" in said[0]
        with place.open() as store:
            assert places_in(store.memory()) == every - gone
            assert places_in(store.load_prior().memory) == every - gone
            assert store.history()[-1].message.endswith("without 3 dropped before")
    with served(place) as page:
        page.post("/changes/drop", [("items", 9), ("version", 4)])
        assert page.post("/changes/restore", [("to", 3), ("version", 5)]).status == 200
        assert place.current == place.place / "1-0"
    adapted(place, 0.3, 3)  # the ninth was had back, the three were not
    with place.open() as store:
        assert places_in(store.memory()) == every - gone
    with served(place) as page:
        assert page.post("/changes/restore", [("to", 1), ("version", 7)]).status == 200
    assert adapted(place, 0.4, 4).said == ("fitted again",)
    with place.open() as store:
        assert places_in(store.memory()) == every


def test_what_is_dropped_stays_dropped_when_the_run_has_gone_on(run: Path) -> None:
    place = workspace(run)
    with place.open("a") as store:
        store.drop([1, 2, 3])
        left = places_in(store.memory())
    for time_ns in (10**18, 2 * 10**18):  # of another checkpoint, twice
        os.utime(learner_file(run), ns=(time_ns, time_ns))
        with workspace(run).open("a") as store:
            assert places_in(store.memory()) == left
            version = store.version
    assert version == 4
    with place.open("a") as store:
        store.compact()
    os.utime(learner_file(run), ns=(3 * 10**18, 3 * 10**18))
    with workspace(run).open() as store:
        assert places_in(store.memory()) == left


# ------------------------------------------------------------------------------- measuring, labels


def measured(page: Client, number: int = 1) -> Any:
    page.post("/measure", [])
    job = page.job(number)
    assert job["state"] == "done", job
    return job


def test_measuring_tells_calibration_fidelity_and_scores(page: Client, run: Path) -> None:
    assert "Measure them" in page.get("/learning").words
    assert page.get("/memory?sort=sensitivity").status == 404
    measured(page)
    shown = page.get("/learning")
    assert shown.text.count("<svg") == 2 + 2 + 5  # and the legend of the fidelity
    assert "Expected calibration error" in shown.words
    found = measures.load(workspace(run).place, run, None)
    assert found is not None
    learner, past = restored(run)
    for row, test in zip(found.calibration, past.tests, strict=True):
        assert test is not None
        truth = evaluate(learner.model, test, Categorical())
        assert (row["accuracy"], row["examples"]) == (truth.accuracy, len(test))
        assert row["nll"] == pytest.approx(truth.nll, rel=1e-5)
    tests = sum(row["examples"] for row in found.calibration)
    assert sum(found.bins["count"]) == tests  # type: ignore[arg-type]
    assert found.fidelity[0]["sizes"][-1] == len(past.train[0])
    assert found.fidelity[0]["kept"] == 8
    # In the gallery, as lifelong.sensitivity has them under the same posterior.
    values = [
        i["scores"]["sensitivity"] for i in page.get("/api/memory?sort=sensitivity").json["items"]
    ]
    assert values == sorted(values, reverse=True)
    assert len(values) == 40
    network = measures.Network.of(run, None)
    one = network.memory[slice(0, 1)]
    direct = sensitivities(
        network.learner.model, Examples(one.inputs, one.labels, head=one.heads[int(one.head)]),
        Categorical(), network.curvature, network.precision,
    )  # fmt: skip
    key = measures.key_of(int(one.task), int(one.origin))
    assert found.scores[key]["sensitivity"] == pytest.approx(float(direct.score()), rel=1e-4)
    leverage = float((direct.hessian[0] @ direct.covariance[0]).trace())
    assert found.scores[key]["leverage"] == pytest.approx(leverage, rel=1e-4)
    assert leverage > 0


def test_neighbours_are_those_whose_outputs_move_together(page: Client, run: Path) -> None:
    assert "has to be measured first" in page.get("/items/5/neighbours").words
    measured(page)
    shown = page.get("/items/5/neighbours")
    assert shown.text.count("<li>") == 7  # the others of its task
    found = measures.load(workspace(run).place, run, None)
    assert found is not None
    network = measures.Network.of(run, None)
    key = next(iter(found.scores))
    near = measures.neighbours(network, found.scores, key)
    assert [rho for _, rho in near] == sorted((rho for _, rho in near), reverse=True)
    assert all(-1 - 1e-4 < rho < 1 + 1e-4 for _, rho in near)
    other = near[0][0]
    back = dict(measures.neighbours(network, found.scores, other))
    assert back[key] == pytest.approx(near[0][1], rel=1e-3)  # symmetric
    with pytest.raises(KeyError):
        measures.neighbours(network, found.scores, "9/99999")
    assert page.get("/items/999/neighbours").status == 404


def test_labels_are_corrected_and_had_back(page: Client, run: Path) -> None:
    shown = page.get("/review")
    assert "Measure it" in shown.words
    first = page.get("/api/memory?sort=residual&limit=1").json["items"][0]
    other = first["label"] + (1 if first["label"] % 2 == 0 else -1)  # heads are of two digits
    field, version = f"to-{first['item']}", shown.value("version")
    for wrong, why in (
        ([], "choose the right label"),
        ([(field, "")], "choose the right label"),
        ([(field, first["label"])], "the labels that they have"),
        ([(field, (first["label"] + 4) % 10)], "none of the classes"),
        ([(field, "x")], "no number"),
        ([("to-99999", 1)], "no item 99999"),
        ([("to-x", 1)], "no number"),
    ):
        answer = page.post("/changes/relabel", [("version", version), *wrong])
        assert answer.status in (404, 422), wrong
        assert why in answer.words
    assert page.post("/changes/relabel", [(field, other)]).status == 422  # without a version
    page.post("/changes/relabel", [("version", version), (field, other)])
    job = page.job()
    assert job["state"] == "done", job
    assert page.get(f"/api/items/{first['item']}").json["label"] == other
    assert "Of the 1 relabelled" in page.get("/jobs/1").words
    assert page.get("/api/memory").json["total"] == 40
    stale = page.post("/changes/relabel", [("version", version), (field, first["label"])])
    assert stale.status == 409
    back = [("to", 1), ("version", page.get("/changes").value("version"))]
    assert page.post("/changes/restore", back).status == 200
    assert page.get(f"/api/items/{first['item']}").json["label"] == first["label"]
    assert workspace(run).current == run


def test_a_relabel_that_was_killed_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def kill(*args: Any, **options: Any) -> Any:
        raise Killed

    place = workspace(run)
    with place.open() as store:
        item = store.items(limit=1)[0]
    assert isinstance(item.label, int)
    new = item.label + (1 if item.label % 2 == 0 else -1)
    given = {"labels": {str(item.task): {str(item.origin): new}}}
    asked = replace(Job(1, "relabel", given), state="running")
    journal = Jobs(place)
    journal.close()
    journal._keep(asked)
    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "save", kill)
        with pytest.raises(Killed):
            jobs.KINDS["relabel"](journal, asked)
    again = Jobs(place)
    again.close()
    assert again.get(1).state == "done", again.get(1).said
    jobs.KINDS["relabel"](again, again.get(1))  # once more changes nothing
    assert len(place.steps) == 1
    with place.open() as store:
        assert store.items(limit=1)[0].label == new


def test_what_was_measured_goes_with_what_is_forgotten(page: Client, run: Path) -> None:
    measured(page)
    file = workspace(run).place / measures.FILE
    assert file.is_file()
    version = page.get("/memory").value("version")
    page.post("/changes/forget", [("items", 3), ("sure", "forget"), ("version", version)])
    assert page.job(2)["state"] == "done"
    assert not file.exists()
    assert "Measure them" in page.get("/learning").words


def test_a_prior_without_a_curve_says_why(tmp_path: Path) -> None:
    config = RunConfig(
        Experiment(benchmark="two-moons", prior="fromp", memory=8), Overrides(epochs=1)
    )
    plan = runs.prepare(config)
    runs.create(plan, tmp_path / "run")
    runs.execute(plan, tmp_path / "run")
    found = measures.measure(tmp_path / "ui", tmp_path / "run", None, lambda line: None)
    assert found.fidelity == []
    assert "couples its examples" in found.notes[0]
    assert found.scores
    assert found.calibration


def test_a_run_without_a_memory_is_calibrated(tmp_path: Path) -> None:
    config = RunConfig(Experiment(benchmark="two-moons", prior="online_ewc"), Overrides(epochs=1))
    plan = runs.prepare(config)
    runs.create(plan, tmp_path / "run")
    runs.execute(plan, tmp_path / "run")
    with served(workspace(tmp_path / "run")) as page:
        measured(page)
        shown = page.get("/learning").words
        assert "On the tests" in shown
        assert page.get("/review").words.count("Nothing is remembered") == 1


# ------------------------------------------------------------------------------- stop and go on


def test_stop_and_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = RunConfig(
        Experiment(benchmark="split-digits", prior="kprior", memory=8), Overrides(epochs=60)
    )
    plan = runs.prepare(config)
    runs.create(plan, folder)
    stopped: list[BaseException] = []

    def learn() -> None:
        try:
            runs.execute(plan, folder)
        except KeyboardInterrupt as error:
            stopped.append(error)

    with served(workspace(folder)) as page:
        assert "It does not go on now" in page.get("/learning").words
        assert page.post("/learning/stop", []).status == 422
        thread = threading.Thread(target=learn)
        thread.start()
        while not (folder / "seed-0" / "learner.safetensors").is_file():
            time.sleep(0.01)
        shown = page.get("/learning")
        assert "Stop after this epoch" in shown.words
        assert page.post("/learning/resume", []).status == 409
        assert page.post("/learning/stop", []).status == 200
        thread.join(60)
        assert isinstance(stopped[0], runs.StoppedError)
        assert not (folder / "result.json").exists()
        assert not runs.is_going_on(folder)
        assert page.post("/learning/resume", []).status == 200  # a process of its own
        end = time.monotonic() + 120
        while not (folder / "result.json").is_file():
            assert time.monotonic() < end, (workspace(folder).place / "resumed.log").read_text()
            time.sleep(0.1)
        assert not (folder / runs.STOP).exists()
        assert page.post("/learning/resume", []).status == 409


def test_a_run_that_goes_on_is_not_changed(page: Client, run: Path) -> None:
    """Its next checkpoint would bring back what was forgotten."""
    item = page.get("/api/items/3").json
    other = item["label"] + (1 if item["label"] % 2 == 0 else -1)
    before = learner_file(run).read_bytes()
    with runs.claimed(run):
        for path, fields in (
            ("/changes/forget", [("items", 3), ("sure", "forget")]),
            ("/changes/relabel", [("to-3", other)]),
            ("/changes/regularise", [("precision", 2.0)]),
        ):
            found = page.post(path, [*fields, ("version", 1)])
            assert found.status == 409, path
            assert "the run goes on" in found.words
        added = page.upload("/changes/add", {"version": "1"}, "more.npz", b"")
        assert added.status == 409
    assert page.get("/api/jobs/1").status == 404
    assert page.get("/api/memory").json["total"] == 40
    assert learner_file(run).read_bytes() == before


def test_while_examples_are_forgotten_the_run_does_not_go_on(
    page: Client, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "result.json").unlink()  # as if it had been stopped
    begun, go_on = threading.Event(), threading.Event()
    erase = jobs._erase

    def slowly(*args: Any) -> None:
        begun.set()
        assert go_on.wait(60)
        erase(*args)

    monkeypatch.setattr(jobs, "_erase", slowly)
    page.post("/changes/forget", [("items", 3), ("sure", "forget"), ("version", 1)])
    assert begun.wait(60)
    with pytest.raises(UsageError, match="another lifelong run"), runs.claimed(run):
        pass
    assert "It does not go on now" in page.get("/learning/now").words
    for path in ("/learning/resume", "/learning/stop"):
        assert page.post(path, []).status == 409
    go_on.set()
    assert page.job()["state"] == "done"
    with runs.claimed(run):
        pass


def test_the_time_that_is_left() -> None:
    def line(minute: int, said: str) -> str:
        return f"2026-01-01T10:{minute:02}:00+00:00 {said}"

    def learned_task(seed: int, task: int) -> str:
        return f"seed {seed}: task {task}, accuracy so far 0.5"

    start = line(0, "started: kprior on digits")
    assert learning._left([start], 5) is None
    assert learning._left([start, line(2, learned_task(0, 1))], 5) == 4 * 120
    halted = [start, line(2, learned_task(0, 1)), line(30, "seed 0: resumed after 1 tasks")]
    assert learning._left([*halted, line(31, learned_task(0, 2))], 5) == 3 * 60
    assert learning._left(["nonsense", *halted, line(31, learned_task(0, 2))], 2) == 0


# ------------------------------------------------------------------------------- a store alone


def test_a_store_alone(tmp_path: Path) -> None:
    place = store_of(tmp_path / "store", scores={"leverage": [5.0, 1, 4, 2, 6, 3]})
    with served(workspace(place)) as page:
        by_leverage = page.get("/api/memory?sort=leverage").json["items"]
        assert [i["item"] for i in by_leverage] == [5, 1, 3, 6, 4, 2]
        assert page.get("/learning").status == 404
        assert "Another regulariser" not in page.get("/changes").words
        wrong = [("precision", 1), ("version", 1)]
        assert page.post("/changes/regularise", wrong).status == 422
        version = page.get("/memory").value("version")
        fields = [("items", 2), ("version", version), ("sure", "forget")]
        page.post("/changes/forget", fields)
        assert page.job()["state"] == "done"
        assert page.get("/api/memory").json["total"] == 5
        with pytest.raises(ValueError, match="2"), open_store(place) as store:
            store.find([2])


def test_wrong_places_are_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for place, message in (("none", "there is no run"), ("empty", "neither a run nor a store")):
        with pytest.raises(UsageError, match=message):
            workspace(tmp_path / place)
        assert main(["ui", str(tmp_path / place)]) == 2
    shutil.copytree(run / "seed-0", run / "seed-1")
    with pytest.raises(UsageError, match="seeds 0, 1: say which"):
        workspace(run)
    assert workspace(run, 1).seed == 1
    assert main(["ui", str(run), "--port", "99999"]) == 2
    assert "from 0 to 65535" in capsys.readouterr().err


def test_what_is_opened_again_is_not_imported_again(run: Path) -> None:
    first = workspace(run)
    with first.open("a") as store:
        store.drop([1])
        version = store.version
    with workspace(run).open() as store:
        assert store.version == version
