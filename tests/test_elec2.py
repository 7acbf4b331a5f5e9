"""The table elec2: what the contestants are told, and how river's take part."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets  # noqa: F401  # sets variables of the environment as it is imported
import torch

from lifelong.bench.execute import execute
from lifelong.bench.table import Cell, Context, Method
from lifelong.bench.tables import elec2
from lifelong.bench.tables.elec2 import ELEC2, NoChange, River, with_past_labels
from lifelong.metrics import prequential


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pyarrow")
    from noise import rows

    folder = tmp_path_factory.mktemp("data")
    rows(folder / "stream_elec.parquet", columns=8, count=120)
    return folder


def test_past_labels() -> None:
    inputs, labels = torch.arange(5.0).unsqueeze(1), torch.tensor([1, 0, 0, 1, 1])
    told = with_past_labels(inputs, labels, (1, 3, 9))
    assert told[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert told[:, 1].tolist() == [0, 1, -1, -1, 1]
    assert told[:, 2].tolist() == [0, 0, 0, 1, -1]
    assert told[:, 3].tolist() == [0, 0, 0, 0, 0]


def test_no_label_of_the_present_or_the_future_is_told() -> None:
    inputs, labels = torch.zeros(40, 2), torch.arange(40) % 3 % 2
    told = with_past_labels(inputs, labels, elec2.LAGS)
    for t in (0, 7, 39):
        other = labels.clone()
        other[t:] = 1 - other[t:]
        assert torch.equal(with_past_labels(inputs, other, elec2.LAGS)[: t + 1], told[: t + 1])


def test_no_change() -> None:
    said, _ = prequential(NoChange(), torch.zeros(5, 1), torch.tensor([1, 1, 0, 0, 1]))
    assert said.right.tolist() == [False, True, False, True, False]


class Counter:
    """As river's classifiers: the share of label 1; nothing at first."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[int, float], int]] = []

    def predict_proba_one(self, x: dict[int, float]) -> dict[int, float]:
        if not self.seen:
            return {}
        share = sum(y for _, y in self.seen) / len(self.seen)
        return {0: 1 - share, 1: share}

    def learn_one(self, x: dict[int, float], y: int) -> None:
        self.seen.append((x, y))


def test_a_classifier_of_river_in_the_loop() -> None:
    x, y = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]), torch.tensor([1, 1, 0])
    said, learner = prequential(River(Counter()), x, y)
    assert said.right.tolist() == [False, True, False]
    assert learner.model.seen == [
        ({0: 0.0, 1: 1.0}, 1),
        ({0: 2.0, 1: 3.0}, 1),
        ({0: 4.0, 1: 5.0}, 0),
    ]


def test_the_first_tenth_chooses(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Always(NoChange):
        def learn(self, inputs: torch.Tensor, labels: torch.Tensor) -> Always:
            lengths.append(len(labels))
            return self

    lengths: list[int] = []
    made: list[float] = []

    def always(seed: int, *, say: float) -> Always:
        made.append(say)
        return Always(say)

    monkeypatch.setitem(elec2._RIVERS, "always", always)  # type: ignore[arg-type]
    monkeypatch.setattr(elec2, "version", lambda package: f"{package} 1.0")
    method = Method("always", "always", {"past_labels": True, "grid": {"say": (0.0, 1.0)}})
    table = replace(ELEC2, methods=(method,), goals=())
    context = Context(cache=tmp_path, folder=tmp_path, data=data)
    result = table.run(table, Cell("elec2", "always", 0, 0), context)
    _, labels = table.run.stream(context, past_labels=False)  # type: ignore[attr-defined]
    shares = [float((labels[:12] == say).double().mean()) for say in (0, 1)]
    best = float(max((0, 1), key=lambda say: shares[say]))
    assert [t["accuracy"] for t in result["tried"]] == shares
    assert result["options"] == {"say": best}
    assert made == [0.0, 1.0, best]
    assert result["river"] == "river 1.0"
    assert sum(lengths) == 12 + 12 + 120
    assert result["accuracy"] == pytest.approx(float((labels == best).double().mean()))
    rest = float((labels[12:] == best).double().mean())
    assert result["accuracy_rest"] == pytest.approx(rest)
    assert len(result["curve"]) == 1


def test_without_river_the_row_fails_and_says_why(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("river", "river.tree", "river.forest", "river.preprocessing"):
        monkeypatch.setitem(sys.modules, module, None)
    name = "river Hoeffding adaptive tree"
    summary = execute(ELEC2, tmp_path / "out", methods=[name], seeds=1, data=data, jobs=0)
    (row,) = [row for row in summary["rows"] if row["method"] == name]
    assert "river is not installed: pip install" in str(row["failed"])


def test_without_data(tmp_path: Path) -> None:
    context = Context(cache=tmp_path, folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="give --data"):
        ELEC2.run(ELEC2, Cell("elec2", "no change", 0, 0), context)


@pytest.mark.parametrize("name", [m.name for m in ELEC2.methods if m.name.startswith("river")])
def test_river(name: str, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("river")
    context = Context(cache=tmp_path, folder=tmp_path, data=data, smoke=True)
    result: dict[str, Any] = ELEC2.run(ELEC2, Cell("elec2", name, 0, 0), context)
    assert 0 <= result["accuracy"] <= 1


def test_picture(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.elec2_picture import draw, results

    execute(ELEC2, tmp_path / "out", data=data, jobs=0, smoke=True)
    (result,) = results(tmp_path / "out", "Laplace filter")
    figure = draw(tmp_path / "out")
    left, right = figure.axes
    assert [len(ax.lines) for ax in (left, right)] == [1, 1]  # river is not in the smoke version
    assert list(left.lines[0].get_ydata()) == [100 * a for a in result["curve"]]
    figure.savefig(tmp_path / "out.png")
