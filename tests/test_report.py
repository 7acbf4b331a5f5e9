"""The report: inert whatever it is told, whole in one file, and true to the metrics."""

from __future__ import annotations

import io
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from lifelong.metrics import AccuracyMatrix, mean_and_standard_error
from lifelong.report import (
    COLUMNS,
    Estimate,
    Gallery,
    MethodResult,
    Picture,
    Report,
    RunSummary,
    Section,
    answer,
    page,
    pictures,
    render,
    summary_rows,
    summary_table,
    write,
)
from lifelong.report.table import bytes_text, estimate_text, percent, seconds_text

VOID = {"meta", "img", "br", "hr", "link", "input"}
HOSTILE = "<script>alert('x')</script>\"'&{{ 7*7 }}[bold] ∇λ 好"


def run(seed: int = 0, tasks: int = 3, drop: float = 0.1, best: float = 0.95) -> RunSummary:
    """A matrix that loses ``drop`` with each further task."""
    rows = tuple(
        tuple(best - drop * (t - i) - 0.001 * seed if i <= t else None for i in range(tasks))
        for t in range(tasks)
    )
    return RunSummary(seed, rows, 1.5 + seed, 40, 12_345)


def method(
    name: str, label: str = "", seeds: int = 3, tasks: int = 3, drop: float = 0.1, note: str = ""
) -> MethodResult:
    runs = tuple(run(seed, tasks, drop) for seed in range(seeds))
    return MethodResult(name, label or name, runs, note)


def section(*methods: MethodResult, tasks: int = 3, title: str = "Task-incremental") -> Section:
    return Section(title, "Which?", tuple(f"{2 * i}/{2 * i + 1}" for i in range(tasks)), methods)


def usual(seeds: int = 3) -> Section:
    return section(
        method("finetune", "Plain training", seeds, drop=0.2),
        method("ewc", "EWC", seeds, drop=0.1),
        method("fromp", "FROMP", seeds, drop=0.01),
        method("joint", "Joint training", seeds, drop=0.0),
    )


def with_cell(result: MethodResult, t: int, i: int, value: float | None) -> MethodResult:
    rows = [list(row) for row in result.runs[0].accuracy]
    rows[t][i] = value
    changed = replace(result.runs[0], accuracy=tuple(tuple(row) for row in rows))
    return replace(result, runs=(changed, *result.runs[1:]))


