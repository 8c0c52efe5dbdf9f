"""The files of one prediction: labels and softmax as .npy, and a coloured PLY; whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ditr_cache.errors import StorageError, UnwritableError
from ditr_train.files import temporary_name

UNLABELLED = (0, 0, 0)
"""Colour of points without a label (label -1): those without finite coordinates."""

_FILL = 2**20


class OutputFiles:
    """Temporary files beside the final ones; `commit` renames them, leaving the block without it removes them.

    Args:
        folder: where they lie; made where it is missing.
        stem: their names without extension.
        count: number of points N.
        classes: number of classes K.
        softmax: also write the softmax.

    Raises:
        StorageError: they cannot be written.
    """

    def __init__(self, folder: Path, stem: str, count: int, classes: int, *, softmax: bool) -> None:
        self.folder, self.stem, self.count = folder, stem, count
        self._final = {
            name: folder / f"{stem}{ending}" for name, ending in ENDINGS.items() if name != "softmax" or softmax
        }
        self._temporary = {n: temporary_name(p) for n, p in self._final.items()}
        try:
            with self._errors():
                self._make("labels", (count,), np.dtype(np.int16), -1)
                if softmax:
                    self._make("softmax", (count, classes), np.dtype(np.float16), 0)
        except BaseException:  # also Ctrl-C: no block was entered that would remove them
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._temporary.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def put(
        self, position: NDArray[np.int64], label: NDArray[np.integer], softmax: NDArray[np.floating] | None
    ) -> None:
        """Set the labels [n] and the softmax [n, K] (None where none is written) of the points at `position` [n]."""
        with self._errors():
            for name, values in (("labels", label), ("softmax", softmax)):
                if values is not None:
                    # Mapped for one tile at a time: what was written counts no longer as memory of this process.
                    mapped = np.load(self._temporary[name], mmap_mode="r+")
                    mapped[position] = values
                    del mapped

    def write_ply(
        self,
        coord: Iterable[NDArray[np.floating]],
        dtype: np.dtype[np.floating],
        class_names: Sequence[str],
        class_colors: Sequence[Sequence[int]],
    ) -> None:
        """Write the PLY: x, y, z, the colour of the class, and `label`; comments name the classes.

        Args:
            coord: the coordinates [n, 3] of all points in order, chunk by chunk.
            dtype: of x, y and z.
            class_names: K names.
            class_colors: K RGB colours.
        """
        kind = "double" if dtype == np.float64 else "float"
        header = ["ply", "format binary_little_endian 1.0", "comment label -1: no prediction"]
        header += [f"comment label {i}: {' '.join(name.split())}" for i, name in enumerate(class_names)]
        header += [f"element vertex {self.count}", *(f"property {kind} {axis}" for axis in "xyz")]
        header += [*(f"property uchar {c}" for c in ("red", "green", "blue")), "property int label", "end_header\n"]
        row = np.dtype([("coord", dtype.newbyteorder("<"), (3,)), ("color", "u1", (3,)), ("label", "<i4")])
        palette = np.array([*class_colors, UNLABELLED], np.uint8)  # the last is what label -1 reads
        done = 0
        with self._errors(), self._temporary["ply"].open("wb") as file:
            file.write("\n".join(header).encode("ascii", "backslashreplace"))
            for some in coord:
                label = np.array(np.load(self._temporary["labels"], mmap_mode="r")[done : done + len(some)])
                table = np.empty(len(some), row)
                table["coord"], table["color"], table["label"] = some, palette[label], label
                file.write(table.tobytes())
                done += len(some)

    def commit(self) -> list[str]:
        """Give the files their names; returns their paths."""
        with self._errors():
            for name, path in self._temporary.items():
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                path.replace(self._final[name])
        return [str(path) for path in self._final.values()]

    def _make(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], value: int) -> None:
        rows = max(1, _FILL // int(np.prod(shape[1:], dtype=int)))
        with self._temporary[name].open("wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, shape[0], rows):
                file.write(np.full((min(rows, shape[0] - start), *shape[1:]), value, dtype).tobytes())

    @contextlib.contextmanager
    def _errors(self) -> Any:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"cannot write {str(self.folder / self.stem)!r}: {error.strerror or error}; free space, or choose "
                "another folder with -o"
            ) from error


ENDINGS = {"labels": ".labels.npy", "softmax": ".softmax.npy", "ply": ".ply"}
"""File of a prediction -> how its name ends."""


def output_bytes(count: int, classes: int, dtype: np.dtype[np.floating], *, softmax: bool) -> int:
    """Size of the files of a prediction, headers left out."""
    return count * (2 + 3 * dtype.itemsize + 3 + 4 + (2 * classes if softmax else 0))


def require_folder(folder: Path) -> None:
    """Make a folder for files. Raises `UnwritableError` where none can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "permission denied")
    except OSError as error:
        raise UnwritableError(
            f"cannot write to {str(folder)!r}: {error.strerror or error}; choose another folder"
        ) from error
