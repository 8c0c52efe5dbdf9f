"""BENCHMARKS.md: each program that measures keeps a section of its own and leaves the others alone."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch

TITLE = "# Benchmarks\n"


def machine() -> str:
    """What the figures were measured on."""
    cores = f"{os.cpu_count()} CPU cores ({platform.processor() or platform.machine()})"
    if torch.cuda.is_available():
        cores = f"{torch.cuda.get_device_name()}, {cores}"
    return f"{cores}, Python {platform.python_version()}, torch {torch.__version__}"


def write_section(page: Path, name: str, text: str) -> None:
    """Replace the section `name`, or add it at the end."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    section = f"{begin}{text.rstrip()}\n{end}"
    before = page.read_text() if page.exists() else TITLE
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    found = pattern.search(before)
    page.write_text(
        f"{before.rstrip()}\n\n{section}"
        if found is None
        else before[: found.start()] + section + before[found.end() :]
    )


def table_lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *(f"| {' | '.join(row)} |" for row in rows)]
