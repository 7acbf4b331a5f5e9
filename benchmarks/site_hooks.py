"""For `make docs`: a site has no files outside of docs/ (records, examples, sources), so links to
them become their names. In the repository they lead where they say; tests/test_docs.py checks it.
"""

from __future__ import annotations

import re
from typing import Any

_OUT = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\((?:\.\./)+([^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by MkDocs for each page. Links within docs/, also ../ from integrations/, stay."""
    depth = page.file.src_uri.count("/")

    def named(match: re.Match[str]) -> str:
        ups = match[0].count("../")
        if ups <= depth:
            return match[0]
        picture, text, path, _ = match.groups()
        return f"{text} (`{path}`)" if text and not picture else f"`{path}`"

    return _OUT.sub(named, markdown)
