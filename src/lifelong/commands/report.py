"""``lifelong report``: one page of runs, and their figures and tables as files."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ..config import UsageError, _default
from .flags import parse

ABOUT = """\
Write the report of runs on the same tasks: one HTML page that loads nothing from
elsewhere and prints well; with --files also its figures (SVG, PNG) and tables
(CSV, LaTeX)."""

EXAMPLES = """
examples:
  lifelong report runs/x
  lifelong report runs/x runs/y --out both.html --files paper/
"""


@dataclass(frozen=True)
class ReportFlags:
    """All flags of ``lifelong report``."""

    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN ...")]
    """Folders of runs, made by lifelong run; the first one's memory is shown."""
    out: Annotated[Path | None, arg(metavar="FILE"), _default("report.html in the first RUN")] = (
        None
    )
    """The page; an older one is replaced."""
    files: Annotated[Path | None, arg(metavar="DIR"), _default("none")] = None
    """Folder for figures and tables."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""
    debug: bool = False
    """Show the whole traceback of an error."""


def report(args: list[str]) -> int:
    """The exit code."""
    flags = parse(ReportFlags, "lifelong report", ABOUT, EXAMPLES, args)
    if not flags.runs:
        raise UsageError("say which runs: lifelong report runs/x")
    from ..report import of_runs, write, write_files

    out = flags.out or flags.runs[0] / "report.html"
    if out.exists() and not (out.is_file() and out.suffix.lower() in (".html", ".htm")):
        raise UsageError(f"--out {out} is there, and is no .html file, which may be replaced")
    page = of_runs(flags.runs, shlex.join(["lifelong", "report", *args]))
    written = [] if flags.files is None else write_files(page, flags.files)
    write(page, out)
    if flags.json:
        content = {"report": str(out), "files": [str(path) for path in written]}
        sys.stdout.write(json.dumps(content) + "\n")
        return 0
    sys.stdout.write(f"{out}\n")
    if written:
        sys.stdout.write(f"{len(written)} figures and tables in {flags.files}\n")
    return 0
