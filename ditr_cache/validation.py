"""Whether a value of a JSON document is what its field declares: the type, and the limits of an `Annotated` one.

A document may come from a stranger, with a checksum that fits. Nothing in it is believed before it was looked at: a
count of 2^62 points, a shape with a negative side or a path that leads out of its folder is refused where the document
is read, and names the field, not where it would have been used.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

Check = Callable[[Any], None]
"""Raises `FieldError` for a value that does not serve."""

WHOLE_MAX = 2**63 - 1
"""Largest magnitude of a whole number without limits of its own: one of NumPy's int64."""

FLOAT_MAX = 1e300
"""Largest magnitude of any other number. JSON as Python reads it holds NaN and infinities; these are refused."""


@dataclass(frozen=True)
class Between:
    """Limits of a number, both allowed."""

    least: float
    most: float


@dataclass(frozen=True)
class Text:
    """What a text looks like.

    Args:
        pattern: regular expression of the whole text.
        described: the same in words, for the error.
    """

    pattern: str
    described: str


@dataclass(frozen=True)
class OneOf:
    """The values that there are."""

    choices: tuple[str, ...]


class FieldError(ValueError):
    """What was expected of a field, and what was found; `path` leads to the field."""

    def __init__(self, expected: str, got: Any) -> None:
        found = got[:100] if isinstance(got, str) else got
        shown = repr(found) if isinstance(found, str | int | float | None) else type(found).__name__
        super().__init__(f"expected {expected}, got {shown[:120]}")
        self.path = ""

    def below(self, step: str) -> FieldError:
        """The same error, one level further out."""
        self.path = step + self.path
        return self

    def __str__(self) -> str:
        return f"{self.path.lstrip('.')}: {self.args[0]}" if self.path else str(self.args[0])


@cache
def checker(hint: Any) -> Check:
    """The check of values of a type hint.

    Args:
        hint: a dataclass, or `str`, `int`, `float`, `bool`, `None`, unions of these, `tuple`s and `dict`s by text of
            anything listed here, and `Annotated` with one of the limits above. Tuples are lists in JSON, dataclasses
            are objects. Keys that a dataclass lacks, and fields that are absent, are left to its constructor.

    Raises:
        TypeError: another hint: a mistake of the code, not of a document.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _object(hint)
    if origin is Annotated:
        return _limited(arguments[0], arguments[1])
    if origin in (Union, types.UnionType):
        return _any_of([checker(a) for a in arguments], str(hint))
    if origin is tuple:
        return _list(arguments)
    if origin is dict:
        return _dict(checker(arguments[0]), checker(arguments[1]))
    if hint is int:
        return _limited(int, Between(-WHOLE_MAX, WHOLE_MAX))
    if hint is float:
        return _limited(float, Between(-FLOAT_MAX, FLOAT_MAX))
    if hint in (str, bool, types.NoneType):
        return _exactly(hint)
    raise TypeError(f"no check of values of type {hint!r}")


def _exactly(kind: type) -> Check:
    words = {str: "a text", bool: "true or false", types.NoneType: "null"}[kind]

    def check(value: Any) -> None:
        if type(value) is not kind:
            raise FieldError(words, value)

    return check


def _limited(kind: type, limit: Between | Text | OneOf) -> Check:
    if isinstance(limit, Text):
        matches, described = re.compile(limit.pattern).fullmatch, limit.described

        def check(value: Any) -> None:
            if type(value) is not str or not matches(value):
                raise FieldError(described, value)

    elif isinstance(limit, OneOf):

        def check(value: Any) -> None:
            if type(value) is not str or value not in limit.choices:
                raise FieldError(" or ".join(map(repr, limit.choices)), value)

    else:
        kinds = (int,) if kind is int else (int, float)
        words = "a whole number" if kind is int else "a number"

        def check(value: Any) -> None:
            # A bool is an int to `isinstance`, and NaN is in no range.
            if type(value) not in kinds or not limit.least <= value <= limit.most:
                raise FieldError(f"{words} from {limit.least} to {limit.most}", value)

    return check


def _any_of(checks: Sequence[Check], words: str) -> Check:
    def check(value: Any) -> None:
        faults = []
        for single in checks:
            try:
                return single(value)
            except FieldError as fault:
                faults.append(fault)
        # The one that tells most: of `int | None`, the limits of the number, not that it is no null.
        raise next((f for f in faults if f.path or "null" not in f.args[0]), FieldError(words, value))

    return check


def _list(arguments: Sequence[Any]) -> Check:
    of_any_length = len(arguments) == 2 and arguments[1] is Ellipsis
    items = [checker(a) for a in (arguments[:1] if of_any_length else arguments)]

    def check(value: Any) -> None:
        if not isinstance(value, list | tuple):
            raise FieldError("a list", value)
        if not of_any_length and len(value) != len(items):
            raise FieldError(f"a list of {len(items)}", value)
        position = 0
        try:
            for position, item in enumerate(value):
                items[0 if of_any_length else position](item)
        except FieldError as fault:
            raise fault.below(f"[{position}]") from None

    return check


def _dict(of_keys: Check, of_values: Check) -> Check:
    def check(value: Any) -> None:
        if not isinstance(value, dict):
            raise FieldError("an object", value)
        key: Any = None
        try:
            for key, item in value.items():
                of_keys(key)
                of_values(item)
        except FieldError as fault:
            raise fault.below(f"[{str(key)[:100]!r}]") from None

    return check


def _object(cls: Any) -> Check:
    hints = get_type_hints(cls, include_extras=True)
    checks = {field.name: checker(hints[field.name]) for field in dataclasses.fields(cls)}

    def check(value: Any) -> None:
        if not isinstance(value, dict):
            raise FieldError("an object", value)
        name = ""
        try:
            for name, item in value.items():
                if name in checks:
                    checks[name](item)
        except FieldError as fault:
            raise fault.below(f".{name}") from None

    return check
