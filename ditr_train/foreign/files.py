"""Files of public weights, read without running what they say."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditr_cache.errors import DataError, MissingDataError, UsageError
from ditr_train.files import refuse_compressed

MARK = "ditr_version"
"""Key of what `ditr-train convert` writes beside the weights."""

_TABLES = ("state_dict", "model", "model_state_dict", "model_state")


@dataclass(frozen=True)
class PublicFile:
    """A file of public weights.

    Args:
        path: of the file.
        sha256: of its bytes.
        tensors: by the names that it gives them.
        ours: whether `ditr-train convert` wrote it.
    """

    path: Path
    sha256: str
    tensors: dict[str, Tensor]
    ours: bool


def read_public_file(path: Path) -> PublicFile:
    """The tensors of a file: a state dict, alone or as `state_dict` or `model` of a checkpoint, or safetensors.

    Raises:
        MissingDataError: no such file.
        UsageError: a folder; safetensors where the package is not installed.
        DataError: not a file of weights, damaged, or one that holds objects besides tensors, numbers and text.
    """
    if path.is_dir():
        raise UsageError(
            f"{str(path)!r} is a folder: a file of weights was expected; for a run of ditr-train set init_format=run"
        )
    if not path.exists():
        raise MissingDataError(f"file of weights {str(path)!r} does not exist; pass yours with --set init=FILE")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    ours = isinstance(content, Mapping) and MARK in content
    return PublicFile(path, digest, _state_dict(path, content), ours)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UsageError(f"{str(path)!r}: reading it needs safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except Exception as error:  # its errors have a type of their own, for all that can be wrong
        raise DataError(f"file of weights {str(path)!r} cannot be read: cut or damaged ({error})") from error


def _read_torch(path: Path) -> Any:
    try:
        # Pointcept keeps its best score as a number of numpy's, beside the weights.
        refuse_compressed(path)
        with torch.serialization.safe_globals(_numpy_scalars()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged bytes, and one for a whole file that it refuses
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
            raise DataError(
                f"file of weights {str(path)!r} holds objects besides tensors, numbers and text, which could run code "
                "when they are read, so it is not read. Where you trust its source, keep the weights alone: python -c "
                f"\"import torch; torch.save({{'state_dict': torch.load({str(path)!r}, map_location='cpu', "
                "weights_only=False)['state_dict']}, 'weights.pth')\""
            ) from error
        raise DataError(
            f"file of weights {str(path)!r} cannot be read: expected one that torch.save wrote, got a file that is "
            "cut, damaged or of another kind; fetch it again"
        ) from error


def _numpy_scalars() -> list[Any]:
    scalar: Any = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64", "bool")]
    # By the names of numpy before and since 2.
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [*((scalar, name) for name in names), np.dtype, *dtypes]


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and "format_version" in content:
        raise UsageError(f"{str(path)!r} is a checkpoint of ditr-train; start from it with init_format=run")
    table = content
    if isinstance(content, Mapping):
        table = next((content[name] for name in _TABLES if isinstance(content.get(name), Mapping)), content)
    tensors = {str(k): v for k, v in table.items() if isinstance(v, Tensor)} if isinstance(table, Mapping) else {}
    if not tensors:
        what = f"the keys {_first(content)}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise DataError(
            f"file of weights {str(path)!r}: expected a state dict, or one as 'state_dict' or 'model', got {what}"
        )
    return tensors


def _first(content: Mapping[Any, Any]) -> str:
    return ", ".join(map(repr, list(content)[:5])) + (", ..." if len(content) > 5 else "")
