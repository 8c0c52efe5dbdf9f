"""Whether a committed partition still is what a dataset says: its points, their order and labels, cameras and poses.

A run that finds a partition committed opens no file of the dataset, so it does not see what was changed there since.
`ditr-cache verify --root` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

from ditr_cache.errors import MismatchError
from ditr_cache.fingerprint import check_source, remedy
from ditr_cache.geometry_partition import UNLABELLED, sorted_cloud
from ditr_cache.sample import Sample
from ditr_cache.schema import GeometryRecord
from ditr_cache.store import OPTIONAL_POINT_ARRAYS


def compare_source(record: GeometryRecord, arrays: Mapping[str, NDArray[Any]], read: Callable[[str], Sample]) -> None:
    """Compare all samples of a partition with the dataset. Depth maps are not: nothing of them is stored.

    Args:
        record: of the committed geometry.
        arrays: its arrays.
        read: opens a sample of the dataset by its id.

    Raises:
        MismatchError: another split, camera or pose, or other points; names the sample and what differs.
        DataError, UnknownNameError: a sample cannot be read, or is not in the dataset any more.
    """
    names = [name for name in ("coord", "source_index", *OPTIONAL_POINT_ARRAYS) if name in arrays]
    for position, info in enumerate(record.samples):
        sample = read(info.id)
        check_source(record, position, sample)
        _, cloud = sorted_cloud(sample.load_points())
        if len(record.samples) > 1:  # of many, only what all of them have is stored
            cloud = {name: array for name, array in cloud.items() if name in (*names, *UNLABELLED)}
        rows = record.point_slice(position)
        differing = [*_differing({name: arrays[name][rows] for name in names}, cloud)]
        if differing:
            raise MismatchError(
                f"sample {info.id!r}: the dataset has other points now than the cache: {', '.join(differing)}; "
                f"{remedy(record)}"
            )


def _differing(stored: Mapping[str, NDArray[Any]], cloud: Mapping[str, NDArray[Any]]) -> Iterator[str]:
    count = len(stored["coord"])
    if len(cloud["coord"]) != count:
        yield f"{len(cloud['coord'])} points instead of {count}"
        return
    for name in [*stored, *(name for name in cloud if name not in stored)]:
        if name not in stored:
            yield f"{name}, which the cache does not have"
        elif name not in cloud and (name not in UNLABELLED or (stored[name] != UNLABELLED[name]).any()):
            yield f"no {name}"
        elif name in cloud:
            a, b = (array.reshape(count, -1) for array in (stored[name], cloud[name]))
            changed = int((~((a == b) | ((a != a) & (b != b)))).any(axis=1).sum())  # NaN is the same as NaN
            if changed:
                yield f"another {name} of {changed} of {count} points"
