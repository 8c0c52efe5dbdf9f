"""Rows of JSON tables of gigabytes, in bounded memory. A file holds one array of objects, formatted in any way.

`rows` parses a file piece by piece. `rows_where` finds a few rows among many: in tables of flat objects, as tools write
them, it searches the bytes and parses only what it found, several times as fast; whatever is not as expected there
sends it to the parser. Both give the same for every file.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import DataError, MissingDataError

Row = dict[str, Any]
Wanted = Collection[str] | Literal[True]

CHUNK = 1 << 18
"""Bytes that are read at once: what is searched several times over stays in the processor's cache."""

MAX_ROW = 1 << 24
"""Most characters of one row: more is no table."""

_BLANKS = re.compile(r"[ \t\r\n]*")
_MAX_GAP = 256  # blanks before the first row, between two, or behind the last


def rows(path: Path, remedy: str) -> Iterator[Row]:
    """Every row of a table, in order.

    Args:
        path: of the file.
        remedy: what to do where it cannot be used, say which download it comes from; ends the message of every error.

    Raises:
        MissingDataError: no such file.
        DataError: not an array of objects, or cut off; the rows before were given.
    """
    with _opened(path, remedy) as file:
        text = _Text(path, file, remedy)
        text.take("[", "an array of objects")
        if text.peek() != "]":
            yield text.row()
            while text.peek() == ",":
                text.take(",", "a comma")
                yield text.row()
        text.take("]", "a comma, or the end of the array")
        if text.peek():
            raise text.broken("nothing behind the end of the array")


def rows_where(path: Path, key: str, wanted: Wanted, remedy: str) -> Iterator[Row]:
    """The rows of a table, in order, whose `key` is one of the strings `wanted`, or is `true` where that is wanted.

    Args:
        path, remedy: see `rows`, which raises the same.
        key: of a row.
        wanted: values; the file is read to its end, whatever they are.
    """
    given = 0
    try:
        for row in _search(path, key, wanted, remedy):
            given += 1
            yield row
    except _UnexpectedError:
        parsed = (row for row in rows(path, remedy) if _is_wanted(row.get(key), wanted))
        yield from islice(parsed, given, None)


def check_ends(path: Path, remedy: str) -> None:
    """Whether a table is there and is an array from its first to its last character; nothing between is read.

    Raises as `rows` does.
    """
    with _opened(path, remedy) as file:
        first = file.read(_MAX_GAP).removeprefix(codecs.BOM_UTF8).strip()[:1]
        file.seek(max(0, path.stat().st_size - _MAX_GAP))
        last = file.read(_MAX_GAP).strip()[-1:]
    if (first, last) != (b"[", b"]"):
        raise DataError(f"{path}: expected an array, from [ to ]; the table is truncated or damaged; {remedy}")


def _is_wanted(value: object, wanted: Wanted) -> bool:
    return value is True if wanted is True else isinstance(value, str) and value in wanted


@contextmanager
def _opened(path: Path, remedy: str) -> Iterator[IO[bytes]]:
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise MissingDataError(f"{path}: no such file; {remedy}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); {remedy}") from error


class _Text:
    """A file's text, of which a window is in memory; reads on as needed."""

    def __init__(self, path: Path, file: IO[bytes], remedy: str) -> None:
        self._path, self._file, self._remedy = path, file, remedy
        self._decode = codecs.getincrementaldecoder("utf-8-sig")(errors="replace").decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._at, self._before = "", 0, 0

    def peek(self) -> str:
        """The next character that is not blank; empty at the end of the file."""
        while True:
            blanks = _BLANKS.match(self._text, self._at)
            assert blanks is not None
            self._at = blanks.end()
            if self._at < len(self._text) or not self._read():
                return self._text[self._at : self._at + 1]

    def take(self, character: str, what: str) -> None:
        """Go past `character`. Raises `DataError` where another stands there."""
        if self.peek() != character:
            raise self.broken(what)
        self._at += 1

    def row(self) -> Row:
        """The object that begins here. Raises `DataError` where none does."""
        if self.peek() != "{":
            raise self.broken("an object")
        while True:
            try:
                row, self._at = self._parse(self._text, self._at)
            except (ValueError, RecursionError):  # cut off where the window ends, or no JSON at all
                if len(self._text) - self._at > MAX_ROW or not self._read():
                    raise self.broken("a whole object") from None
            else:
                return dict(row)

    def broken(self, expected: str) -> DataError:
        """The error for something else than `expected` at this place."""
        found = self._text[self._at : self._at + 40]
        return DataError(
            f"{self._path}: expected {expected} at character {self._before + self._at}, got "
            f"{repr(found) if found else 'the end of the file'}; the table is truncated or damaged; {self._remedy}"
        )

    def _read(self) -> bool:
        """Add a piece to the window, and drop what lies behind; False at the end of the file."""
        piece = self._file.read(CHUNK)
        self._before += self._at
        self._text, self._at = self._text[self._at :] + self._decode(piece, final=not piece), 0
        return bool(piece)


