"""``lifelong report``: the page of runs, and its tables and figures as files."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lifelong import plots, runs
from lifelong.adapted_runs import Regularise, adapt
from lifelong.cli import main
from lifelong.config import Experiment, Overrides, RunConfig, UsageError
from lifelong.errors import CheckpointError
from lifelong.report import of_runs
from lifelong.report.files import latex, write_files


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods on five tasks of digits, two seeds each."""
    folder = tmp_path_factory.mktemp("report")
    for prior in ("kprior", "finetune"):
        experiment = Experiment(
            benchmark="split-digits", prior=prior, memory=8 if prior == "kprior" else None, seeds=2
        )
        plan = runs.prepare(RunConfig(experiment, Overrides(epochs=1)))
        runs.create(plan, folder / prior)
        runs.execute(plan, folder / prior)
    return folder


@pytest.fixture
def folder(learned: Path, tmp_path: Path) -> Path:
    shutil.copytree(learned, tmp_path / "runs")
    return tmp_path / "runs"


def test_the_page_says_what_the_runs_found(folder: Path, capsys: pytest.CaptureFixture) -> None:
    page = folder / "both.html"
    words = ["report", str(folder / "kprior"), str(folder / "finetune"), "--out", str(page)]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(page), "files": []}
    text = page.read_text()
    for name in ("kprior", "finetune"):
        result = json.loads((folder / name / "result.json").read_text())
        assert f"{100 * result['accuracy']['mean']:.1f}" in text
    assert "The most memorable examples" in text
    assert len(text) < 5_000_000
    assert "<script" not in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert all(s.startswith(("data:", "#")) for s in sources), sources  # nothing from elsewhere


def test_every_figure_has_words(folder: Path) -> None:
    assert main(["report", str(folder / "kprior")]) == 0
    text = (folder / "kprior" / "report.html").read_text()
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert "<title" in svg
        assert "<desc" in svg
    assert all('alt="A remembered' in img for img in re.findall(r"<img[^>]*>", text))


