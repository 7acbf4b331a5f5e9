"""What Lance does otherwise than SQLite: erasing, kills, writers at once, damage."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
from benchmarks import store_trust
from benchmarks.store_trust import examples, holding, needles

from lifelong.errors import (
    StoreBusyError,
    StoreDamagedError,
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
    StoreVersionError,
)
from lifelong.store import Where, open_store
from lifelong.store import lance as of_lance

ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three versions: items 1 to 6, a drop, item 7."""
    path = tmp_path / "store.lance"
    with open_store(path) as store:
        store.append(examples([1, 2, 3, 4, 5, 6]), message="six")
        store.drop([2])
        store.append(examples([7]))
    return path


def origins(folder: Path | str) -> list[int]:
    with open_store(folder, "r") as store:
        return store.memory().origin.tolist()


# ---------------------------------------------------------------------- forgetting


def test_what_was_forgotten_is_in_no_file(tmp_path: Path) -> None:
    """Every file is searched, for the kept items too: they show that the search finds them."""
    seed = random.randrange(10**6)
    found = store_trust.forgetting(tmp_path, 40, 9, seed=seed, name="store.lance")
    assert found["patterns of the kept found"] == 31 * 7


def test_lance_alone_keeps_what_it_deletes(folder: Path) -> None:
    """The proof proves something: after Lance's own delete the same search finds the bytes."""
    assert holding(folder, needles(1)) == set(needles(1))
    dataset = lance.dataset(folder)
    dataset.delete("item = 1")
    dataset.optimize.compact_files()
    dataset.cleanup_old_versions()
    assert holding(folder, needles(1)) == set(needles(1))


@pytest.mark.parametrize("step", ["delete", "optimize", "cleanup_old_versions"])
def test_a_forget_that_was_cut_short_is_finished_by_the_next_writer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def dies(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, open_store(folder) as store:
        patch.setattr(lance.LanceDataset, step, property(dies) if step == "optimize" else dies)
        with pytest.raises(KeyboardInterrupt):
            store.forget(["0:1"])
    assert origins(folder) == [3, 4, 5, 6, 7]  # out of every version
    assert holding(folder, needles(1))
    with open_store(folder, "r") as store:
        report = store.verify()
        assert report.ok
        assert ["erasing was not finished" in f.problem for f in report.findings] == [True]
    with open_store(folder) as store:
        assert store.verify().findings == ()
    assert not holding(folder, needles(1))
    assert origins(folder) == [3, 4, 5, 6, 7]


def test_a_reader_goes_on_after_a_forget(folder: Path) -> None:
    with open_store(folder, "r") as reader, open_store(folder) as writer:
        assert len(reader) == 6
        writer.forget(["0:7"])
        assert reader.memory().origin.tolist() == [1, 3, 4, 5, 6]
        assert reader.diff(1, 4).dropped == (2,)


def test_a_whole_store_can_be_forgotten_and_filled_again(folder: Path) -> None:
    with open_store(folder) as store:
        assert store.forget(Where()).items == 7
        assert len(store) == 0
        assert not holding(folder, needles(4))
        store.append(examples([9]))
        store.compact()
        assert store.memory().origin.tolist() == [9]
    assert origins(folder) == [9]


# ----------------------------------------------------------------- kills and writers

WRITER = """
import sys
from benchmarks.store_trust import examples
from lifelong.store import open_store
with open_store(sys.argv[1]) as store:
    for i in range(1000):
        first = 2 * i
        store.append(examples([first, first + 1], 64))
        print(first, flush=True)
"""


def test_kills_lose_nothing_that_was_committed(tmp_path: Path) -> None:
    path = tmp_path / "store.lance"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])},
    )  # fmt: skip
    assert writer.stdout is not None
    committed = [int(writer.stdout.readline()) for _ in range(3)]
    time.sleep(random.uniform(0, 0.1))
    writer.send_signal(signal.SIGKILL)
    committed += [int(line) for line in writer.stdout.read().split()]
    writer.stdout.close()
    writer.wait()
    with open_store(path) as store:
        assert store.verify().ok
        found = store.memory().origin.tolist()
        told = [origin for first in committed for origin in (first, first + 1)]
        assert found[: len(told)] == told
        assert len(found) - len(told) in (0, 2)  # committed, and killed before it could be told
        assert store.append(examples([10_000])) == len(found) // 2 + 1


