"""YAML of recipes, which may come from strangers: plain values alone, within limits that are checked before it is made.

`safe_load` makes no objects, but believes what it is told of structure: a page of aliases of aliases stands for more
values than any machine holds, and a page of brackets takes minutes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 2**18
"""Largest file: those that come with the package have less than 10 000 bytes."""

MAX_DEPTH = 24
"""Most sections and lists within each other; a recipe has five."""

MAX_VALUES = 20_000
"""Most values of a file, where each alias counts as all that it stands for."""


class YamlError(ValueError):
    """Text that is not YAML, or not of a recipe; the message says where."""


def read_yaml(path: Path) -> Any:
    """Plain values of a file.

    Raises:
        YamlError: no text, too large, or as of `parse_yaml`.
        OSError: it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise YamlError("it is no file")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise YamlError(f"larger than {MAX_BYTES} bytes, which no recipe is")
    return parse_yaml(content.decode())


def parse_yaml(text: str) -> Any:
    """Plain values of a text.

    Raises:
        YamlError: no YAML, tags of Python's objects, or beyond `MAX_DEPTH` or `MAX_VALUES`.
    """
    try:
        _check_size(text)
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that is none
        raise YamlError(str(error)) from error


def _check_size(text: str) -> None:
    """Raise `YamlError` for more than a recipe may hold, seen from the events of the parser: nothing is built yet."""
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and number of values before it
    sizes: dict[str, int] = {}  # values below an anchor
    values = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            values += sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor:
                sizes[anchor] = values - before
        if len(open_nodes) > MAX_DEPTH:
            raise YamlError(f"more than {MAX_DEPTH} sections and lists within each other")
        if values > MAX_VALUES:
            raise YamlError(f"more than {MAX_VALUES} values, aliases counted as what they stand for")
