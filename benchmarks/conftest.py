"""One thread, and a record of what was measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

from . import records
from .ratios import Ratio, Work, side_by_side
from .records import Row

Compare = Callable[..., Ratio]
_ROWS: list[Row] = []


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def record() -> Callable[[Row], None]:
    """Keep a measurement, then fail where it misses its bar."""

    def keep(row: Row) -> None:
        _ROWS.append(row)
        sys.stdout.write(row.line + "\n")
        assert row.met, row.line

    return keep


@pytest.fixture
def compare(record: Callable[[Row], None]) -> Compare:
    """Measure ours / reference side by side, and record it beside its bar."""

    def measure(
        ours: Work,
        reference: Work,
        *,
        bar: str,
        case: str,
        limit: float | None,
        **options: Any,
    ) -> Ratio:
        ratio = side_by_side(ours, reference, **options)
        details = {k: v for k, v in asdict(ratio).items() if k != "value"}
        record(Row(bar, case, ratio.value, limit, details=details))
        return ratio

    return measure


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _ROWS:
        return
    settings = {
        "arguments": [str(a) for a in config.invocation_params.args],
        "threads": 1,
        "clock": "CPU time of the process; median over interleaved rounds of ours / reference",
    }
    folder = records.write(_ROWS, settings)
    terminalreporter.section("ratios")
    for row in _ROWS:
        terminalreporter.write_line(row.line, red=not row.met)
    terminalreporter.write_line(f"record: {folder.relative_to(records.HERE.parent)}")
