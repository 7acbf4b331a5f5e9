"""The documentation as a site: links out of it, and that no page is left out."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmarks.site_hooks import on_page_markdown

ROOT = Path(__file__).parent.parent
AT_TOP: Any = SimpleNamespace(file=SimpleNamespace(src_uri="units.md"))
BELOW: Any = SimpleNamespace(file=SimpleNamespace(src_uri="integrations/lightning.md"))


@pytest.mark.parametrize(
    ("page", "text", "wanted"),
    [
        (AT_TOP, "see [it](../benchmarks/x.json).", "see it (`benchmarks/x.json`)."),
        (AT_TOP, "[a [b] c](../README.md#top)", "a [b] c (`README.md`)"),
        (AT_TOP, "![what](../benchmarks/p.png)", "`benchmarks/p.png`"),
        (AT_TOP, "[units](units.md#x) and [y](integrations/lightning.md)", None),
        (BELOW, "[units](../units.md)", None),
        (BELOW, "[code](../../examples/a.py)", "code (`examples/a.py`)"),
    ],
)
def test_links_out_become_names(page: Any, text: str, wanted: str | None) -> None:
    assert on_page_markdown(text, page=page) == (text if wanted is None else wanted)


def test_every_page_is_in_the_site() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    listed = set(re.findall(r": (\S+\.md)$", nav, re.MULTILINE))
    docs = ROOT / "docs"
    assert listed == {str(p.relative_to(docs)) for p in docs.rglob("*.md")}
