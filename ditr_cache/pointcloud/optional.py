"""Libraries of the extras `io` and `datasets`, loaded where they are needed."""

from __future__ import annotations

import importlib
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
        raise UsageError(f"{purpose} need the library {module!r}; pip install 'ditr[{extra}]'") from error