# --- search ---------------------------------------------------------------------------------------------------------


class _UnexpectedError(Exception):
    """Something that only the parser understands."""


def _search(path: Path, key: str, wanted: Wanted, remedy: str) -> Iterator[Row]:
    """The wanted rows of a table of flat objects. Raises `_UnexpectedError` where a part of it is anything else."""
    value, found = ("true", {b"true"}) if wanted is True else ('"[^"]*"', {json.dumps(w).encode() for w in wanted})
    if not key.isidentifier() or any(b"\\" in text for text in found):
        raise _UnexpectedError
    pattern = re.compile(f'"{key}"[ \\t\\r\\n]*:[ \\t\\r\\n]*({value})'.encode())
    rest, lead = b"", b"["
    with _opened(path, remedy) as file:
        while piece := file.read(CHUNK):
            rest += piece
            end = rest.rfind(b"}") + 1
            if end:
                block, rest = rest[:end], rest[end:]
                starts, ends = _spans(block, lead)
                hits = [m.start() for m in pattern.finditer(block) if m[1] in found]
                which = np.unique(np.searchsorted(starts, hits) - 1)
                texts = [block[a:b] for a, b in zip(starts[which].tolist(), ends[which].tolist(), strict=True)]
                yield from _parsed(texts, key, wanted)
                lead = b","
            elif len(rest) > MAX_ROW:
                raise _UnexpectedError
    if rest.translate(None, b" \t\r\n") != (b"[]" if lead == b"[" else b"]"):
        raise _UnexpectedError


def _spans(block: bytes, lead: bytes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where the objects of a block begin and end. It starts behind an object and ends with one; none is in another.

    `lead` has to stand before the first. A brace in a string makes a span that is no object, and fails to parse.
    """
    characters = np.frombuffer(block, dtype=np.uint8)
    braces = np.flatnonzero(characters >= ord("{"))  # beyond it in ASCII: | } ~
    kind = characters[braces]
    is_brace = (kind == ord("{")) | (kind == ord("}"))
    braces, kind = braces[is_brace], kind[is_brace]
    starts, ends = braces[::2], braces[1::2] + 1
    if len(kind) % 2 or (kind[::2] != ord("{")).any() or (kind[1::2] != ord("}")).any() or b"\\" in block:
        raise _UnexpectedError
    gaps = starts[1:] - ends[:-1]
    if block[: starts[0]].strip(b" \t\r\n") != lead or starts[0] > _MAX_GAP:
        raise _UnexpectedError
    if len(gaps):
        width = int(gaps[0])
        if (gaps != width).any() or width > _MAX_GAP or block[ends[0] : starts[1]].strip(b" \t\r\n") != b",":
            raise _UnexpectedError
        between = characters[ends[:-1, None] + np.arange(width)]
        if (between != between[0]).any():
            raise _UnexpectedError
    return starts, ends


def _parsed(texts: list[bytes], key: str, wanted: Wanted) -> list[Row]:
    """The objects in `texts`. Raises `_UnexpectedError` where they are not what was searched for."""
    try:
        found = json.loads(b"[" + b",".join(texts) + b"]")
    except (ValueError, RecursionError) as error:
        raise _UnexpectedError from error
    if len(found) != len(texts):
        raise _UnexpectedError
    if not all(isinstance(row, dict) and _is_wanted(row.get(key), wanted) for row in found):
        raise _UnexpectedError
    return found
