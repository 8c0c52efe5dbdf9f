"""Checks that settings of transforms share."""

from __future__ import annotations

from ditr_cache.errors import UsageError


def check_fractions(transform: object, *names: str) -> None:
    """Raise `UsageError` where one of the fields is outside 0..1."""
    for name in names:
        if not 0 <= getattr(transform, name) <= 1:
            raise UsageError(f"{type(transform).__name__}: expected {name} in 0..1, got {getattr(transform, name)}")


def check_not_negative(transform: object, *names: str) -> None:
    """Raise `UsageError` where one of the fields, a number or several, is below 0."""
    for name in names:
        value = getattr(transform, name)
        if min(value if isinstance(value, tuple) else (value,)) < 0:
            raise UsageError(f"{type(transform).__name__}: expected {name} >= 0, got {value}")
