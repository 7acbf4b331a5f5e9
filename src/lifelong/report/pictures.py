"""Charts as SVG text and images as PNG bytes: pure functions, values in, text out.

Colours come from the page's style sheet through classes (``c0`` .. ``c5``, ``plain``,
``reference``), so that one drawing serves the light and the dark scheme. Heat maps carry their own
colours, with the number on each cell in whichever of two inks reads better.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .results import Estimate, Row
from .table import percent

PALETTE_SIZE = 6
_DASHES = ("", "8 3", "2 3", "9 3 2 3")
_MARKERS = ("circle", "square", "triangle", "diamond", "down", "cross")
_PNG = b"\x89PNG\r\n\x1a\n"
# Of black and white, one has a contrast of at least 4.58 with any colour.
_INKS = ("#000000", "#ffffff")
# Sand to navy: lightness falls all the way, so the order survives colour blindness and grey print.
_RAMP = ((0xF7, 0xE3, 0xBE), (0xE3, 0xC6, 0x9A), (0x8F, 0xB3, 0xB0), (0x3F, 0x80, 0xA6),
         (0x12, 0x3F, 0x70))  # fmt: skip


@dataclass(frozen=True)
class LineStyle:
    """How a method is drawn: told apart by colour, and by dash or marker for who can't see it."""

    css: str
    dash: str
    marker: str


