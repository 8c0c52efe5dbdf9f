"""Errors of the cache. Each is a `CacheError` and its nearest built-in twin.

A message states what is wrong, what was expected, what was found, and the remedy, and it names the dataset, sample
and view where there are any. `CacheError` never reaches a user as a traceback: the command lines print its message
and exit with `exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class CacheError(Exception):
    """Base of everything that this package raises on purpose. Exit code 2: wrong use or unusable input."""

    exit_code = 2

    def __str__(self) -> str:  # KeyError and OSError twins would otherwise print a repr or an errno
        return "\n".join([str(self.args[0]) if self.args else "", *getattr(self, "__notes__", [])]).strip()


class UsageError(CacheError, ValueError):
    """A setting or an argument that cannot be used."""


class UnknownNameError(CacheError, KeyError):
    """A name that is in no list: a dataset, VFM, sample, split or recipe."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str], remedy: str = "") -> UnknownNameError:
        """Error that lists the nearest known names (or the first few, where none is near)."""
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        if near:
            hint = "did you mean " + " or ".join(repr(n) for n in near) + "?"
        elif names:
            hint = "known: " + shortened(names, 12)
        else:
            hint = "there are none"
        stop = "" if hint.endswith("?") else "."
        return cls(f"unknown {kind} {name!r}: {hint}" + (f"{stop} {remedy}" if remedy else ""))


class DataError(CacheError, ValueError):
    """Input that can be opened but not used: truncated, of another length than announced, not finite."""


class MissingDataError(DataError, FileNotFoundError):
    """Input that is not there."""


class DeviceError(CacheError, RuntimeError):
    """A device that was asked for and is absent."""


class WeightsError(CacheError, RuntimeError):
    """Weights of a VFM that cannot be found or do not fit."""


class StorageError(CacheError, OSError):
    """The cache cannot be written or read: no permission, no space, an I/O error. Ends a run."""

    exit_code = 1


class UnwritableError(StorageError):
    """A place that cannot be written to, found before any work."""

    exit_code = 2


class CorruptCacheError(CacheError, OSError):
    """Content on disk is not what its record says."""

    exit_code = 1


class ClusterError(CacheError, ConnectionError):
    """The cluster that does the work went away. Ends a run; what was committed stays."""

    exit_code = 1


class MismatchError(CacheError, ValueError):
    """Two things that must belong together do not: names the part that differs."""


class FormatVersionError(CacheError, ValueError):
    """A cache written by a newer version of the format than this code reads."""


@contextmanager
def errors_at(where: object, remedy: str = "") -> Iterator[None]:
    """Puts the place, and perhaps the remedy, to every `DataError` of the block that cannot know them."""
    try:
        yield
    except DataError as error:
        raise type(error)(f"{where}: {error}" + (f"; {remedy}" if remedy else "")) from error


def shortened(names: Sequence[str], most: int = 5) -> str:
    """The first few of perhaps many names."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
