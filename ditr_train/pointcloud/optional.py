"""Libraries of the extra `io`, loaded where they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from ditr_cache.errors import UsageError


def require(module: str, purpose: str) -> Any:
    """An optional module.

    Args:
        module: name to import.
        purpose: what it is needed for, in plural.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"{purpose} need the library {module!r}; pip install 'ditr[io]'") from error