class Page(HTMLParser):
    """Every element with its attributes, and an error where tags do not balance."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.children: list[tuple[str, list[str]]] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if self._open:
            self._open[-1][1].append(tag)
        if tag not in VOID:
            self._open.append((tag, []))
            self.children.append(self._open[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if self._open:
            self._open[-1][1].append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"closed but not open: {tag}"
        opened, _ = self._open.pop()
        assert opened == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def report(*sections: Section, galleries: tuple[Gallery, ...] = ()) -> Report:
    return Report(
        "Five tasks",
        "a test",
        sections or (usual(),),
        galleries,
        {"epochs": "3"},
        {"lifelong": "0.1"},
        "2026-01-01",
        "lifelong demo",
    )


def pictures_of(count: int, size: int = 8) -> tuple[Picture, ...]:
    noise = np.random.default_rng(0).integers(0, 256, (count, size, size), dtype=np.uint8)
    return tuple(Picture(image, f"{k}", f"digit {k}") for k, image in enumerate(noise))


def test_hostile_text_stays_text() -> None:
    long = HOSTILE * 30
    tasks = (HOSTILE, long, "c")
    bad = Section(HOSTILE, HOSTILE, tasks, (method("ewc", long, note=HOSTILE),), HOSTILE)
    gallery = Gallery(HOSTILE, HOSTILE, (replace(pictures_of(1)[0], caption=long, alt=HOSTILE),))
    text = render(
        Report(HOSTILE, HOSTILE, (bad, bad), (gallery,), {HOSTILE: long}, {HOSTILE: HOSTILE},
               HOSTILE, HOSTILE)
    )  # fmt: skip
    parsed = Page(text)
    assert not parsed.all("script")
    assert "<script" not in text
    assert not any(name.startswith("on") for _, attrs in parsed.elements for name in attrs)
    assert parsed.all("img")[0]["alt"] == HOSTILE
    assert HOSTILE in parsed.text


@given(st.text(max_size=60))
def test_no_label_adds_an_element(label: str) -> None:
    def tags(name: str) -> list[str]:
        one = section(method("ewc", name), method("joint", "J"))
        return [tag for tag, _ in Page(render(report(one))).elements]

    assert tags(label) == tags("EWC")


def test_nothing_is_loaded() -> None:
    gallery = Gallery("g", "c", pictures_of(2))
    text = render(report(galleries=(gallery,)))
    parsed = Page(text)
    for _, attrs in parsed.elements:
        for name in ("src", "href", "xlink:href", "action", "srcset"):
            assert (attrs.get(name) or "data:").startswith("data:image/png;base64,") or (
                name not in attrs
            )
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in parsed.elements}
    policy = next(a for a in parsed.all("meta") if a.get("http-equiv"))
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_every_picture_has_a_text_alternative() -> None:
    two = (usual(), replace(usual(), title="Class-incremental"))
    parsed = Page(render(report(*two, galleries=(Gallery("g", "c", pictures_of(3)),))))
    ids = [attrs["id"] for _, attrs in parsed.elements if "id" in attrs]
    assert len(set(ids)) == len(ids)
    drawings = [children for tag, children in parsed.children if tag == "svg"]
    # In each section a chart, a colour scale, and for each method a line in the legend and a map.
    assert len(drawings) == 2 * (2 + 2 * 4)
    assert all(children[:2] == ["title", "desc"] for children in drawings)
    for attrs in parsed.all("svg"):
        assert attrs["role"] == "img"
        assert set((attrs["aria-labelledby"] or "").split()) <= set(ids)
    assert [attrs["alt"] for attrs in parsed.all("img")] == ["digit 0", "digit 1", "digit 2"]


def test_the_table_is_the_metrics() -> None:
    one = usual()
    text = render(report(one))
    for result, row in zip(one.methods, summary_rows(one), strict=True):
        matrices = [AccuracyMatrix.from_list(r.accuracy) for r in result.runs]
        mean, error = mean_and_standard_error([m.average_accuracy for m in matrices])
        assert row["accuracy"] == f"{100 * mean:.1f} ± {100 * error:.1f}"
        mean, error = mean_and_standard_error([m.forgetting for m in matrices])
        assert row["forgetting"] == f"{100 * mean:.1f} ± {100 * error:.1f}"
        assert row["method"] == result.label
        assert (row["memory_examples"], row["memory_bytes"]) == ("40", "12.3 kB")
        assert row["seconds"] == "2.5 s"
        assert list(row) == list(COLUMNS)
        assert row["accuracy"] in text
        assert row["forgetting"] in text


def test_the_curve_is_the_average_over_the_tasks_seen() -> None:
    result = method("ewc", seeds=2)
    for t, point in enumerate(result.curve):
        expected = [sum(r.accuracy[t][: t + 1]) / (t + 1) for r in result.runs]  # type: ignore[arg-type]
        assert point is not None
        assert point.mean == pytest.approx(sum(expected) / 2, abs=1e-12)
    assert result.curve[-1] == result.final_accuracy


def test_one_seed_has_no_standard_error() -> None:
    one = usual(seeds=1)
    assert all("±" not in value for row in summary_rows(one) for value in row.values())
    text = render(report(one))
    assert "±" not in text
    assert "One seed" in text
    assert "<strong>" not in text
    assert 'class="band' not in text


def test_bold_needs_a_real_best() -> None:
    clear = usual()
    best = clear.best("final_accuracy")
    assert best is not None
    assert best.name == "fromp"  # and not joint, which is higher
    assert len(re.findall("<strong>", render(report(clear)))) == 2
    tied = section(*clear.methods, replace(clear.methods[2], name="twin", label="Twin"))
    assert tied.best("final_accuracy") is None
    assert "<strong>" not in render(report(tied))
    assert "none is marked" in render(report(tied))
    alone = section(clear.methods[1], clear.methods[3])
    assert alone.best("final_accuracy") is None


def test_the_answer_is_computed() -> None:
    one = replace(usual(), examples="digits")
    plain, _, fromp, joint = one.methods
    values = [percent(m.final_accuracy.mean) for m in (plain, fromp, joint) if m.final_accuracy]
    assert answer(one) == (
        f"After three tasks, plain training keeps {values[0]} % on average; FROMP keeps "
        f"{values[1]} % with 40 remembered digits; training on everything at once gives "
        f"{values[2]} %."
    )
    assert answer(one) in "".join(Page(render(report(one))).text)
    tied = section(*one.methods, replace(fromp, name="twin", label="Twin"))
    assert "(Twin within two standard errors)" in answer(tied)
    assert "(one seed)" in answer(usual(seeds=1))
    assert "no other method here keeps more" in answer(section(plain, joint))
    assert answer(section(joint)).startswith("After three tasks, training on everything at once")


def test_a_plain_best_is_said() -> None:
    one = section(method("finetune", drop=0.0), method("ewc", drop=0.3))
    assert "no other method here keeps more" in answer(one)


@pytest.mark.parametrize("missing", [None, math.nan])
def test_unmeasured_cells_are_empty(missing: float | None) -> None:
    holed = with_cell(method("ewc"), 2, 0, missing)
    text = render(report(section(holed, method("fromp"))))
    assert text.count('class="empty"') == 1
    assert "nan" not in text.lower()
    assert holed.mean_matrix[2][0] is None
    row = summary_rows(section(holed))[0]
    assert row["accuracy"] == row["forgetting"] == "–"
    assert holed.curve[0] is not None
    assert holed.curve[2] is None


def test_only_the_last_row_measured() -> None:
    final = RunSummary(0, ((None, None), (0.5, 0.75)), 1.0, 0, 0)
    result = MethodResult("joint", "Joint", (final,))
    row = summary_rows(section(result, tasks=2))[0]
    assert (row["accuracy"], row["forgetting"]) == ("62.5", "–")
    Page(render(report(section(result, tasks=2))))


def test_one_task_and_many() -> None:
    Page(render(report(section(method("ewc", tasks=1), tasks=1))))
    text = render(report(section(method("ewc", tasks=30, drop=0.01), tasks=30)))
    Page(text)
    assert 'class="cell"' not in text  # too small to write in


def test_size_of_a_large_report() -> None:
    methods = tuple(method(f"m{k}", tasks=10, drop=0.02) for k in range(12))
    sections = (section(*methods, tasks=10), section(*methods, tasks=10, title="Class"))
    galleries = tuple(Gallery("g", "c", pictures_of(20, size=28)) for _ in range(2))
    text = render(report(*sections, galleries=galleries))
    Page(text)
    assert len(text.encode()) < 1_500_000


def test_write_replaces_whole(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    assert write(report(), str(target)) == target
    assert target.read_text(encoding="utf-8") == render(report())
    changed = replace(report(), title="Another")
    write(changed, target)
    assert "Another" in target.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_keeps_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(page.os, "replace", fail)
    with pytest.raises(type(error)) as caught:
        write(report(), target)
    if isinstance(error, OSError):
        assert "No space left on device" in str(caught.value)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_bad_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot write the report to .*folder that exist"):
        write(report(), tmp_path / "no" / "report.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="cannot write the report"):
        write(report(), tmp_path / "file" / "report.html")
    with pytest.raises(IsADirectoryError, match="cannot write the report"):
        write(report(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_a_clear_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="that you may write to"):
            write(report(), tmp_path / "report.html")
    finally:
        tmp_path.chmod(0o700)


def test_a_bad_picture_writes_nothing(tmp_path: Path) -> None:
    bad = Gallery("g", "c", (Picture(np.zeros((8, 8)), "", ""),))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="uint8, got float64"):
        write(report(galleries=(bad,)), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_png_round_trip(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    data = pictures.png(image)
    assert pictures.png_size(data) == (7, 5)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), image)
    assert pictures.png(data) == data


def test_png_rejects_the_rest() -> None:
    with pytest.raises(ValueError, match="must be a PNG"):
        pictures.png(b"GIF89a")
    with pytest.raises(ValueError, match=r"\(H, W\).*got shape \(2, 2, 4\)"):
        pictures.png(np.zeros((2, 2, 4), np.uint8))


def test_bad_values_say_what_is_expected() -> None:
    with pytest.raises(ValueError, match="divide percentages by 100"):
        RunSummary(0, ((98.0,),), 1.0, 0, 0)
    with pytest.raises(ValueError, match="one row and one column per task"):
        RunSummary(0, ((0.9,), (0.9, 0.8)), 1.0, 0, 0)
    with pytest.raises(ValueError, match="seconds must be finite"):
        RunSummary(0, ((0.9,),), math.nan, 0, 0)
    with pytest.raises(ValueError, match="has no runs"):
        MethodResult("ewc", "EWC", ())
    with pytest.raises(ValueError, match="has 2 tasks, but seed 0 of 'ewc' has 3"):
        section(method("ewc"), tasks=2)
    with pytest.raises(ValueError, match="names a method twice"):
        section(method("ewc"), method("ewc"))
    with pytest.raises(ValueError, match="at least one task and one method"):
        section()


def test_terminal_table_fits_and_is_not_markup() -> None:
    one = section(*usual().methods[:3], method("joint", "[b]J[/b] <i>"), title="[x] T")
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(summary_table(one))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[b]J[/b] <i>" in text
    assert "[x] T" in text
    assert "…" not in text
    for row in summary_rows(one):
        for key in ("accuracy", "forgetting", "memory_bytes", "seconds"):
            assert row[key] in text
    assert text.count("*") == 3  # two values, and what the star means


def test_numbers_for_people() -> None:
    assert estimate_text(Estimate(0.98712, 0.00149)) == "98.7 ± 0.1"
    assert estimate_text(Estimate(-0.0001)) == "0.0"
    assert [bytes_text(n) for n in (0, 999, 25_600, 999_960, 3e9)] == [
        "0 B", "999 B", "25.6 kB", "1.0 MB", "3.0 GB",
    ]  # fmt: skip
    assert [seconds_text(s) for s in (0.04, 9.96, 90, 300, 10_000)] == [
        "0.0 s", "10 s", "90 s", "5.0 min", "2.8 h",
    ]  # fmt: skip


@given(st.floats(0, 1), st.floats(0, 1))
def test_axis_covers_the_values(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    ticks = pictures.axis_ticks(low, high)
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9
    assert 0 <= ticks[0] < ticks[-1] <= 1
    assert 3 <= len(ticks) <= 8


@given(st.floats(0, 1), st.floats(0, 0.9))
def test_numbers_are_legible_on_their_cells(value: float, low: float) -> None:
    fill, ink = pictures.cell_colours(value, low)
    assert pictures.contrast(fill, ink) >= 4.5


def test_heat_map_darkens_all_the_way() -> None:
    fills = [pictures.cell_colours(k / 50, 0.0)[0] for k in range(51)]
    shades = [pictures.contrast(fill, "#ffffff") for fill in fills]
    assert all(a < b for a, b in pairwise(shades))


def test_both_schemes_have_enough_contrast() -> None:
    source = files("lifelong.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{([^}]*)\}", source)
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block))
        for ground in ("page", "card", "tint"):
            for ink in ("ink", "soft", "accent"):
                assert pictures.contrast(colours[ink], colours[ground]) >= 4.5
        for line in ("c0", "c1", "c2", "c3", "c4", "c5", "plain", "reference"):
            assert pictures.contrast(colours[line], colours["card"]) >= 3


def test_methods_differ_without_colour() -> None:
    styles = [pictures.line_style(k) for k in range(24)]
    styles += [pictures.PLAIN_STYLE, *pictures.REFERENCE_STYLES]
    assert len({(style.dash, style.marker) for style in styles}) == len(styles)


def test_a_method_keeps_its_style_in_every_section() -> None:
    first = section(method("ewc", "EWC"), method("fromp", "FROMP"))
    second = section(method("fromp", "FROMP"), method("ewc", "EWC"))
    text = render(report(first, second))
    for label in ("EWC", "FROMP"):
        found = re.findall(rf'Line of {label}</title>.*?<g class="(\w+)">', text)
        assert len(found) == 2
        assert len(set(found)) == 1