@pytest.mark.parametrize("killed", [False, True])
def test_of_two_writers_at_once_one_is_told_to_try_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """By address there is no lock, as on an object store. killed: before it took its rows back."""

    def dies(*args: Any) -> None:
        raise KeyboardInterrupt

    address = f"file://{folder}"
    with open_store(address) as one, open_store(address) as two:
        with monkeypatch.context() as patch:
            if killed:
                patch.setattr(lance.LanceDataset, "delete", dies)
            error = KeyboardInterrupt if killed else StoreBusyError
            match = None if killed else "at the same time; nothing was changed, try again"

            def between() -> None:
                with one._writing("drop", "") as change:  # type: ignore[attr-defined]
                    change.event["died"] = [1]
                    assert two.append(examples([8])) == 4

            with pytest.raises(error, match=match):
                between()
        assert one.drop([3]) == 5
        assert two.append(examples([9])) == 6
        assert [v.kind for v in one.history()][3:] == ["append", "drop", "append"]
        assert one.memory().origin.tolist() == [1, 4, 5, 6, 7, 8, 9]
        assert one.verify().ok
        one.compact()
        assert origins(folder) == two.memory().origin.tolist() == [1, 4, 5, 6, 7, 8, 9]


def test_a_writer_that_waits_in_vain_says_so(folder: Path) -> None:
    with open_store(folder) as one, open_store(folder, timeout=0.05) as two:
        with one._locked(), pytest.raises(StoreBusyError, match="writing to .* for 0.05 s"):  # type: ignore[attr-defined]
            two.append(examples([8]))
        assert two.append(examples([8])) == 4


