"""Checkpoints: written atomically, read without pickle's code execution (`weights_only=True`)."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditr_cache.errors import DataError, FormatVersionError, MissingDataError, StorageError
from ditr_train.files import refuse_compressed, temporary_name

CHECKPOINT_VERSION = 1
"""Version of the checkpoints that this code writes, and the newest that it reads."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain types only) so that `path` always holds a whole checkpoint, old or new.

    Raises:
        StorageError: no space, no permission, an I/O error.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            torch.save({"format_version": CHECKPOINT_VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise StorageError(
            f"cannot write checkpoint {str(path)!r}: {reason}; free space or mend the folder, then continue with "
            "--resume from the checkpoint before it"
        ) from error


def used_weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint that are evaluated and used: the moving average where the run keeps one."""
    weights: dict[str, Tensor] = state["model"] if state.get("ema") is None else state["ema"]["model"]
    return weights


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, with tensors on the CPU.

    Raises:
        MissingDataError: no such file.
        DataError: cut, damaged, or not a checkpoint of tensors and plain types.
        FormatVersionError: written by a newer version.
    """
    try:
        refuse_compressed(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise MissingDataError(f"checkpoint {str(path)!r} does not exist") from error
    except Exception as error:  # torch raises many types for damaged bytes; all mean the same here
        raise DataError(
            f"checkpoint {str(path)!r} cannot be read: expected one that ditr-train wrote, got a file that is cut or "
            "damaged; use another one (best.pt, last.pt) or train again"
        ) from error
    if not isinstance(state, dict) or "format_version" not in state or "model" not in state:
        raise DataError(f"checkpoint {str(path)!r} is not a checkpoint of ditr-train: it has no format_version")
    if type(state["format_version"]) is not int or state["format_version"] > CHECKPOINT_VERSION:
        raise FormatVersionError(
            f"checkpoint {str(path)!r}: format version {state['format_version']}, but this ditr reads up to "
            f"{CHECKPOINT_VERSION}; upgrade ditr to read it"
        )
    return state
