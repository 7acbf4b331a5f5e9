"""A report's tables and figures as files for a paper: CSV, LaTeX, SVG and PNG."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from ..checkpoint import write
from ..plots import learning_curves, matrix
from .results import Report, Section
from .table import COLUMNS, summary_rows

_LATEX = str.maketrans({
    "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}",
    "±": r"$\pm$", "–": "--", "×": r"$\times$", "λ": r"$\lambda$",
})  # fmt: skip


def write_files(report: Report, folder: Path) -> list[Path]:
    """Of each section k = 1, 2, ...: table-k.csv and .tex; matrices-k.csv, every accuracy of every
    seed; curves-k.svg and .png, and matrix-k-METHOD.svg and .png. Those of the same names are
    replaced; the paths.

    Raises ImportError where matplotlib is missing, OSError where the folder cannot be written.
    """
    from matplotlib import rc_context

    written: list[Path] = []

    def save(name: str, content: str | bytes) -> None:
        write(folder / name, content)
        written.append(folder / name)

    for k, section in enumerate(report.sections, start=1):
        save(f"table-{k}.csv", table_csv(section))
        save(f"table-{k}.tex", table_latex(section))
        save(f"matrices-{k}.csv", matrices_csv(section))
        figures = {f"curves-{k}": learning_curves(
            {m.label: [[r.accuracy_after(t + 1) for t in range(len(r.accuracy))] for r in m.runs]
             for m in section.methods},
            title="Average accuracy on the tasks seen so far",
        )}  # fmt: skip
        for method in section.methods:
            name = f"matrix-{k}-{_file(method.label)}"
            if name in figures:  # of labels that differ in signs alone
                name += f"-{len(figures)}"
            figures[name] = matrix(
                method.mean_matrix, section.task_names, title=f"Accuracy (%): {method.label}"
            )
        for name, figure in figures.items():
            for kind in ("svg", "png"):
                out = io.BytesIO()
                # Without a date and random names the same report gives the same file.
                stamp = {"Date": None} if kind == "svg" else None
                with rc_context({"svg.hashsalt": name}):
                    figure.savefig(out, format=kind, dpi=200, metadata=stamp)
                save(f"{name}.{kind}", out.getvalue())
    return written


def table_csv(section: Section) -> str:
    """A row for each method, numbers unrounded; errors are standard errors over seeds."""
    rows = [("method", "seeds", "accuracy", "accuracy_error", "forgetting", "forgetting_error",
             "memory_examples", "memory_bytes", "seconds")]  # fmt: skip
    for m in section.methods:
        pairs = [(e.mean, e.error) if e else (None, None) for e in (m.final_accuracy, m.forgetting)]
        rows.append((m.label, len(m.runs), *pairs[0], *pairs[1],
                     m.memory_examples, m.memory_bytes, m.seconds))  # type: ignore[arg-type]  # fmt: skip
    return _csv(rows)


def matrices_csv(section: Section) -> str:
    """method, seed, after, on, accuracy: tasks by name, accuracies as fractions."""
    rows: list[tuple[object, ...]] = [("method", "seed", "after", "on", "accuracy")]
    for m in section.methods:
        for run in m.runs:
            for t, row in enumerate(run.accuracy):
                for i, value in enumerate(row[: t + 1]):
                    names = section.task_names
                    rows.append((m.label, run.seed, names[t], names[i], value))
    return _csv(rows)


def _csv(rows: list) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def table_latex(section: Section) -> str:
    """The report's table with booktabs: what the page shows, to the same digits."""
    lines = [
        r"\begin{tabular}{l" + "r" * (len(COLUMNS) - 1) + "}",
        r"\toprule",
        " & ".join(latex(name) for name in COLUMNS.values()) + r" \\",
        r"\midrule",
        *(" & ".join(latex(row[key]) for key in COLUMNS) + r" \\" for row in summary_rows(section)),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "% needs \\usepackage{booktabs}\n" + "\n".join(lines) + "\n"


def latex(text: str) -> str:
    """Plain text as LaTeX shows it."""
    return text.translate(_LATEX)


def _file(label: str) -> str:
    """Of letters, digits and hyphens."""
    kept = "".join(c if c.isalnum() and c.isascii() else "-" for c in label.lower())
    return "-".join(part for part in kept.split("-") if part) or "method"