def test_a_store_does_not_cross_a_fork(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(folder) as store:
        monkeypatch.setattr(os, "getpid", lambda: -1)
        with pytest.raises(StoreError, match="does not cross a fork:"):
            len(store)
        monkeypatch.undo()
        assert len(store) == 6
    with pytest.raises(StoreError, match="is closed; open_store opens it again"):
        len(store)


# ------------------------------------------------------------------- what goes wrong


def test_a_flipped_byte_is_noticed_or_means_nothing(folder: Path, tmp_path: Path) -> None:
    """In the contents; Lance's own bookkeeping is not ours to check."""
    wanted = origins(folder)
    file = max((folder / "data").iterdir(), key=lambda p: p.stat().st_size)
    data = file.read_bytes()
    places = [data.find(x) for x in needles(4)]
    assert min(places) >= 0
    for number, at in enumerate([p + random.randrange(16) for p in places]):
        copy = tmp_path / f"copy-{number}.lance"
        shutil.copytree(folder, copy)
        changed = bytearray(data)
        changed[at] ^= 1 << random.randrange(8)
        (copy / "data" / file.name).write_bytes(changed)
        with open_store(copy, "r") as store:
            report = store.verify()
            assert [f.place for f in report.findings if f.damage] == ["item 4"]
            with pytest.raises(StoreDamagedError, match="not those that were written"):
                store.memory()
            assert store.memory([1]).origin.tolist() == [1]
    assert origins(folder) == wanted


@pytest.mark.parametrize("part", ["data", "_versions"])
def test_a_lost_or_cut_file_is_an_error(folder: Path, part: str) -> None:
    for path in (folder / part).iterdir():
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(StoreDamagedError, match="cannot be read"):
        origins(folder)


def test_a_torn_last_commit_can_be_taken_off(folder: Path) -> None:
    """As a power cut can leave it; Lance counts its versions down."""
    manifest = min((folder / "_versions").glob("*.manifest"))
    manifest.write_bytes(b"")
    with pytest.raises(StoreDamagedError, match="cannot be read"):
        origins(folder)
    manifest.unlink()
    assert origins(folder) == [1, 3, 4, 5, 6]


def test_a_full_disk_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError("LanceError(IO): No space left on device (os error 28)")

    with open_store(folder) as store:
        with monkeypatch.context() as patch:
            patch.setattr("lance.fragment.write_fragments", full)
            with pytest.raises(StoreFullError, match="Nothing was changed; free some space"):
                store.append(examples([8]))
        assert store.version == 3
        assert store.append(examples([8])) == 4


def test_what_lance_says_becomes_what_to_do(folder: Path) -> None:
    with open_store(folder, "r") as store:
        for text, kind in (
            ("Permission denied (os error 13)", StoreReadOnlyError),
            ("Commit conflict for version 3", StoreBusyError),
            ("Dataset at path x was not found", FileNotFoundError),
            ("anything else", StoreDamagedError),
        ):
            with pytest.raises(kind), store._errors():  # type: ignore[attr-defined]
                raise OSError(text)
        with pytest.raises(KeyError), store._errors():  # type: ignore[attr-defined]
            raise KeyError("not Lance's")


def test_an_address_that_does_not_answer_is_no_damage(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a local folder the same words are damage."""
    here = f"file://{folder}"
    with open_store(here, "r") as far, open_store(folder, "r") as near:
        for text in (
            "LanceError(IO): Generic S3 error: Error performing GET http://x/b in 600µs - HTTP "
            "error: error sending request",
            "Generic S3 error: the credential provider was not enabled",
            "Client error with status 403 Forbidden",
        ):
            expected = pytest.raises(StoreError, match=r"cannot reach file://.*credentials")
            with expected as caught, far._errors():  # type: ignore[attr-defined]
                raise OSError(text)
            assert type(caught.value) is StoreError
            with pytest.raises(StoreDamagedError), near._errors():  # type: ignore[attr-defined]
                raise OSError(text)


def test_a_new_store_is_its_makers_alone(folder: Path) -> None:
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / of_lance.LOCK).stat().st_mode & 0o777 == 0o600


def test_reading_mode_writes_nothing(folder: Path, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with open_store(folder, "r") as store:
        store.verify()
        for call in (lambda: store.drop([1]), lambda: store.forget([1]), store.compact):
            with pytest.raises(StoreReadOnlyError, match=r"opened for reading; use open_store"):
                call()
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    for missing in (tmp_path / "none.lance", f"file://{tmp_path}/none.lance"):
        with pytest.raises(FileNotFoundError, match="there is no store at"):
            open_store(missing, "r")
    assert not (tmp_path / "none.lance").exists()


def test_a_linked_lock_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (folder / of_lance.LOCK).unlink()
    (folder / of_lance.LOCK).symlink_to(tmp_path / "outside")
    with open_store(folder) as store, pytest.raises(StoreReadOnlyError, match="cannot be written"):
        store.append(examples([8]))
    assert not (tmp_path / "outside").exists()


def test_tables_of_others_and_of_the_future(tmp_path: Path) -> None:
    plain = tmp_path / "plain.lance"
    lance.write_dataset(pa.table({"x": [1]}), plain)
    with pytest.raises(StoreDamagedError, match="a Lance table, but not a store"):
        open_store(plain)
    other = of_lance._schema(1, "00").empty_table().append_column("more", pa.array([], pa.int64()))
    lance.write_dataset(other, tmp_path / "other.lance")
    with pytest.raises(StoreDamagedError, match="changed by another program"):
        open_store(tmp_path / "other.lance")
    lance.write_dataset(of_lance._schema(9, "00").empty_table(), tmp_path / "new.lance")
    with pytest.raises(StoreVersionError, match=r"has format 9, .* up to 1; upgrade"):
        open_store(tmp_path / "new.lance")
    (tmp_path / "file.lance").write_text("")
    with pytest.raises(StoreDamagedError, match="is a file, not a store"):
        open_store(tmp_path / "file.lance")
    with pytest.raises(ValueError, match='mode must be "r" or "a"'):
        open_store(tmp_path / "x.lance", "w")  # type: ignore[arg-type]


def test_rows_that_no_store_would_write_are_errors(folder: Path) -> None:
    with open_store(folder) as store:
        view = store._view()  # type: ignore[attr-defined]
        with pytest.raises(StoreDamagedError, match="a row cannot be read"):
            view.unpacked(0, b"short", b"")
        with pytest.raises(StoreDamagedError, match="layout 99 is missing"):
            view.head(99)
        with pytest.raises(StoreDamagedError, match="a prior is missing"):
            store._read_prior(view, "0")  # type: ignore[attr-defined]
        view.events[-1]["commit"] = "x"
        with pytest.raises(StoreDamagedError, match="a version of the store cannot be read"):
            view._apply("c", {"parent": "x", "number": 4}, [])
        view.source.clear()
        with pytest.raises(StoreDamagedError, match="an input is missing"):
            store.memory()


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(ImportError, match=r"pip install lifelong\[lance\]"):
        open_store(tmp_path / "x.lance")
