"""Every table of ``lifelong bench`` runs, at a size that means nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import sklearn.datasets  # noqa: F401  # sets variables of the environment as it is imported

from lifelong.bench.execute import execute
from lifelong.bench.tables import tables


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data sets of the right names and shapes, and of noise."""
    pytest.importorskip("pyarrow")
    from noise import write

    return write(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", tables())
def test_smoke(name: str, data: Path, tmp_path: Path) -> None:
    table = tables()[name].tiny()
    summary = execute(tables()[name], tmp_path / "out", data=data, jobs=0, smoke=True)
    assert [(row["method"], row["failed"]) for row in summary["rows"]] == [
        (m.name, []) for m in table.methods for _ in m.memories_of(table)
    ]
    assert all(0 <= row["accuracy"]["mean"] <= 1 for row in summary["rows"])
