"""The summary of a section as rows of text, and as a table for the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from .results import Estimate, MethodResult, Section

# Keys of summary_rows, in order, and what a reader calls them.
COLUMNS = {
    "method": "Method",
    "accuracy": "Final accuracy (%)",
    "forgetting": "Forgetting (points)",
    "memory_examples": "Memory (examples)",
    "memory_bytes": "Memory (size)",
    "seconds": "Time",
}
_TERMINAL = ("Method", "Accuracy\n%", "Forgetting\npoints", "Memory\nexamples", "\nsize", "\nTime")
MISSING = "–"


def percent(value: float) -> str:
    """0.9871 -> "98.7"; never "-0.0"."""
    return f"{round(100 * value, 1) + 0.0:.1f}"


def estimate_text(estimate: Estimate | None) -> str:
    """Mean ± standard error in percent; the mean alone where there is one seed."""
    if estimate is None:
        return MISSING
    if estimate.error is None:
        return percent(estimate.mean)
    return f"{percent(estimate.mean)} ± {percent(estimate.error)}"


def count_text(count: float) -> str:
    """1437.0 -> "1,437"; a mean that is not whole keeps one decimal."""
    return f"{count:,.0f}" if float(count).is_integer() else f"{count:,.1f}"


def bytes_text(count: float) -> str:
    """Decimal units: 25600 -> "25.6 kB"."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:,.1f} TB"


def seconds_text(seconds: float) -> str:
    """5.62 -> "5.6 s", 90.0 -> "90 s", 300.0 -> "5.0 min", 10000.0 -> "2.8 h"."""
    units = ((1, "s"), (60, "min"), (3600, "h"))
    size, unit = next(((n, u) for n, u in units if seconds / n < 119.5), units[-1])
    amount = seconds / size
    return f"{amount:.1f} {unit}" if amount < 9.95 else f"{amount:,.0f} {unit}"


def summary_rows(section: Section) -> list[dict[str, str]]:
    """One dict per method, in the section's order, with the keys of ``COLUMNS``."""
    return [
        {
            "method": method.label,
            "accuracy": estimate_text(method.final_accuracy),
            "forgetting": estimate_text(method.forgetting),
            "memory_examples": count_text(method.memory_examples),
            "memory_bytes": bytes_text(method.memory_bytes),
            "seconds": seconds_text(method.seconds),
        }
        for method in section.methods
    ]


def reading_note(section: Section, mark: str = "Bold:") -> str:
    """What ± and the mark of the best mean in this table, in one or two sentences."""
    rivals = [method for method in section.methods if not method.is_reference]
    counts = {len(method.runs) for method in section.methods}
    if counts == {1}:
        note = "One seed, so no standard errors"
        return f"{note}, and no method can be called the best." if len(rivals) > 1 else f"{note}."
    seeds = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{section.seeds}"
    note = f"Mean ± standard error over {seeds} seeds."
    if len(rivals) < 2:
        return note
    if section.best("final_accuracy") or section.best("forgetting"):
        return (
            f"{note} {mark} ahead of every other method by more than two standard errors of the "
            "difference."
        )
    return f"{note} No method is ahead of all others by two standard errors, so none is marked."


def summary_table(section: Section) -> Table:
    """The rows for a terminal of 80 columns: a star at the real best, references dim."""
    table = Table(
        title=Text(section.title, style="bold"),
        caption=Text(reading_note(section, mark="*")),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in _TERMINAL:
        numeric = name != "Method"
        table.add_column(
            name, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold"
        )
    best = {
        "accuracy": section.best("final_accuracy"),
        "forgetting": section.best("forgetting"),
    }

    def cell(method: MethodResult, key: str, text: str) -> Text:
        if best.get(key) is method:
            return Text(f"{text} *", style="bold")
        # Room for the star keeps the digits of a column below each other.
        return Text(f"{text}  " if best.get(key) else text)

    for method, row in zip(section.methods, summary_rows(section), strict=True):
        label = f"{row['method']} (reference)" if method.is_reference else row["method"]
        numbers = [cell(method, key, row[key]) for key in COLUMNS if key != "method"]
        table.add_row(Text(label), *numbers, style="dim" if method.is_reference else None)
    return table
