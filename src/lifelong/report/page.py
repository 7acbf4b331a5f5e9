"""The report as one HTML page that loads nothing: no scripts, no fonts, no files beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from . import pictures
from .results import Estimate, Gallery, MethodResult, Report, Section
from .table import COLUMNS, MISSING, count_text, estimate_text, percent, reading_note, summary_rows

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
            "eleven", "twelve")  # fmt: skip
# Pictures are shown at a whole multiple of their size, so that every pixel stays a square.
_PICTURE_WIDTH = 96


@dataclass(frozen=True)
class _Cell:
    text: str
    best: bool = False


@dataclass(frozen=True)
class _Line:
    label: str
    value: str
    swatch: Markup


@dataclass(frozen=True)
class _Map:
    label: str
    svg: Markup
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class _SectionView:
    title: str
    description: str
    answer: str
    note: str
    table: tuple[tuple[MethodResult, tuple[_Cell, ...]], ...]
    chart: Markup
    legend: tuple[_Line, ...]
    curves: tuple[tuple[str, tuple[str, ...]], ...]
    bar: Markup
    maps: tuple[_Map, ...]
    map_width: float
    task_names: tuple[str, ...]
    key_to_tasks: bool  # the axes bear numbers, and the names are few enough to list
    bands: bool


@dataclass(frozen=True)
class _PictureView:
    source: str
    width: int
    height: int
    caption: str
    alt: str


def render(report: Report) -> str:
    """The whole page as HTML text; every text of the report is escaped.

    Raises:
        ValueError, TypeError: a picture is neither a uint8 image nor a PNG (see ``pictures.png``).
    """
    styles = _styles(report.sections)
    sections = [_view(f"s{k}", s, styles) for k, s in enumerate(report.sections)]
    return _template().render(
        report=report,
        headline=sections[0].answer if sections else "",
        sections=sections,
        galleries=[(g, _pictures(g)) for g in report.galleries],
        columns=tuple(COLUMNS.values()),
    )


def write(report: Report, path: str | os.PathLike[str]) -> Path:
    """Render to ``path``, whole or not at all: a page that was there stays until it is replaced.

    Raises:
        OSError: the file can't be written (the subclass that the system chose, such as
            PermissionError), with the path and the way out in its message.
    """
    target = Path(path)
    text = render(report)
    temporary = target.with_name(f".report-{os.getpid()}.tmp")
    try:
        try:
            temporary.write_text(text, encoding="utf-8", newline="\n")
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        message = (
            f"cannot write the report to {target}: {error.strerror or error}; "
            "give a file in a folder that exists and that you may write to"
        )
        # With an errno, OSError makes the same subclass that was caught.
        raise OSError(error.errno, message) from error
    return target


def answer(section: Section) -> str:
    """What the section found, in one sentence, from its numbers.

    The method named is the one with the highest mean; methods within two standard errors of it are
    named too, so that the sentence claims no more than the runs show.
    """
    clauses = []
    plain, leader = section.plain, section.leader
    if plain is not None and plain.final_accuracy is not None:
        clauses.append(f"plain training keeps {percent(plain.final_accuracy.mean)} % on average")
    if leader is not None and leader is plain and len(section.methods) > 1:
        clauses[-1] += ", and no other method here keeps more"
    elif leader is not None and leader is not plain and leader.final_accuracy is not None:
        held = count_text(leader.memory_examples) if leader.memory_examples else "no"
        clauses.append(
            f"{leader.label} keeps {percent(leader.final_accuracy.mean)} % "
            f"with {held} remembered {section.examples}" + _ties(section, leader)
        )
    joint = next((m for m in section.methods if m.name == "joint" and m.final_accuracy), None)
    if joint is not None and joint.final_accuracy is not None:
        value = percent(joint.final_accuracy.mean)
        clauses.append(f"training on everything at once gives {value} %")
    if not clauses:
        return ""
    tasks = len(section.task_names)
    number = _NUMBERS[tasks] if tasks < len(_NUMBERS) else str(tasks)
    return f"After {number} task{'s' if tasks > 1 else ''}, {'; '.join(clauses)}."


def _ties(section: Section, leader: MethodResult) -> str:
    if leader.final_accuracy is None or leader.final_accuracy.error is None:
        return " (one seed)"
    names = [m.label if m is not section.plain else "plain training"
             for m in section.within_error(leader)]  # fmt: skip
    if not names:
        return ""
    listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    return f" ({listed} within two standard errors)"


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("lifelong.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)


def _styles(sections: Sequence[Section]) -> dict[str, pictures.LineStyle]:
    """One style per method, the same in every section."""
    styles: dict[str, pictures.LineStyle] = {}
    coloured = 0
    for name in dict.fromkeys(m.name for s in sections for m in s.methods):
        if name in ("joint", "separate"):
            styles[name] = pictures.REFERENCE_STYLES[name == "separate"]
        elif name == "finetune":
            styles[name] = pictures.PLAIN_STYLE
        else:
            styles[name] = pictures.line_style(coloured)
            coloured += 1
    return styles


def _view(key: str, section: Section, styles: dict[str, pictures.LineStyle]) -> _SectionView:
    methods = section.methods
    best = {
        "accuracy": section.best("final_accuracy"),
        "forgetting": section.best("forgetting"),
    }
    table = tuple(
        (m, tuple(_Cell(text, best.get(name) is m) for name, text in row.items()))
        for m, row in zip(methods, summary_rows(section), strict=True)
    )
    lines = [pictures.Line(m.label, styles[m.name], m.curve) for m in methods]
    low = pictures.scale_floor([m.mean_matrix for m in methods])
    finals = "; ".join(f"{m.label} {_percent_or_missing(m.final_accuracy)}" for m in methods)
    chart = pictures.line_chart(
        f"{key}-chart",
        f"Average accuracy on the tasks seen so far: {section.title}",
        f"One line per method over {len(section.task_names)} tasks. After the last: {finals}.",
        lines,
    )
    # In the order of the lines' right ends, as the eye meets them.
    order = sorted(
        range(len(methods)),
        key=lambda k: -e.mean if (e := methods[k].final_accuracy) else 2.0,
    )
    legend = tuple(
        _Line(
            methods[k].label,
            _percent_or_missing(methods[k].final_accuracy),
            Markup(pictures.swatch(f"{key}-line{k}", methods[k].label, lines[k].style)),
        )
        for k in order
    )
    return _SectionView(
        title=section.title,
        description=section.description,
        answer=answer(section),
        note=reading_note(section),
        table=table,
        chart=Markup(chart),
        legend=legend,
        curves=tuple((m.label, tuple(estimate_text(e) for e in m.curve)) for m in methods),
        bar=Markup(pictures.colour_bar(f"{key}-scale", low)),
        maps=tuple(_map(f"{key}-map{k}", section, m, low) for k, m in enumerate(methods)),
        map_width=pictures.heat_map_width(len(section.task_names)),
        task_names=section.task_names,
        key_to_tasks=len(section.task_names) <= 12 and not pictures.named_axes(section.task_names),
        bands=any(e and e.error for m in methods for e in m.curve),
    )


def _percent_or_missing(estimate: Estimate | None) -> str:
    return MISSING if estimate is None else f"{percent(estimate.mean)} %"


def _map(key: str, section: Section, method: MethodResult, low: float) -> _Map:
    matrix = method.mean_matrix
    last = ", ".join(
        f"{name} {MISSING if v is None else percent(v) + ' %'}"
        for name, v in zip(section.task_names, matrix[-1], strict=True)
    )
    svg = pictures.heat_map(
        key,
        f"Accuracy of {method.label} on each task, in percent",
        f"Rows: after learning a task. Columns: the task tested. After the last task: {last}.",
        matrix,
        section.task_names,
        low,
    )
    rows = tuple(tuple(MISSING if v is None else percent(v) for v in row) for row in matrix)
    return _Map(method.label, Markup(svg), rows)


def _pictures(gallery: Gallery) -> tuple[_PictureView, ...]:
    views = []
    for item in gallery.items:
        data = pictures.png(item.image)
        width, height = pictures.png_size(data)
        scale = max(1, round(_PICTURE_WIDTH / width))
        views.append(
            _PictureView(
                pictures.data_uri(data), width * scale, height * scale, item.caption, item.alt
            )
        )
    return tuple(views)
