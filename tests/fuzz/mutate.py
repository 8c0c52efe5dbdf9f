"""Deterministic mutation of valid files: what a careless tool, a bad disk or an attacker would make of them."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from random import Random

WHOLE = (
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**60,
    2**62,
    2**63,
    2**64 - 1,
)
BROKEN_NUMBERS = (
    b"0", b"-1", b"1e999", b"-1e308", b"nan", b"inf", b"1e-320", b"0.5", b"2147483648", b"4294967296", b"60000",
    b"1152921504606846976", b"9223372036854775808", b"99999999999999999999", b"9" * 5000, b"1_000", b"\xd9\xa3",
)  # fmt: skip
BROKEN_VALUES = (
    b"null", b"true", b"[]", b"{}", b'""', b'"../../x"', b'"/etc/passwd"', b'"\\u0000"', b'"\\ud800"', b"[" * 5000,
    b"[[1, 2], 3]", b'{"a": {"a": {}}}', b"1", b"-1", b"1e400", b'"' + b"x" * 3000 + b'"',
)  # fmt: skip
FLOATS = (float("nan"), float("inf"), -float("inf"), 1e308, 3e38, 1e-320, -0.0, 1e15)

_NUMBER = re.compile(rb"(?<![\w.])-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_VALUE = re.compile(rb'(?<=[:,\[])\s*("(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|true|false|null)')
_HEADER = 600  # bytes at which most formats say how much follows


def mutated(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """One to four mutations of `data`; `others` are what it may be spliced with."""
    for _ in range(random.choice((1, 1, 2, 4))):
        data = random.choice(MUTATIONS)(data, others, random)
    return data[: 1 << 22]


def _place(data: bytes, random: Random) -> int:
    end = min(len(data), _HEADER) if random.random() < 0.6 else len(data)
    return random.randrange(end) if end else 0


def _span(data: bytes, random: Random) -> tuple[int, int]:
    start = _place(data, random)
    return start, min(len(data), start + 1 + int(len(data) ** random.random()))


def flip(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Some flipped bits."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 3, 20)) if data else 0):
        changed[_place(data, random)] ^= 1 << random.randrange(8)
    return bytes(changed)


def cut(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """The file ends early."""
    return data[: random.randrange(len(data) + 1)]


def remove(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """A part lacks."""
    start, stop = _span(data, random)
    return data[:start] + data[stop:]


def repeat(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """A part stands there several times."""
    start, stop = _span(data, random)
    return data[:start] + data[start:stop] * random.choice((2, 2, 9)) + data[stop:]


def splice(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """The start of one file, the end of another."""
    other = random.choice(others)
    return data[: _place(data, random)] + other[_place(other, random) :]


def whole_number(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """An absurd integer of 1 to 8 bytes, of either byte order."""
    size = random.choice((1, 2, 4, 4, 8, 8))
    order: str = random.choice(("little", "little", "big"))
    value = (random.choice(WHOLE) % (1 << 8 * size)).to_bytes(size, order)  # type: ignore[arg-type]
    at = _place(data, random)
    return data[:at] + value + data[at + size :]


def floating(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """A float that is none, or too large or small."""
    with_size = random.choice(("<f", "<d"))
    value = random.choice(FLOATS)
    raw = struct.pack(with_size, value if with_size == "<d" or abs(value) < 1e38 or value != value else 3e38)
    at = _place(data, random)
    return data[:at] + raw + data[at + len(raw) :]


def number_in_text(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Another number in place of one that is written in digits."""
    found = list(_NUMBER.finditer(data[: 1 << 16]))
    if not found:
        return flip(data, others, random)
    match = random.choice(found[:40] if random.random() < 0.5 else found)
    return data[: match.start()] + random.choice(BROKEN_NUMBERS) + data[match.end() :]


def value_in_text(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Another value in place of one of JSON."""
    found = list(_VALUE.finditer(data[: 1 << 16]))
    if not found:
        return number_in_text(data, others, random)
    match = random.choice(found)
    return data[: match.start(1)] + random.choice(BROKEN_VALUES) + data[match.end(1) :]


def lines(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """A line less, twice, or at another place."""
    rows = data.split(b"\n")
    at, to = random.randrange(len(rows)), random.randrange(len(rows))
    kind = random.randrange(3)
    if kind == 0:
        del rows[at]
    elif kind == 1:
        rows.insert(to, rows[at])
    else:
        rows[at], rows[to] = rows[to], rows[at]
    return b"\n".join(rows)


MUTATIONS = (
    flip, cut, remove, repeat, splice, whole_number, whole_number, floating, number_in_text, value_in_text, lines,
)  # fmt: skip
