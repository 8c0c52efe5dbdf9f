"""Tables of text, for a terminal, as Markdown and as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

import rich.table
from rich.markup import escape


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of text.

    Args:
        title: what is in it.
        columns: their heads; the first one names the row.
        rows: as many cells each as there are columns.
        best: (row, column) of the cells to be marked as the best of their row.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = field(default_factory=frozenset)


def as_rich(table: Table) -> rich.table.Table:
    """The table for a terminal."""
    shown = rich.table.Table(title=escape(table.title), title_justify="left")
    for i, column in enumerate(table.columns):
        shown.add_column(escape(column), justify="left" if i == 0 else "right", overflow="fold")
    for r, row in enumerate(table.rows):
        cells = [escape(cell) for cell in row]
        shown.add_row(*(f"[bold]{c}*[/bold]" if (r, i) in table.best else c for i, c in enumerate(cells)))
    return shown


def as_markdown(found: Sequence[Table]) -> str:
    """The tables to be pasted into a text; the best cells are bold."""
    blocks = []
    for table in found:
        lines = [f"**{_md(table.title)}**", "", "| " + " | ".join(map(_md, table.columns)) + " |"]
        lines.append("|" + "|".join("---" if i == 0 else "---:" for i in range(len(table.columns))) + "|")
        for r, row in enumerate(table.rows):
            cells = [f"**{_md(cell)}**" if (r, i) in table.best else _md(cell) for i, cell in enumerate(row)]
            lines.append("| " + " | ".join(cells) + " |")
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def as_html(found: Sequence[Table]) -> str:
    """The tables as an HTML fragment."""
    blocks, marked = [], ' class="best"'
    for table in found:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
        body = "".join(
            "<tr>"
            + "".join(
                f"<td{marked if (r, i) in table.best else ''}>{html.escape(cell)}</td>" for i, cell in enumerate(row)
            )
            + "</tr>\n"
            for r, row in enumerate(table.rows)
        )
        blocks.append(
            f"<h2>{html.escape(table.title)}</h2>\n<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>\n"
        )
    return "".join(blocks)


def _md(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
