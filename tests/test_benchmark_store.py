"""The comparison of stores, in its smoke setting: what each side gives back, and erases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import removals, store


@pytest.mark.parametrize("kind", ["jpeg", "pixels"])
def test_smoke(tmp_path: Path, kind: str) -> None:
    store.main(["--out", str(tmp_path), "--smoke", "--kind", kind])
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json", "result.json", "versions.json", "log.txt"
    }  # fmt: skip
    found = json.loads((tmp_path / "result.json").read_text())[kind]
    for part in (*found["append"].values(), found["read"], found["erase"]):
        assert set(part) == set(store.SIDES)
    for erased in found["erase"].values():
        assert (erased["found_before"], erased["found_after"]) == (3, 0)
        assert erased["others_lost"] == 0


def test_the_search_finds_marks_at_any_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"x" + store.mark(1) + store.mark(2)[:-1])
    (tmp_path / "empty").touch()
    assert store.on_disk(tmp_path, [1, 2, 3]) == 1


def test_removals(tmp_path: Path) -> None:
    """The tiny version counts what is left of each kind of memory, and keeps a record."""
    removals.main(["--out", str(tmp_path), "--sizes", "200", "400", "--fraction", "0.1"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["seconds"]) == ["200", "400"]
    assert result["growth"][0].keys() == result["seconds"]["400"].keys()
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2 * len(result["growth"][0])
