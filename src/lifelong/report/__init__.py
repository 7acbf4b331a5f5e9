"""The report: what a run found, as one HTML page and as a table for the terminal.

Made from plain values (``Report`` and what it holds), so it needs no model and no data; ``of_runs``
reads them from folders, ``write_files`` has tables and figures for a paper.
"""

from .files import write_files
from .of_runs import of_runs
from .page import answer, render, write
from .results import (
    Estimate,
    Gallery,
    MethodResult,
    Picture,
    Report,
    RunSummary,
    Section,
)
from .table import COLUMNS, summary_rows, summary_table

__all__ = [
    "COLUMNS",
    "Estimate",
    "Gallery",
    "MethodResult",
    "Picture",
    "Report",
    "RunSummary",
    "Section",
    "answer",
    "of_runs",
    "render",
    "summary_rows",
    "summary_table",
    "write",
    "write_files",
]
