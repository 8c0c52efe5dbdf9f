"""Libraries of the extras `io` and `datasets`, loaded where they are needed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ditr_cache.errors import UsageError


def require(module: str, purpose: str, extra: str = "io") -> Any:
    """An optional module.

    Args:
        module: name to import.
        purpose: what it is needed for, in plural.
        extra: of this package, which brings it.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _absent(module, purpose, extra) from error


def check_installed(module: str, purpose: str, extra: str = "io") -> None:
    """Raise the `UsageError` of `require` where a module is not installed, without importing it."""
    try:
        installed = importlib.util.find_spec(module.partition(".")[0]) is not None
    except ValueError:  # it is loaded, and was not found as others are
        installed = True
    if not installed:
        raise _absent(module, purpose, extra)


def _absent(module: str, purpose: str, extra: str) -> UsageError:
    return UsageError(f"{purpose} need the library {module!r}; pip install 'ditr[{extra}]'")
