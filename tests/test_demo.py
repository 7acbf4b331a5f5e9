"""The demo, with a training too short to learn much: what it makes and says, not how well."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

from lifelong import cli, demo
from lifelong.config import Training
from lifelong.presets import PRESETS
from lifelong.report import Report

SHORT = Training(epochs=1, batch_size=64, lr=5e-3)


@pytest.fixture(scope="module")
def steps() -> list[demo.Step]:
    return []


@pytest.fixture(scope="module")
def found(steps: list[demo.Step]) -> Report:
    return demo.learn(range(2), steps.append, training=SHORT)


def test_both_scenarios_and_all_methods(found: Report) -> None:
    assert [section.title for section in found.sections] == list(demo.SCENARIOS.values())
    for section in found.sections:
        names = [method.name for method in section.methods]
        assert names == ["finetune", "ewc", "fromp", "gradient_reconstruction", "joint"]
        assert section.task_names == ("0/1", "2/3", "4/5", "6/7", "8/9")
        for method in section.methods:
            assert [run.seed for run in method.runs] == [0, 1]
            assert all(len(run.accuracy) == 5 for run in method.runs)
    assert set(names) <= set(PRESETS)


def test_memory_is_what_the_table_says(found: Report) -> None:
    for section in found.sections:
        kept = {method.name: method.memory_examples for method in section.methods}
        assert kept == {
            "finetune": 0,
            "ewc": 0,
            "fromp": 5 * demo.DIGITS.memory,
            "gradient_reconstruction": 5 * demo.DIGITS.memory,
            "joint": 1347,
        }
        sizes = {method.name: method.memory_bytes for method in section.methods}
        assert sizes["finetune"] == 0
        assert 0 < sizes["fromp"] < sizes["joint"]


def test_progress_counts_every_epoch(found: Report, steps: list[demo.Step]) -> None:
    assert found.sections
    assert [step.done for step in steps] == list(range(1, steps[0].total + 1))
    assert {step.scenario for step in steps} == {"task", "class"}


def test_the_gallery_is_in_order_of_lambda(found: Report) -> None:
    most, least = (
        [float(re.sub(r".*λ (< )?([0-9.]+);.*", r"\2", item.caption)) for item in gallery.items]
        for gallery in found.galleries
    )
    assert len(most) == len(least) == demo.GALLERY_SIZE
    assert most == sorted(most, reverse=True)
    assert least == sorted(least)
    assert least[-1] < most[-1]


def test_the_same_seeds_give_the_same_numbers(found: Report) -> None:
    methods = [m for m in demo.METHODS if m.preset in ("fromp", "gradient_reconstruction")]
    again = demo.learn([1], training=SHORT, methods=methods)
    for section, before in zip(again.sections, found.sections, strict=True):
        expected = {m.name: m.runs[1].accuracy for m in before.methods}
        for method in section.methods:
            assert method.runs[0].accuracy == expected[method.name]


def test_settings_name_what_was_chosen(found: Report) -> None:
    assert "1347 to learn, 450 to test" in found.settings["digits"]
    assert f"memory {demo.DIGITS.memory}" in found.settings["FROMP"]
    assert "Plain training" not in found.settings


def test_the_command_writes_a_page_and_two_tables(
    found: Report,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def learn(seeds: range, watch: object) -> Report:
        assert seeds == range(2)
        return found

    monkeypatch.setattr(demo, "learn", learn)
    folder = tmp_path / "a" / "demo"
    assert cli.main(["demo", "--seeds", "2", "--out", str(folder), "--quiet"]) == 0
    captured = capsys.readouterr()
    for title in demo.SCENARIOS.values():
        assert title in captured.out
    assert "Gradient reconstruction" in captured.out
    assert "report.html" in captured.out.replace("\n", "")
    page = (folder / "report.html").read_text()
    assert "lifelong demo --seeds 2" in page
    assert page.count("<img") == 2 * demo.GALLERY_SIZE
    assert {p.name for p in folder.iterdir()} == {"report.html", "result.json"}
    numbers = json.loads((folder / "result.json").read_text())
    assert [s["title"] for s in numbers["sections"]] == list(demo.SCENARIOS.values())


def test_the_tables_in_one_object(
    found: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(demo, "learn", lambda *args, **options: found)
    assert cli.main(["demo", "--json", "--quiet", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert err == ""
    assert Path(told["report"]).is_file()
    assert [table["title"] for table in told["tables"]] == [s.title for s in found.sections]
    assert [len(table["rows"]) for table in told["tables"]] == [5, 5]


def test_without_scikit_learn_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "pip install 'lifelong[demo]'" in err
    assert "Traceback" not in err
