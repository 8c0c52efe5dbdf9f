"""A committed partition against the dataset as it is now: what differs is named, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ditr_cache.datasets.base import Partition
from ditr_cache.errors import MismatchError
from ditr_cache.geometry_partition import make_geometry
from ditr_cache.groups import open_group
from ditr_cache.same_source import compare_source
from ditr_cache.sample import Points, Sample
from ditr_cache.schema import IGNORE_INDEX
from ditr_cache.store import CacheWriter

Arrays = dict[str, NDArray[Any]]
Change = Callable[[Arrays], None]


def points(seed: int, **others: Any) -> Arrays:
    rng = np.random.default_rng(seed)
    arrays = {
        "coord": rng.uniform(0, 3, (40, 3)).astype(np.float32),
        "normal": rng.normal(size=(40, 3)).astype(np.float32),
        "strength": rng.uniform(size=40).astype(np.float32),
        "segment": rng.integers(0, 2, 40).astype(np.int64),
        **others,
    }
    arrays["normal"][0] = np.nan
    return {name: array for name, array in arrays.items() if array is not None}


class Source:
    """A dataset of samples whose points are held here."""

    def __init__(self, **samples: Arrays) -> None:
        self.samples = samples

    def read(self, sample_id: str) -> Sample:
        return Sample(
            id=sample_id, split="train", views=(), load_points=lambda: Points(**self.samples[sample_id]),
            broken_views=(),
        )  # fmt: skip


def compare(writer: CacheWriter, source: Source, change: Change = lambda _: None) -> None:
    """Commit a partition of all samples, change the first of them, and compare."""
    record = make_geometry(source.read, Partition("all", tuple(source.samples)), writer)
    group = open_group(writer.paths, writer.paths.geometry, record)
    arrays = {name: group.read(name) for name in record.arrays}
    change(next(iter(source.samples.values())))
    compare_source(record, arrays, source.read)


def test_nothing_is_told_of_what_is_the_same(writer: CacheWriter) -> None:
    compare(writer, Source(a=points(0)))


def test_scans_with_and_without_labels_are_the_same(writer: CacheWriter) -> None:
    """Of many scans, those without labels are stored as unlabelled, and what not all of them have is not stored."""
    compare(writer, Source(a=points(0, segment=None), b=points(1), c=points(2, strength=None)))


def drop(name: str) -> Change:
    return lambda arrays: arrays.pop(name) is None


def put(name: str, position: Any, value: Any) -> Change:
    def change(arrays: Arrays) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][position] = value

    return change


def nudge(arrays: Arrays) -> None:
    arrays["coord"] = arrays["coord"].copy()
    arrays["coord"][7, 0] = np.nextafter(arrays["coord"][7, 0], np.float32(1.5))


def add(name: str, array: NDArray[Any]) -> Change:
    return lambda arrays: arrays.update({name: array})


CHANGES: dict[str, Change] = {
    "another segment of 2 of 40 points": put("segment", [3, 4], IGNORE_INDEX),
    "another strength of 1 of 40 points": put("strength", 5, 7.0),
    "another normal of 1 of 40 points": put("normal", 0, 0.5),
    "another coord of 1 of 40 points": nudge,
    "39 points instead of 40": lambda arrays: arrays.update({name: array[1:] for name, array in arrays.items()}),
    "no strength": drop("strength"),
    "no segment": drop("segment"),
    "instance, which the cache does not have": add("instance", np.zeros(40, np.int32)),
}


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("message", CHANGES)
def test_what_differs_is_named(writer: CacheWriter, message: str, others: int) -> None:
    source = Source(**{name: points(i) for i, name in enumerate("ab"[: 1 + others])})
    with pytest.raises(MismatchError, match="sample 'a': the dataset has other points now") as caught:
        compare(writer, source, CHANGES[message])
    assert message in str(caught.value) and "--repair" in str(caught.value)


def test_points_in_another_order_are_other_points(writer: CacheWriter) -> None:
    def reverse(arrays: Arrays) -> None:
        arrays.update({name: array[::-1].copy() for name, array in arrays.items()})

    with pytest.raises(MismatchError, match="another source_index of 40 of 40 points"):
        compare(writer, Source(a=points(0)), reverse)
