"""What may happen to a store on disk: kills, readers, damage, hostile files; nothing is lost."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import store_trust
from benchmarks.store_trust import examples, holding, needles, pattern, prior_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lifelong import checkpoint
from lifelong.errors import (
    StoreBusyError,
    StoreDamagedError,
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
    StoreVersionError,
)
from lifelong.store import Where, codec, open_store
from lifelong.store import database as of_database
from lifelong.store import sqlite as of_sqlite
from lifelong.store.database import DATABASE, GUARD
from lifelong.store.files import overwrite

LOG = f"{DATABASE}-wal"


def in_child(call: Callable[[], Any]) -> str:
    """What ``call`` returns or raises, as text, in a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            try:
                said = f"returned {call()}"
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            os.write(write, said.encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as told:
        said = told.read()
    os.waitpid(child, 0)
    return said


def contents(folder: Path) -> Any:
    """Everything that a store says."""
    with open_store(folder, "r") as store:
        rows = [store.items(version=v) for v in range(store.history()[0].number, store.version + 1)]
        memory = store.memory() if len(store) else None
        tensors = [] if memory is None else [memory.inputs, memory.reference, memory.labels]
        raw = [t.numpy().tobytes() for t in tensors if isinstance(t, torch.Tensor)]
        try:
            prior = str(store.load_prior().state_dict())
        except StoreError:
            raise
        except ValueError:
            prior = ""
        tombs = [store.forgotten(f"0:{n}") for n in range(12)]
        return rows, raw, store.history(), prior, tombs


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """closed: a store with seven versions, a prior and a tombstone; killed: the same with three
    more commits that are in the log alone, as a kill leaves it.
    """
    place = tmp_path_factory.mktemp("templates")
    with open_store(place / "closed") as store:
        store.append(examples(list(range(1, 9))), message="first")
        store.save_prior(prior_of(store.memory(Where(label=1)), 1), message="prior")
        store.restore(1)
        store.append(examples([9, 10]), message="more")
        store.drop(["0:1"])
        store.forget(["0:10"])
        store.save_prior(prior_of(store.memory(), 2))
    shutil.copytree(place / "closed", place / "open")
    with open_store(place / "open") as store:
        for n in (20, 21, 22):
            store.append(examples([n, n + 10]), message=str(n))
        shutil.copytree(place / "open", place / "killed", ignore=shutil.ignore_patterns("*-shm"))
    assert (place / "killed" / LOG).stat().st_size > 0
    return place


@pytest.fixture
def folder(templates: Path, tmp_path: Path) -> Path:
    return shutil.copytree(templates / "closed", tmp_path / "store")


@pytest.fixture
def killed(templates: Path, tmp_path: Path) -> Path:
    return shutil.copytree(templates / "killed", tmp_path / "killed")


# --------------------------------------------------------------- the four trials


def test_twenty_kills_lose_nothing(tmp_path: Path) -> None:
    found = store_trust.kills(tmp_path / "store", 20, 0.04, seed=random.randrange(10**6))
    assert found["rounds"] == 20
    assert found["commits"] > 0


def test_readers_see_whole_transactions(tmp_path: Path) -> None:
    found = store_trust.readers(tmp_path / "store", 0.6)
    assert min(found["reads"]) > 0
    assert found["commits"] > 1


def test_what_was_forgotten_is_in_no_file(tmp_path: Path) -> None:
    found = store_trust.forgetting(tmp_path, 60, 13, seed=random.randrange(10**6))
    assert found["patterns of the kept found"] == 47 * 7


def test_no_copy_of_a_small_row_is_left_behind(tmp_path: Path) -> None:
    assert store_trust.churn(tmp_path / "store", 12)["forgotten"] > 0


def test_the_search_finds_what_was_only_deleted(tmp_path: Path) -> None:
    """The proof proves something: without erasing, the same search finds the bytes."""
    path = tmp_path / "plain.sqlite"
    con = sqlite3.connect(path)
    con.execute("PRAGMA secure_delete = OFF")
    con.execute("CREATE TABLE t (x BLOB)")
    con.execute("INSERT INTO t VALUES (?)", (pattern(1),))
    con.commit()
    con.execute("DELETE FROM t")
    con.commit()
    con.close()
    assert holding(tmp_path, needles(1)[:1])


def test_the_trials_run_from_the_command_line(tmp_path: Path) -> None:
    store_trust.main(["--out", str(tmp_path), "--smoke"])
    names = {"config.json", "log.txt", "result.json", "versions.json"}
    assert {p.name for p in tmp_path.iterdir()} == names


# ----------------------------------------------------------------- changed bytes


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize("name", [DATABASE, "prior"])
def test_a_flipped_byte_is_noticed_or_means_nothing(folder: Path, name: str, tmp_path) -> None:
    before, noticed = contents(folder), 0
    name = next(folder.glob("prior-*")).name if name == "prior" else name
    data = (folder / name).read_bytes()
    written = [i for i, byte in enumerate(data) if byte]
    rng = random.Random(0)
    places = (
        list(range(100)) + rng.sample(written, 80) if name == DATABASE else rng.sample(written, 40)
    )
    for i, at in enumerate(places):
        copy = tmp_path / f"copy-{i}"
        shutil.copytree(folder, copy)
        flip(copy / name, at)
        try:
            with open_store(copy, "r") as store:
                whole = store.verify().ok
            same = whole and contents(copy) == before
        except (StoreError, sqlite3.NotSupportedError):
            whole = False
        noticed += not whole
        assert not whole or same, f"byte {at} changed what is read, and nobody said so"
        shutil.rmtree(copy)
    assert noticed > len(places) / 4


def test_a_flipped_byte_is_an_error_where_it_is_read(folder: Path) -> None:
    with open_store(folder, "r") as store:
        raw = store.raw(2)
    data = (folder / DATABASE).read_bytes()
    flip(folder / DATABASE, data.index(raw.numpy().tobytes()) + 300)
    with open_store(folder) as store:
        for read in (
            store.memory,
            lambda: store.raw(2),
            lambda: store.batch([0]),
            store.load_prior,
        ):
            with pytest.raises(StoreDamagedError, match="not those that were written; restore"):
                read()
        assert len(store.memory([3])) == 1
        found = store.verify()
        assert ("item 2", "its input is not what was written") in [
            (f.place, f.problem) for f in found.findings
        ]
    flip(folder / DATABASE, data.index(raw.numpy().tobytes()) + 300)
    with open_store(folder) as store:
        assert store.verify().ok


def test_a_flipped_byte_in_the_log_loses_nothing(killed: Path, tmp_path: Path) -> None:
    with open_store(folder := shutil.copytree(killed, tmp_path / "whole"), "r") as store:
        assert store.version == 10
    before, log = contents(folder), (killed / LOG).read_bytes()
    written = [i for i, byte in enumerate(log) if byte]
    rng, noticed = random.Random(1), 0
    for i, at in enumerate([*range(32), *rng.sample(written, 25)]):
        copy = shutil.copytree(killed, tmp_path / f"copy-{i}")
        flip(copy / LOG, at)
        for _ in range(2):  # opening it does not make it worse
            try:
                with open_store(copy) as store:
                    assert store.version == 10
                    assert store.verify().ok
                assert contents(copy) == before
                break
            except StoreDamagedError as error:
                noticed += "version 10 was committed. Nothing was changed" in str(error)
        else:
            assert (copy / LOG).stat().st_size == len(log)
            flip(copy / LOG, at)  # the copy that the message asks for
            assert contents(copy) == before
        shutil.rmtree(copy)
    assert noticed > 30


@pytest.mark.parametrize("keep", [0, 31, 5000, 100_000])
def test_a_cut_or_missing_log_is_noticed(killed: Path, keep: int) -> None:
    whole = (killed / LOG).read_bytes()
    (killed / LOG).write_bytes(whole[:keep])
    for mode in ("r", "a"):
        with pytest.raises(
            StoreDamagedError, match=r"-wal is damaged or missing: .* remove memory"
        ):
            open_store(killed, mode)  # type: ignore[arg-type]
    (killed / GUARD).unlink()  # the way on that the message names
    with open_store(killed) as store:
        assert store.verify().ok
        assert 7 <= store.version < 10
        assert store.append(examples([30])) > 7


@pytest.mark.parametrize("keep", [0, 1, 50, 4096, 65_536, 200_000, -1])
def test_a_cut_database_is_noticed(folder: Path, keep: int) -> None:
    data = (folder / DATABASE).read_bytes()
    (folder / DATABASE).write_bytes(data[:keep])
    for mode in ("r", "a"):
        with pytest.raises(
            StoreDamagedError, match=r"estore (it|the file) from a\s+copy|not a store"
        ):
            open_store(folder, mode)  # type: ignore[arg-type]
    assert (folder / DATABASE).read_bytes() == data[:keep]
    (folder / DATABASE).write_bytes(data)
    assert contents(folder)[1]


def test_a_missing_database_is_not_made_anew(folder: Path) -> None:
    (folder / DATABASE).unlink()
    for mode in ("r", "a"):
        with pytest.raises(StoreDamagedError, match="is missing or empty, and the store had 7"):
            open_store(folder, mode)  # type: ignore[arg-type]


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_prior_is_told_and_the_memory_is_read(folder: Path, harm: str) -> None:
    path = next(p for p in folder.glob("prior-*"))
    data = path.read_bytes()
    if harm == "flip":
        flip(path, len(data) - 3)
    elif harm == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    with open_store(folder) as store:
        with pytest.raises(
            StoreDamagedError, match="the memory can be read|The memory can be read"
        ):
            store.load_prior()
        assert len(store.memory()) == 8
        assert [f.place for f in store.verify().findings if f.damage] == [path.name]
        if harm == "remove":
            with pytest.raises(StoreDamagedError, match="is missing; restore it from a copy"):
                store.forget(["0:2"])
            assert store.version == 7
        path.write_bytes(data)
        assert store.verify().ok
        store.load_prior()


def test_a_damaged_guard_is_told_and_written_again(folder: Path) -> None:
    flip(folder / GUARD, 0)
    with open_store(folder) as store:
        found = store.verify()
        assert [(f.place, f.damage) for f in found.findings] == [(GUARD, False)]
        store.append(examples([30]))
        assert store.verify().findings == ()


# ---------------------------------------------------------- kills between two steps


def dying(name: str, at: Any, *, after: bool = False) -> Callable[..., Any]:
    """A function that ends the process where ``name`` of ``at`` is called."""
    real = getattr(at, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if after:
            real(*args, **kwargs)
        os._exit(0)

    return call


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_between_a_prior_and_its_file_leaves_the_last_pair(
    folder: Path, after: bool
) -> None:
    before = contents(folder)

    def work() -> None:
        with open_store(folder) as store:
            checkpoint.write = dying("write", checkpoint, after=after)
            store.save_prior(prior_of(examples([2, 3]), 3))

    assert in_child(work) == ""
    assert contents(folder) == before
    assert len(list(folder.glob("prior-*"))) == 1 + after
    with open_store(folder) as store:
        store.append(examples([40]))
        assert store.verify().findings == ()
    assert len(list(folder.glob("prior-*"))) == 1


@pytest.mark.parametrize("step", ["_finish", "_cut_log", "_remove_orphans"])
def test_a_forget_that_was_killed_is_finished_by_the_next_writer(folder: Path, step: str) -> None:
    def work() -> None:
        with open_store(folder) as store:
            commits = store.version
            real = getattr(of_sqlite.SqliteStore, step)

            def once(self: Any, *args: Any) -> Any:
                committed = self._db.execute("SELECT max(number) FROM version").fetchone()[0]
                if committed > commits and not (step == "_remove_orphans" and not args):
                    os._exit(0)
                return real(self, *args)

            setattr(of_sqlite.SqliteStore, step, once)
            store.forget(["0:3"])

    assert in_child(work) == ""
    with open_store(folder, "r") as store:
        assert store.forgotten("0:3")
        assert store.verify().ok
        assert any("erasing was not finished" in f.problem for f in store.verify().findings)
    with open_store(folder) as store:
        assert store.verify().findings == ()
        assert not holding(folder, needles(3))
        assert holding(folder, needles(4))


def test_a_reader_of_an_old_version_holds_erasing_up_and_is_told_of(folder: Path) -> None:
    reader = open_store(folder, "r")
    with open_store(folder, timeout=0.05) as store:
        store.append(examples([50]))
        with reader._reading() as con:  # type: ignore[attr-defined]
            con.execute("SELECT max(number) FROM version").fetchone()
            with pytest.raises(StoreBusyError, match="keeps its bytes in .* out of every version"):
                store.forget(["0:50"])
            assert store.forgotten("0:50")
        reader.close()
        store.compact()
        assert store.verify().findings == ()
        assert not holding(folder, needles(50))


def test_an_overwritten_file_is_whole_at_every_moment(tmp_path: Path) -> None:
    path = tmp_path / "learner.safetensors"
    path.write_bytes(pattern(1))
    overwrite(path, pattern(2))
    assert path.read_bytes() == pattern(2)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    os.link(path, tmp_path / "other")
    overwrite(path, pattern(3))
    assert (tmp_path / "other").read_bytes() == pattern(2)  # another name's bytes are its own


# ------------------------------------------------------------ room, rights, writers


def test_a_full_disk_loses_nothing(folder: Path) -> None:
    before = contents(folder)

    def full(write: Callable[[Any], Any]) -> Callable[[], Any]:
        def work() -> Any:
            with open_store(folder) as store:
                limit = (folder / DATABASE).stat().st_size // 2
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                try:
                    return write(store)
                finally:
                    assert [v.number for v in store.history()][-1] == 7

        return work

    big = examples(list(range(100, 140)), 50_000)
    for write in (
        lambda s: s.append(big),
        lambda s: s.save_prior(prior_of(big, 5)),
        lambda s: s.compact(),
    ):
        said = in_child(full(write))
        assert said.startswith("StoreFullError: "), said
        assert "Nothing was changed; free some space" in said
        assert contents(folder) == before
    with open_store(folder) as store:
        store._db.execute(
            f"PRAGMA max_page_count = {store._db.execute('PRAGMA page_count').fetchone()[0] + 1}"
        )  # type: ignore[attr-defined]
        with pytest.raises(StoreFullError, match="the disk or a quota is full"):
            store.append(big)
        assert store.verify().findings == ()
    assert contents(folder) == before
    with open_store(folder) as store:
        store.append(big)


def test_a_full_disk_while_a_prior_is_written(folder: Path, monkeypatch) -> None:
    before = contents(folder)

    def write(path: Any, data: bytes) -> None:
        raise OSError(28, "no space left")

    with open_store(folder) as store:
        monkeypatch.setattr(checkpoint, "write", write)
        with pytest.raises(StoreFullError, match="no space left"):
            store.save_prior(prior_of(examples([3, 60]), 5))
    assert contents(folder) == before


@pytest.fixture
def open_folder(folder: Path) -> Iterator[Path]:
    """The store where other users can reach it."""
    place = Path(tempfile.mkdtemp())
    shutil.copytree(folder, place / "store")
    place.chmod(0o755)
    yield place / "store"
    for path in (place, place / "store"):
        path.chmod(0o755)
    shutil.rmtree(place)


@pytest.mark.parametrize("log", [False, True])
def test_a_read_only_folder_can_be_read(
    open_folder: Path, killed: Path, log: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if log:
        shutil.rmtree(open_folder)
        shutil.copytree(killed, open_folder)
        with open_store(open_folder, "r"):  # makes the -shm, which then cannot be made
            for path in (killed, open_folder):
                assert (path / LOG).exists()
            shutil.copy(open_folder / f"{DATABASE}-shm", killed)
        shutil.copy(killed / f"{DATABASE}-shm", open_folder)
        shutil.copy(killed / LOG, open_folder)
    expected = contents(killed)[1] if log else contents(open_folder)[1]
    if not log:  # of the reader just now
        for name in (LOG, f"{DATABASE}-shm"):
            (open_folder / name).unlink(missing_ok=True)
    for path in open_folder.iterdir():
        path.chmod(0o444)
    open_folder.chmod(0o555)

    def as_nobody(call: Callable[[], Any]) -> Callable[[], Any]:
        def work() -> Any:
            if os.getuid() == 0:
                os.setuid(65534)
            return call()

        return work

    said = in_child(as_nobody(lambda: contents(open_folder)[1] == expected))
    if log:
        assert said == "returned True"
    else:  # another user may be writing: SQLite needs a file by which to see that
        assert said.startswith("StoreReadOnlyError: "), said
        assert "Allow this user to write the folder, or copy it" in said
        with monkeypatch.context() as patch:
            patch.setattr(of_database, "_fixed", lambda _: True)  # on a medium for reading alone
            said = in_child(as_nobody(lambda: contents(open_folder)[1] == expected))
        assert said == "returned True"
    said = in_child(as_nobody(lambda: open_store(open_folder)))
    assert said.startswith("StoreReadOnlyError: "), said
    assert 'read it with open_store(path, "r")' in said
    said = in_child(as_nobody(lambda: open_store(open_folder / "new")))
    assert said.startswith("StoreReadOnlyError: cannot make the folder"), said


def test_two_writers_wait_for_each_other(folder: Path) -> None:
    children = []
    for w in range(2):
        child = os.fork()
        if child == 0:
            try:
                with open_store(folder) as store:
                    for i in range(15):
                        store.append(examples([1000 * (w + 1) + i]), message=f"{w} {i}")
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children] == [0, 0]
    with open_store(folder) as store:
        assert store.version == 7 + 30
        for w in range(2):
            mine = [v.message for v in store.history() if v.message.startswith(f"{w} ")]
            assert mine == [f"{w} {i}" for i in range(15)]
        assert store.verify().findings == ()


def test_a_writer_that_waits_in_vain_says_so(folder: Path) -> None:
    with open_store(folder) as one, open_store(folder, timeout=0.05) as two:
        with one._locked(), pytest.raises(StoreBusyError, match="nothing was changed. Try again"):  # type: ignore[attr-defined]
            two.append(examples([30]))
        assert two.append(examples([30])) == 8
        assert one.version == 8


@pytest.mark.parametrize("links", [True, False])
def test_many_may_make_the_same_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Also where the file system has no hard links."""

    def none(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", none)
    said = []
    read, write = os.pipe()
    for i in range(4):
        if os.fork() == 0:
            try:
                with open_store(tmp_path / "new") as store:
                    os.write(write, bytes([store.append(examples([i]))]))
            finally:
                os._exit(0)
    os.close(write)
    for _ in range(4):
        os.wait()
    said = sorted(os.read(read, 10))
    os.close(read)
    assert said == [1, 2, 3, 4]


def test_a_store_is_of_its_user_alone(tmp_path: Path) -> None:
    with open_store(tmp_path / "s") as store:
        store.append(examples([1]))
        store.save_prior(prior_of(examples([1]), 1))
        store.export(tmp_path / "s" / "e.safetensors")
        store.export(tmp_path / "e.parquet")
        for path in [*(tmp_path / "s").iterdir(), tmp_path / "e.parquet"]:
            assert path.stat().st_mode & 0o777 == 0o600, path
        assert (tmp_path / "s" / LOG).exists()


def test_a_folder_that_takes_no_file_is_told_of(tmp_path: Path, monkeypatch) -> None:
    def none(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    monkeypatch.setattr(os, "rename", none)
    with pytest.raises(StoreReadOnlyError, match=r"cannot make .*; choose another folder"):
        open_store(tmp_path / "s")
    assert list((tmp_path / "s").iterdir()) == []


def test_a_store_may_cross_a_fork(folder: Path) -> None:
    with open_store(folder) as store:
        size = len(store)
        assert in_child(lambda: store.append(examples([70]))) == "returned 8"
        assert (store.version, len(store)) == (8, size + 1)
        store.append(examples([71]))
        assert store.verify().findings == ()


# ----------------------------------------------------------------- hostile files


def change(folder: Path, *statements: str) -> None:
    con = sqlite3.connect(folder / DATABASE)
    for statement in statements:
        con.execute(statement)
    con.commit()
    con.close()


def test_a_store_of_the_future_is_left_alone(folder: Path) -> None:
    change(folder, "PRAGMA user_version = 2")
    before = (folder / DATABASE).read_bytes()
    for mode in ("r", "a"):
        with pytest.raises(StoreVersionError, match="format 2, .* reads up to 1; upgrade lifelong"):
            open_store(folder, mode)  # type: ignore[arg-type]
    assert (folder / DATABASE).read_bytes() == before


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER t AFTER INSERT ON content BEGIN DELETE FROM content; END",
        "CREATE VIEW v AS SELECT * FROM content",
        "CREATE TABLE other (x)",
        "CREATE INDEX other ON content(input)",
        "DROP TABLE tombstone",
        "DROP INDEX state_tag",
        "ALTER TABLE content ADD COLUMN more",
        "PRAGMA application_id = 1",
        "PRAGMA user_version = 0",
        "PRAGMA user_version = -1",
    ],
)
def test_a_database_with_anything_else_in_it_is_not_opened(folder: Path, statement: str) -> None:
    change(folder, statement)
    for mode in ("r", "a"):
        with pytest.raises(
            StoreDamagedError, match="is not a store of this library, or was changed"
        ):
            open_store(folder, mode)  # type: ignore[arg-type]


def test_a_tampered_schema_is_not_run(folder: Path) -> None:
    change(
        folder,
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_schema SET sql = 'CREATE VIEW life AS SELECT load_extension(''x'')', "
        "type = 'view', rootpage = 0 WHERE name = 'life'",
    )
    with pytest.raises(StoreDamagedError):
        open_store(folder)


@pytest.mark.parametrize("name", ["text.txt", "random", "page"])
def test_files_that_are_no_database(tmp_path: Path, name: str) -> None:
    data = {"text.txt": b"hello " * 1000, "random": random.Random(0).randbytes(70_000),
            "page": b"SQLite format 3\0" + random.Random(1).randbytes(5000)}[name]  # fmt: skip
    (tmp_path / DATABASE).write_bytes(data)
    for mode in ("r", "a"):
        with pytest.raises(StoreDamagedError):
            open_store(tmp_path, mode)  # type: ignore[arg-type]
    assert (tmp_path / DATABASE).read_bytes() == data


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE layout SET spec = 'no json'",
        "UPDATE layout SET spec = '[[[[[[[' WHERE id = 2",
        'UPDATE layout SET spec = \'{"kind": "pickle", "columns": []}\'',
        "UPDATE layout SET spec = replace(spec, '600', '9000000000000')",
        "UPDATE layout SET spec = replace(spec, '600', '-1')",
        "UPDATE layout SET spec = replace(spec, 'uint8', 'object')",
        "UPDATE layout SET spec = replace(spec, 'uint8', '__class__')",
        "UPDATE layout SET spec = replace(spec, 'float64', 'int64')",
        "UPDATE layout SET spec = '{\"exec\": 1}' WHERE spec LIKE '%tensor%'",
        "UPDATE layout SET spec = '{\"exec\": 1}' WHERE spec = 'null'",
        "UPDATE layout SET spec = '[1.5]' WHERE spec = 'null'",
        "UPDATE layout SET spec = 3",
        "DELETE FROM layout",
        "UPDATE content SET input = 'text'",
        "UPDATE content SET input = NULL",
        "UPDATE content SET input = x'00'",
        "UPDATE content SET layout = 3",
        "UPDATE state SET name = x'ff'",
        "UPDATE state SET task = 'a', digest = x'00'",
        "UPDATE state SET label = NULL",
        "UPDATE state SET scores = x'5b'",
        "UPDATE state SET item = item + 1",
        "UPDATE state SET digest = zeroblob(32)",
        "DELETE FROM content WHERE id = 4",
        "DELETE FROM state WHERE id = 4",
        "UPDATE prior SET digest = '../../../etc/passwd'",
        "UPDATE prior SET digest = x'2e2e2f2e2e'",
        "UPDATE prior SET digest = zeroblob(32)",
        "UPDATE version SET message = x'ff'",
        "UPDATE version SET time = NULL",
        "DELETE FROM version WHERE number = 3",
        "UPDATE life SET state = 999",
        "UPDATE life SET item = 'x'",
        "INSERT INTO meta VALUES ('oldest', 'x')",
        "DELETE FROM meta",
    ],
)
def test_rows_that_no_store_would_write_are_errors(folder: Path, statement: str) -> None:
    change(folder, statement)
    try:
        with open_store(folder) as store:
            noticed = not store.verify().ok
        contents(folder)
        assert noticed
    except StoreError:
        pass


@pytest.mark.parametrize("part", ["input", "label", "reference"])
def test_a_layout_that_asks_for_more_than_there_is_takes_no_room(folder: Path, part: str) -> None:
    """One byte and a digest that fits it, under a layout of 256 GB: refused, and noticed."""
    column = ["uint8", [2**38]]
    with sqlite3.connect(folder / DATABASE) as con:
        state, item = con.execute("SELECT state, item FROM life WHERE died IS NULL").fetchone()
        if part == "input":
            spec = json.dumps({"kind": "tensor", "columns": [["", *column]]})
            changes = {"digest": codec.digest(spec, b"x"), "input": b"x"}
            table, key = "content", item
        else:
            row = con.execute(
                "SELECT l.spec, s.* FROM state s JOIN layout l ON l.id = s.layout WHERE s.id = ?",
                (state,),
            ).fetchone()
            spec = json.dumps({**json.loads(row[0]), part: column})
            changes = {"digest": codec.digest(spec, *row[6:])}
            table, key = "state", state
        number = con.execute("INSERT INTO layout(spec) VALUES (?)", (spec,)).lastrowid
        names = ", ".join(f"{name} = ?" for name in ("layout", *changes))
        con.execute(f"UPDATE {table} SET {names} WHERE id = ?", (number, *changes.values(), key))
    con.close()
    with open_store(folder, "r") as store:
        assert not store.verify().ok
        with pytest.raises(StoreDamagedError, match=r"bytes where its layout says \d+"):
            store.memory([item])
        if part == "input":
            with pytest.raises(StoreDamagedError, match="has 1 bytes where its layout says"):
                store.raw(item)
        else:
            with pytest.raises(StoreDamagedError, match=r"a row has \d+ bytes where"):
                store.items()


def test_a_shape_whose_product_is_too_large_is_no_layout() -> None:
    for shape in ([2**20, 2**20], [2**39, 2**39, 0], [2**40]):
        with pytest.raises(StoreDamagedError, match="is no type and shape"):
            codec.Column.of(["uint8", shape])
    assert codec.Column.of(["uint8", [2**20, 0, 3]]).num_bytes == 0


def test_nothing_is_unpickled(folder: Path, monkeypatch) -> None:
    import pickle

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    contents(folder)
    with open_store(folder) as store:
        store.export(folder / "e.safetensors")
        store.forget(["0:4"])
        assert store.verify().ok


# ------------------------------------------------------------------ out of the folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


HOSTILE = ["../../x", "/etc/passwd", "..", ".", "", "a\0b", "\0", "CON", "a/b", "~", "$HOME", "%s",
           "'; DROP TABLE state; --", "\u202egnp", "\N{COMBINING ACUTE ACCENT}", "é", "é",
           "x" * 5000, "[1]", "null", "{}", "\r\n", "🜁"]  # fmt: skip


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("yard")


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.sampled_from(HOSTILE) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        min_size=1, max_size=4, unique=True,
    )
)  # fmt: skip
def test_ids_are_only_text(yard: Path, ids: list[str]) -> None:
    (yard / "beside.txt").write_text("untouched")
    with open_store(yard / "store") as store:
        memory = examples(list(range(1, len(ids) + 1)))
        store.append(memory, ids=ids, notes=ids, message="\0".join(ids), readmit=True)
        first = store.items(after=0, limit=10**6)[-len(ids) :]
        assert [item.id for item in first] == ids
        assert [item.note for item in first] == ids
        assert store.history()[-1].message == "\0".join(ids) or not "".join(ids).strip("\0")
        store.save_prior(prior_of(store.memory([i.item for i in first]), 1), readmit=True)
        assert [item.id for item in store.items()] == ids
        store.drop([ids[0]])
        assert [item.id for item in store.items()] == ids[1:]
        report = store.forget(ids)
        assert report.foreign == ()
        assert all(store.forgotten(i) for i in ids)
        store.compact()
    names = {str(p.relative_to(yard)) for p in yard.rglob("*") if p.is_file()}
    names = {re.sub("prior-[0-9a-f]{32}[.]", "prior.", name) for name in names}
    own = {f"store/{n}" for n in (DATABASE, GUARD, "prior.safetensors")}
    assert names == own | {"beside.txt"}
    assert (yard / "beside.txt").read_text() == "untouched"


@pytest.mark.parametrize("name", [DATABASE, LOG, f"{DATABASE}-shm", GUARD])
def test_links_in_place_of_files_are_not_followed(folder: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    if (folder / name).exists():
        shutil.move(folder / name, outside)
    else:
        outside.write_bytes(b"mine")
    before = outside.read_bytes()
    (folder / name).symlink_to(outside)
    for mode in ("r", "a"):
        with pytest.raises(StoreDamagedError, match="is a link or no plain file"):
            open_store(folder, mode)  # type: ignore[arg-type]
    assert outside.read_bytes() == before


def test_forgetting_does_not_leave_the_folder(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    prior_of(examples([2]), 1).save(outside / "theirs.safetensors")
    (outside / "2.png").write_bytes(b"mine")
    (outside / "report.html").write_text("mine")
    before = tree(outside)
    (folder / "sub").symlink_to(outside)
    (folder / "thumbnails").symlink_to(outside)
    (folder / "link.safetensors").symlink_to(outside / "theirs.safetensors")
    os.link(outside / "report.html", folder / "report.html")
    (folder / ("prior-" + "0" * 32 + ".safetensors")).symlink_to(outside / "2.png")
    with open_store(folder) as store:
        foreign = {Path(p).name for p in store.forget(["0:2"]).foreign}
        assert foreign == {"sub", "thumbnails", "link.safetensors"}
        assert store.verify().ok
    assert tree(outside) == before
    assert not (folder / "report.html").exists()


def test_a_prior_that_is_a_link_is_not_read(folder: Path, tmp_path: Path) -> None:
    with open_store(folder) as store:
        for path in folder.glob("prior-*"):
            shutil.move(path, tmp_path / path.name)
            path.symlink_to(tmp_path / path.name)
        with pytest.raises(StoreDamagedError, match="is a link or no plain file"):
            store.load_prior()
        assert not store.verify().ok


# ------------------------------------------------------------------------- size


def test_ten_thousand_removals_take_a_few_statements(tmp_path: Path) -> None:
    """No step for each pair of items: the work of SQLite's machine grows as the items do."""

    def steps(n: int) -> int:
        memory = examples(list(range(1, n + 1)), 30)
        with open_store(tmp_path / str(n)) as store:
            store.append(memory)
            counted = 0

            def count() -> int:
                nonlocal counted
                counted += 1
                return 0

            con = store._db  # type: ignore[attr-defined]
            con.set_progress_handler(count, 100)
            store.drop([f"0:{i}" for i in range(1, n // 2)])
            store.forget([f"0:{i}" for i in range(1, n)])
            con.set_progress_handler(None, 0)
            assert len(store) == 1
            return counted

    small, large = steps(1000), steps(10_000)
    assert large < 14 * small
