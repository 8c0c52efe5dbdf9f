"""The `Dataset` protocol and the registry of datasets."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from ditr_cache.errors import MissingDataError, UnknownNameError, UsageError
from ditr_cache.sample import Sample


@dataclass(frozen=True)
class ClassInfo:
    """One semantic class: its name and its display colour (RGB, 0-255)."""

    name: str
    color: tuple[int, int, int]


@dataclass(frozen=True)
class Partition:
    """The unit of work, retry, commit and progress: one sample indoors, up to 64 consecutive scans outdoors."""

    id: str
    sample_ids: tuple[str, ...]


class Dataset(Protocol):
    """A dataset in its official layout below `root`.

    Construction checks the layout and raises `MissingDataError` naming the file that is missing; it lists samples but
    opens none. Instances are cheap to build, so every worker builds its own.
    """

    name: ClassVar[str]
    root: Path

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        """Classes by label index; empty where the dataset has no labels."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in the order in which `sample_ids` goes through them."""

    def sample_ids(self, split: str) -> Sequence[str]:
        """Sorted ids of one split. Raises `UnknownNameError` for an unknown split."""

    def read(self, sample_id: str) -> Sample:
        """One sample; pixels and points are loaded only when asked for."""


DATASETS: dict[str, str] = {
    "rgbd": "ditr_cache.datasets.rgbd:RGBDDataset",
    "rooms": "ditr_cache.datasets.scannet:RoomsDataset",
    "scannet": "ditr_cache.datasets.scannet:ScanNetDataset",
}
"""Name of every dataset -> module and class, imported when asked for."""


def open_dataset(name: str, root: str | Path) -> Dataset:
    """Dataset `name` below the folder `root`.

    Raises:
        UnknownNameError: no such dataset; names the nearest.
        MissingDataError: `root` or a file of the layout is missing, or no sample is there.
    """
    if name not in DATASETS:
        raise UnknownNameError.of("dataset", name, DATASETS)
    path = Path(root)
    if not path.is_dir():
        raise MissingDataError(
            f"dataset {name!r}: root {str(root)!r} is not a folder; pass the folder of the unpacked dataset with --root"
        )
    module, cls = DATASETS[name].split(":")
    return getattr(importlib.import_module(module), cls)(path)


def partitions(dataset: Dataset, splits: Sequence[str] | None = None) -> list[Partition]:
    """Partitions of the given splits (all where None), in a stable order.

    Raises:
        UnknownNameError: a split that the dataset does not have.
        UsageError: no sample in these splits.
    """
    for split in splits or ():
        if split not in dataset.splits:
            raise UnknownNameError.of(f"split of dataset {dataset.name!r}", split, dataset.splits)
    chosen = [s for s in dataset.splits if splits is None or s in splits]
    result = [Partition(i, (i,)) for split in chosen for i in dataset.sample_ids(split)]
    if not result:
        raise UsageError(f"dataset {dataset.name!r} at {str(dataset.root)!r}: no samples in splits {chosen}")
    return result