def line_style(index: int) -> LineStyle:
    """The style of the index-th method: colours and markers repeat after six, pairs after 24."""
    turn = index // PALETTE_SIZE
    return LineStyle(
        f"c{index % PALETTE_SIZE}",
        _DASHES[turn % len(_DASHES)],
        _MARKERS[(index + turn // len(_DASHES)) % len(_MARKERS)],
    )


PLAIN_STYLE = LineStyle("plain", "1 3", "cross")
REFERENCE_STYLES = (LineStyle("reference", "8 4", "none"), LineStyle("reference", "1 4", "none"))
_DOTS = REFERENCE_STYLES[1]


@dataclass(frozen=True)
class Line:
    """One method in a line chart: average accuracy after 1, 2, ... tasks."""

    label: str
    style: LineStyle
    points: tuple[Estimate | None, ...]


def _open_svg(
    key: str, title: str, description: str, width: float, height: float, enlarge: float = 1.0
) -> str:
    k = escape(key)
    return (
        f'<svg role="img" aria-labelledby="{k}-title {k}-desc" viewBox="0 0 {width:g} {height:g}" '
        f'style="max-width:{width * enlarge:g}px">'
        f'<title id="{k}-title">{escape(title)}</title>'
        f'<desc id="{k}-desc">{escape(description)}</desc>'
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", extra: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def _marker(kind: str, x: float, y: float) -> str:
    shapes = {
        "square": "M-3.6-3.6h7.2v7.2h-7.2z",
        "triangle": "M0-4.6L4.4 3.4H-4.4z",
        "down": "M0 4.6L4.4-3.4H-4.4z",
        "diamond": "M0-5L5 0L0 5L-5 0z",
        "cross": "M-3.6-3.6L3.6 3.6M-3.6 3.6L3.6-3.6",
    }
    if kind == "none":
        return ""
    if kind == "circle":
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3.9"/>'
    return f'<path class="mark" transform="translate({x:.1f} {y:.1f})" d="{shapes[kind]}"/>'


def swatch(key: str, label: str, style: LineStyle) -> str:
    """A short piece of the line, for the legend."""
    return (
        _open_svg(key, f"Line of {label}", "How this method is drawn in the chart.", 44, 14)
        + f'<g class="{style.css}"><path class="line" d="M2 7H42"{_dash(style)}/>'
        + f"{_marker(style.marker, 22, 7)}</g></svg>"
    )


def _dash(style: LineStyle) -> str:
    return f' stroke-dasharray="{style.dash}"' if style.dash else ""


def axis_ticks(low: float, high: float) -> tuple[float, ...]:
    """Round percentages from at or below ``low`` to at or above ``high``, both within 0..100."""
    span = max(high - low, 0.04)
    step = next(s for s in (1, 2, 5, 10, 20) if 100 * span / s <= 6 or s == 20)
    first = math.floor(round(100 * low / step, 9))
    last = max(math.ceil(round(100 * high / step, 9)), first + 2)
    if last * step > 100:
        first, last = first - (last - 100 // step), 100 // step
    return tuple(k * step / 100 for k in range(max(first, 0), last + 1))


@dataclass(frozen=True)
class Axis:
    """From low to high, with (value, text) at its ticks."""

    name: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Points:
    """A line by its points (x, y), broken at None."""

    label: str
    style: LineStyle
    points: tuple[tuple[float, Estimate] | None, ...]


def percent_axis(name: str, low: float, high: float) -> Axis:
    """Of fractions, in percent, from at or below ``low`` to at or above ``high``."""
    ticks = axis_ticks(low, high)
    return Axis(name, ticks[0], ticks[-1], tuple((v, f"{100 * v:g}") for v in ticks))


def log_axis(name: str, values: Sequence[float]) -> Axis:
    """Of whole numbers of at least 1, as log10, with a tick at each 1, 10, 100, ..."""
    high = max(1, math.ceil(math.log10(max(*values, 2))))
    return Axis(name, 0.0, float(high), tuple((float(k), f"{10**k:,}") for k in range(high + 1)))


def line_chart(key: str, title: str, description: str, lines: Sequence[Line]) -> str:
    """Accuracy on the tasks seen so far (%) against the number of tasks learned.

    One line per method, broken where nothing was measured, in a band of ± one standard error.
    """
    tasks = max((len(line.points) for line in lines), default=1)
    known = [e for line in lines for e in line.points if e is not None]
    lows = [e.mean - (e.error or 0) for e in known] or [0.0]
    highs = [e.mean + (e.error or 0) for e in known] or [1.0]
    y = percent_axis("accuracy on the tasks seen (%)", max(min(lows), 0.0), min(max(highs), 1.0))
    every = math.ceil(tasks / 10)
    ticks = tuple((float(t), str(t + 1)) for t in range(0, tasks, every))  # 0: the first task
    drawn = [
        Points(line.label, line.style,
               tuple(None if e is None else (float(t), e) for t, e in enumerate(line.points)))
        for line in lines
    ]  # fmt: skip
    x = Axis("tasks learned", 0.0, tasks - 1.0, ticks)
    return chart(key, title, description, drawn, x, y, marked=tasks <= 24)


def chart(
    key: str,
    title: str,
    description: str,
    lines: Sequence[Points],
    x_axis: Axis,
    y_axis: Axis,
    *,
    marked: bool = True,
    diagonal: bool = False,
) -> str:
    """Lines over two axes, in bands of ± one standard error. diagonal: also y = x, in dots."""
    # Small enough to be legible on a phone, and enlarged where there is room.
    width, height, left, right, top, bottom = 440.0, 280.0, 54.0, 12.0, 12.0, 50.0

    def x(value: float) -> float:
        inner, span = width - left - right - 24, x_axis.high - x_axis.low
        return left + 12 + (inner * (value - x_axis.low) / span if span > 0 else inner / 2)

    def y(value: float) -> float:
        value = min(max(value, y_axis.low), y_axis.high)
        share = (value - y_axis.low) / (y_axis.high - y_axis.low)
        return height - bottom - share * (height - top - bottom)

    parts = [_open_svg(key, title, description, width, height, enlarge=1.35)]
    for tick, text in y_axis.ticks:
        parts.append(f'<path class="grid" d="M{left:g} {y(tick):.1f}H{width - right:g}"/>')
        parts.append(_text(left - 8, round(y(tick) + 4, 1), text, "end"))
    for tick, text in x_axis.ticks:
        parts.append(_text(round(x(tick), 1), height - bottom + 18, text))
    middle = (top + height - bottom) / 2
    turned = f' class="axis" transform="rotate(-90 13 {middle:g})"'
    parts.append(_text(13, middle, y_axis.name, extra=turned))
    parts.append(_text((left + width - right) / 2, height - 8, x_axis.name, "middle",
                       ' class="axis"'))  # fmt: skip
    if diagonal:
        low, high = max(x_axis.low, y_axis.low), min(x_axis.high, y_axis.high)
        ends = f"M{x(low):.1f} {y(low):.1f}L{x(high):.1f} {y(high):.1f}"
        parts.append(f'<g class="reference"><path class="line" d="{ends}"{_dash(_DOTS)}/></g>')
    segments = [(line, _segments(line.points)) for line in lines]
    for line, pieces in segments:
        for piece in pieces:
            if len(piece) > 1 and all(e.error is not None for _, e in piece):
                upper = [f"{x(t):.1f} {y(e.mean + (e.error or 0)):.1f}" for t, e in piece]
                lower = [f"{x(t):.1f} {y(e.mean - (e.error or 0)):.1f}" for t, e in piece[::-1]]
                parts.append(
                    f'<path class="band {line.style.css}" d="M{"L".join(upper + lower)}z"/>'
                )
    for line, pieces in segments:
        parts.append(f'<g class="{line.style.css}">')
        for piece in pieces:
            path = "L".join(f"{x(t):.1f} {y(e.mean):.1f}" for t, e in piece)
            parts.append(f'<path class="line" d="M{path}"{_dash(line.style)}/>')
            if marked:
                parts += [_marker(line.style.marker, x(t), y(e.mean)) for t, e in piece]
        parts.append("</g>")
    return "".join(parts) + "</svg>"


def _segments(
    points: Sequence[tuple[float, Estimate] | None],
) -> list[list[tuple[float, Estimate]]]:
    pieces: list[list[tuple[float, Estimate]]] = [[]]
    for point in points:
        if point is None:
            pieces.append([])
        else:
            pieces[-1].append(point)
    return [piece for piece in pieces if piece]


def cell_colours(value: float, low: float) -> tuple[str, str]:
    """(fill, ink) of an accuracy on the scale from ``low`` to 1."""
    place = min(max((value - low) / (1 - low), 0.0), 1.0) * (len(_RAMP) - 1)
    index = min(int(place), len(_RAMP) - 2)
    mix = place - index
    pairs = zip(_RAMP[index], _RAMP[index + 1], strict=True)
    rgb = tuple(round(a + mix * (b - a)) for a, b in pairs)
    fill = "#{:02x}{:02x}{:02x}".format(*rgb)
    return fill, max(_INKS, key=lambda ink: contrast(fill, ink))


def contrast(a: str, b: str) -> float:
    """WCAG contrast ratio of two "#rrggbb" colours, 1 to 21."""

    def luminance(colour: str) -> float:
        channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def scale_floor(matrices: Sequence[Sequence[Row]]) -> float:
    """Where the colours of several heat maps start: the lowest accuracy, rounded down to 10 %."""
    values = [v for matrix in matrices for row in matrix for v in row if v is not None]
    return min(max(math.floor(round(10 * min(values), 9)) / 10, 0.0), 0.9) if values else 0.0


def heat_map_width(tasks: int) -> float:
    return 48 + tasks * _cell(tasks)[0] + 2


def _cell(tasks: int) -> tuple[float, float]:
    if tasks <= 6:
        return 46, 34
    return (36, 28) if tasks <= 12 else (round(360 / tasks, 2), round(300 / tasks, 2))


def named_axes(names: Sequence[str]) -> bool:
    """Whether a heat map has room for the names of its tasks, beside their numbers."""
    return len(names) <= 12 and all(len(name) <= 5 for name in names)


def heat_map(
    key: str, title: str, description: str, matrix: Sequence[Row], names: Sequence[str], low: float
) -> str:
    """The lower triangle of an accuracy matrix in %; a cell that was not measured stays empty.

    Names are written where they are short enough, task numbers elsewhere. Above twelve tasks the
    colours speak alone: the numbers would not be legible.
    """
    tasks = len(matrix)
    w, h = _cell(tasks)
    left, top = 48.0, 40.0
    labels = list(names) if named_axes(names) else [str(t + 1) for t in range(tasks)]
    every = math.ceil(tasks / 12)
    parts = [_open_svg(key, title, description, heat_map_width(tasks), top + tasks * h + 2)]
    parts.append(_text(left + tasks * w / 2, 12, "tested on task", extra=' class="axis"'))
    middle = top + tasks * h / 2
    turned = f' class="axis" transform="rotate(-90 11 {middle:g})"'
    parts.append(_text(11, middle, "after task", extra=turned))
    for t, row in enumerate(matrix):
        if t % every == 0:
            parts.append(_text(left + (t + 0.5) * w, top - 7, labels[t]))
            parts.append(_text(left - 6, round(top + (t + 0.5) * h + 4, 2), labels[t], "end"))
        for i, value in enumerate(row[: t + 1]):
            x, y = round(left + i * w, 2), round(top + t * h, 2)
            box = f'x="{x:g}" y="{y:g}" width="{w - 1:g}" height="{h - 1:g}"'
            if value is None or math.isnan(value):
                parts.append(f'<rect class="empty" {box}/>')
                continue
            fill, ink = cell_colours(value, low)
            parts.append(f'<rect {box} fill="{fill}"/>')
            if tasks <= 12:
                number = percent(value) if tasks <= 6 else f"{100 * value:.0f}"
                style = f' class="cell" style="fill:{ink}"'
                parts.append(_text(x + (w - 1) / 2, round(y + h / 2 + 4, 2), number, extra=style))
    return "".join(parts) + "</svg>"


def colour_bar(key: str, low: float) -> str:
    """The scale that the heat maps of a section share."""
    title = f"Colour scale from {100 * low:g} % to 100 % accuracy"
    stops = "".join(
        f'<stop offset="{k / 40:g}" stop-color="{cell_colours(low + (1 - low) * k / 40, low)[0]}"/>'
        for k in range(41)
    )
    gradient = f"{escape(key)}-ramp"
    return (
        _open_svg(key, title, "Light sand is low accuracy, dark blue is high.", 310, 18)
        + f'<defs><linearGradient id="{gradient}">{stops}</linearGradient></defs>'
        + _text(2, 13, f"{100 * low:g} %", "start")
        + f'<rect x="44" y="2" width="218" height="14" fill="url(#{gradient})"/>'
        + _text(308, 13, "100 %", "end")
        + "</svg>"
    )


def png(image: NDArray[np.uint8] | bytes) -> bytes:
    """A uint8 image, (H, W) grey or (H, W, 3) RGB, as PNG; PNG bytes pass unchanged.

    Raises:
        ValueError: the bytes are not a PNG file, or the array is empty or of another shape.
        TypeError: the array is not uint8; the scale of floats is the caller's to know.
    """
    if isinstance(image, bytes):
        if not image.startswith(_PNG) or len(image) < 24:
            raise ValueError("image bytes must be a PNG file; encode the picture as PNG first")
        return image
    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise TypeError(
            f"image must be uint8, got {array.dtype}; scale it to 0..255 and call .astype(np.uint8)"
        )
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise ValueError(f"image must be (H, W) or (H, W, 3), got shape {array.shape}")
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def png_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels, from the header of a PNG file."""
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
