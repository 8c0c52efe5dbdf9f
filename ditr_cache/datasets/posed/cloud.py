"""The point cloud of a posed capture: which file it is, its labels, and its points."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditr_cache.datasets.numpy_files import map_array
from ditr_cache.datasets.posed.classes import ClassTable, whole_labels
from ditr_cache.datasets.posed.frames import offset_of
from ditr_cache.errors import DataError, MissingDataError, errors_at, shortened
from ditr_cache.pointcloud.cloud import PointCloud, color_factor
from ditr_cache.pointcloud.normals import estimate_scan_normals
from ditr_cache.pointcloud.readers import open_cloud
from ditr_cache.sample import Points

_LOG = logging.getLogger(__name__)

SUFFIXES = (".ply", ".las", ".laz", ".pcd")
STEM = "point_cloud"
FUSED = ("fused.ply", "dense/fused.ply", "dense/0/fused.ply")
"""What COLMAP's `stereo_fusion` and its automatic reconstruction write."""

LABEL_FILES = ("labels.npy", "labels.txt")

_CHUNK = 2**18
_REACH = 2.0**16  # metres: beyond, float32 no longer tells centimetres apart
_BYTES_PER_LABEL = 64  # of text


def find_cloud(folder: Path, listed: Path | None, name: str) -> Path | None:
    """The point cloud of a capture; None where there is none.

    The first of: the file of that name; `point_cloud.*`; what `transforms.json` lists; COLMAP's `fused.ply`; the only
    other point file of the folder.

    Args:
        folder: of the capture.
        listed: the file that the capture's description names.
        name: of a file in the folder; empty: as above.

    Raises:
        MissingDataError: the named or listed file is not there.
        DataError: several files, and nothing that tells which.
    """
    if name:
        if not (folder / name).is_file():
            raise MissingDataError(f"{folder / name}: no such file, but --option points={name} names it")
        return folder / name
    own = [path for suffix in SUFFIXES if (path := folder / f"{STEM}{suffix}").is_file()]
    if own:
        if len(own) > 1:
            _LOG.warning("%s: taking %s, not %s", folder, own[0].name, ", ".join(path.name for path in own[1:]))
        return own[0]
    if listed is not None:
        if not listed.is_file():
            raise MissingDataError(
                f"{listed}: no such file, but ply_file_path of transforms.json names it; copy it, or put another "
                f"cloud into {folder} as {STEM}.ply, .las, .laz or .pcd"
            )
        return listed
    fused = next((path for text in FUSED if (path := folder / text).is_file()), None)
    if fused is not None:
        return fused
    others = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if len(others) > 1:
        raise DataError(
            f"{folder}: {len(others)} point clouds ({shortened([path.name for path in others])}), expected one; name "
            f"the right one {STEM}{others[0].suffix.lower()}, or say --option points={others[0].name}"
        )
    return others[0] if others else None


