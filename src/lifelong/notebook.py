"""Small tables that notebooks show for values: plain HTML, every text escaped, no script, no style
sheet, so that they look like the notebook's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def table(
    title: str,
    rows: Sequence[Sequence[object]],
    *,
    columns: Sequence[object] = (),
    note: str = "",
) -> str:
    """rows: a name and its values each; columns: what the values are, where there are several."""
    parts = [f"<table><caption>{escape(title)}</caption>"]
    if columns:
        heads = "".join(f'<th scope="col">{escape(str(c))}</th>' for c in columns)
        parts.append(f"<thead><tr><td></td>{heads}</tr></thead>")
    parts.append("<tbody>")
    for name, *values in rows:
        cells = "".join(f"<td>{escape(str(value))}</td>" for value in values)
        parts.append(f'<tr><th scope="row">{escape(str(name))}</th>{cells}</tr>')
    parts.append("</tbody></table>")
    return "".join(parts) + (f"<p>{escape(note)}</p>" if note else "")