def test_files_for_a_paper(folder: Path, tmp_path: Path) -> None:
    words = ["report", str(folder / "kprior"), str(folder / "finetune")]
    assert main([*words, "--files", str(tmp_path / "paper")]) == 0
    found = {path.name for path in (tmp_path / "paper").iterdir()}
    figures = {"curves-1", "matrix-1-kprior", "matrix-1-finetune"}
    assert found == {"table-1.csv", "table-1.tex", "matrices-1.csv"} | {
        f"{name}.{kind}" for name in figures for kind in ("svg", "png")
    }
    with (tmp_path / "paper" / "table-1.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["kprior", "finetune"]
    result = json.loads((folder / "kprior" / "result.json").read_text())
    assert float(rows[0]["accuracy"]) == pytest.approx(result["accuracy"]["mean"], rel=1e-12)
    error = result["accuracy"]["standard_error"]
    assert float(rows[0]["accuracy_error"]) == pytest.approx(error, rel=1e-9)
    with (tmp_path / "paper" / "matrices-1.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == 2 * 2 * 15  # methods, seeds, cells of a triangle
    last = [c for c in cells if c["method"] == "kprior" and c["seed"] == "0"][-5:]
    means = np.mean([float(c["accuracy"]) for c in last])
    assert means == pytest.approx(result["accuracy"]["per_seed"][0], rel=1e-12)
    table = (tmp_path / "paper" / "table-1.tex").read_text()
    assert table.count(r"\\") == 3
    assert r"$\pm$" in table
    with Image.open(tmp_path / "paper" / "curves-1.png") as picture:
        assert picture.width >= 700
    svg = (tmp_path / "paper" / "curves-1.svg").read_text()
    assert "Average accuracy on the tasks seen so far" in svg
    assert main([*words, "--files", str(tmp_path / "paper")]) == 0
    assert (tmp_path / "paper" / "curves-1.svg").read_text() == svg


def test_the_same_method_twice_is_told_apart(folder: Path) -> None:
    shutil.copytree(folder / "kprior", folder / "again")
    (section,) = of_runs([folder / "kprior", folder / "again"]).sections
    assert [m.label for m in section.methods] == ["kprior (kprior)", "kprior (again)"]


def test_joint_training_with_several_settings_is_a_reference_still(folder: Path) -> None:
    """It sees all of the past, so it is no method that leads the others."""
    for name in ("a", "b"):
        shutil.copytree(folder / "kprior", folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        config["flags"]["prior"] = "joint"
        (folder / name / "config.json").write_text(json.dumps(config))
    section = of_runs([folder / name for name in ("a", "b", "finetune")]).sections[0]
    assert [m.is_reference for m in section.methods] == [True, True, False]
    assert section.leader is section.methods[2]


def test_as_much_of_the_path_as_tells_runs_apart(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [tmp_path / "a" / "x", tmp_path / "b" / "x", tmp_path / "b-x"]
    for place in places:
        shutil.copytree(folder / "kprior", place)
    monkeypatch.chdir(tmp_path)
    page = of_runs([Path("a/x"), Path("b/x"), Path("b-x"), folder / "finetune"])
    labels = [m.label for m in page.sections[0].methods]
    assert labels[:2] == ["kprior (a/x)", "kprior (b/x)"]
    assert labels[2:] == [f"kprior ({tmp_path.name}/b-x)", "finetune"]
    page = replace(page, sections=(replace(page.sections[0], methods=tuple(
        replace(m, label=label)
        for m, label in zip(page.sections[0].methods, ("k (b/x)", "k (b-x)", "k", "f"), strict=True)
    )),))  # fmt: skip
    written = write_files(page, tmp_path / "paper")
    assert len({path.name for path in written}) == len(written) == 3 + 2 * 5
    with pytest.raises(UsageError, match="b/../a/x is given twice"):
        of_runs([Path("a/x"), Path("b/../a/x")])


def test_an_adapted_run_is_not_said_to_be_unfinished(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new run"
    adapt(folder / "kprior", out, Regularise(0.1), seed=0, max_iterations=2)
    with pytest.raises(UsageError, match="was adapted") as caught:
        of_runs([out])
    assert str(out / "adaptation.json") in str(caught.value)
    assert f"lifelong ui '{out}'" in str(caught.value)
    assert "--resume" not in str(caught.value)


def test_what_makes_no_report(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no run"):
        of_runs([tmp_path])
    shutil.copytree(folder / "kprior", tmp_path / "begun")
    for path in (tmp_path / "begun").glob("seed-*/accuracy.json"):
        path.unlink()
    with pytest.raises(UsageError, match="no seed .* is finished"):
        of_runs([tmp_path / "begun"])
    other = runs.prepare(
        RunConfig(Experiment(benchmark="two-moons", prior="finetune"), Overrides(epochs=1))
    )
    runs.create(other, tmp_path / "moons")
    runs.execute(other, tmp_path / "moons")
    with pytest.raises(UsageError, match="on other tasks"):
        of_runs([folder / "kprior", tmp_path / "moons"])
    (folder / "kprior" / "seed-0" / "accuracy.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        of_runs([folder / "kprior"])
    assert main(["report"]) == 2
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["report", str(tmp_path / "moons"), "--out", str(tmp_path / "notes.txt")]) == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_run_without_images_has_no_gallery(tmp_path: Path) -> None:
    plan = runs.prepare(
        RunConfig(Experiment("two-moons", "kprior", memory=4), Overrides(epochs=1, batch_size=100))
    )
    runs.create(plan, tmp_path)
    runs.execute(plan, tmp_path)
    assert of_runs([tmp_path]).galleries == ()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("50 % & more_", r"50 \% \& more\_"),
        ("1 ± 2", r"1 $\pm$ 2"),
        ("a\\b", r"a\textbackslash{}b"),
    ],
)
def test_latex(text: str, wanted: str) -> None:
    assert latex(text) == wanted


# ------------------------------------------------------------------------------- the figures


def test_a_curve_is_the_mean_and_its_band_the_standard_error() -> None:
    accuracy = np.array([[0.9, 0.8], [0.7, 0.6], [0.8, 1.0]])
    figure = plots.learning_curves({"a": accuracy.tolist(), "b": [[1.0, 0.5]]})
    (ax,) = figure.axes
    first, second = ax.get_lines()
    np.testing.assert_allclose(first.get_ydata(), [80.0, 80.0])
    np.testing.assert_allclose(second.get_ydata(), [100.0, 50.0])
    (band,) = ax.collections  # one seed has none
    y = band.get_paths()[0].vertices[:, 1]
    error = 100 * accuracy[:, 1].std(ddof=1) / np.sqrt(3)
    assert y.max() == pytest.approx(80 + error)
    with pytest.raises(ValueError, match="as many tasks in each line"):
        plots.learning_curves({"a": [[1.0]], "b": [[1.0, 2.0]]})
    with pytest.raises(ValueError, match=r"\(seeds, tasks\)"):
        plots.learning_curves({})


def test_a_matrix_shows_what_was_measured() -> None:
    figure = plots.matrix([[0.5], [0.25, None]], ["x", "y"])
    ax = figure.axes[0]
    assert sorted(t.get_text() for t in ax.texts) == ["25", "50"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["x", "y"]
    with pytest.raises(ValueError, match="as many rows as names"):
        plots.matrix([[0.5]], ["x", "y"])