@dataclass(frozen=True, eq=False)
class CloudFile:
    """A point cloud with its labels, to be read when asked for.

    Args:
        path: of the points.
        labels: file with a label per point; None: the labels are in the points' file, if anywhere.
        classes: what labels mean; without classes there are no labels.
        offset: [3] metres to subtract; None: as the first point says.
        estimate_normals: make normals where the file has none.
        cameras: [K, 3] places of the cameras, before `offset`; estimated normals look towards the nearest.
    """

    path: Path
    labels: Path | None
    classes: ClassTable
    offset: NDArray[np.float64] | None
    estimate_normals: bool
    cameras: NDArray[np.float64]

    def read(self) -> Points:
        """All points.

        Raises:
            MissingDataError, DataError: a file is missing or cannot be used.
            UsageError: a library for the format is not installed.
        """
        cloud = open_cloud(self.path, labels=True)
        labels = None if self.labels is None else read_labels(self.labels, cloud)
        offset = self.offset
        parts: dict[str, list[NDArray[Any]]] = {name: [] for name in cloud.channels}
        for chunk in cloud.chunks(_CHUNK):
            if offset is None:
                offset = offset_of(np.nan_to_num(chunk.coord[0], posinf=0.0, neginf=0.0))
            for name, arrays in parts.items():
                arrays.append(getattr(chunk, name))
            with np.errstate(over="ignore", invalid="ignore"):  # `Points` reports what is not finite
                parts["coord"][-1] = (chunk.coord.astype(np.float64) - offset).astype(np.float32)
        assert offset is not None
        found = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        coord = found["coord"]
        farthest = float(np.abs(coord, where=np.isfinite(coord), out=np.zeros_like(coord)).max())
        if farthest >= _REACH:
            raise DataError(
                f"{self.path}: points up to {farthest:.4g} m from the cameras' part of the world, expected at most "
                f"{_REACH:.0f} m; are cloud and poses in the same frame, and in metres?"
            )
        with errors_at(self.path):
            return Points(
                coord=coord,
                color=_eight_bits(found["color"]) if "color" in found else None,
                normal=_unit(found["normal"]) if "normal" in found else self._estimated_normals(coord, offset),
                strength=found.get("strength"),
                segment=self._segment(found.get("segment") if labels is None else labels),
                instance=whole_labels(found["instance"], "instances").astype(np.int32) if "instance" in found else None,
            )

    def _segment(self, labels: NDArray[Any] | None) -> NDArray[np.int16] | None:
        """Class indices of labels as the files have them."""
        if labels is None:
            return None
        if not self.classes.infos:
            if self.labels is not None or self.path.suffix.lower() not in (".las", ".laz"):  # LAS always has some
                _LOG.warning("%s: labels, but no classes.txt or classes.json: they are left out", self.path)
            return None
        segment = self.classes.index(labels, "labels" if self.labels is None else str(self.labels))
        if not (segment >= 0).any():
            _LOG.warning("%s: none of its labels is one of the %d classes", self.path, len(self.classes.infos))
        return segment

    def _estimated_normals(self, coord: NDArray[np.float32], offset: NDArray[np.float64]) -> NDArray[np.float32] | None:
        if not self.estimate_normals or not np.isfinite(coord).all():
            return None
        return estimate_scan_normals(coord.astype(np.float64), self.cameras - offset)


def read_labels(path: Path, cloud: PointCloud) -> NDArray[Any]:
    """[N] numbers of a label file of a cloud.

    Raises:
        DataError: damaged, or another number of labels than points.
    """
    try:
        if path.suffix == ".npy":
            labels: NDArray[Any] = map_array(path, _ONE_EACH)
        elif path.stat().st_size > _BYTES_PER_LABEL * (cloud.count + 1):
            raise DataError(f"{path}: {path.stat().st_size} bytes for {cloud.count} points; {_ONE_EACH}")
        else:
            words = path.read_bytes().split()
            labels = np.array(words, dtype="S").astype(np.float64) if words else np.zeros(0)
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as numbers ({error}); {_ONE_EACH}") from error
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iuf":
        raise DataError(
            f"{path}: expected numbers [{cloud.count}], got {labels.dtype} {list(labels.shape)}; {_ONE_EACH}"
        )
    if len(labels) != cloud.count:
        raise DataError(
            f"{path}: {len(labels)} labels for the {cloud.count} points of {cloud.path.name}; {_ONE_EACH}, and the two "
            "files are of different clouds"
        )
    return np.array(labels)


_ONE_EACH = "expected one label per point, in the order of the points"


def _unit(normal: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normals [N, 3] of unit length; zero where there is none."""
    normal = np.nan_to_num(normal, nan=0.0, posinf=0.0, neginf=0.0)
    length = np.linalg.norm(normal.astype(np.float64), axis=1, keepdims=True)
    return np.divide(normal, length, out=np.zeros_like(normal), where=length > 1e-6, casting="same_kind")


def _eight_bits(color: NDArray[Any]) -> NDArray[np.uint8]:
    """Colours [N, 3], whatever the file's range."""
    if color.dtype == np.uint8:
        return color
    if color.dtype.kind == "f":
        color = np.nan_to_num(color, nan=0.0, posinf=0.0, neginf=0.0)
    return np.rint(color * color_factor(color.dtype, float(color.max()))).clip(0, 255).astype(np.uint8)
