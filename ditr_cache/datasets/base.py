"""What a dataset is, and the registry of datasets."""

from __future__ import annotations

import colorsys
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from ditr_cache.errors import CacheError, DataError, MissingDataError, UnknownNameError, UsageError
from ditr_cache.sample import Sample
from ditr_cache.schema import DEFAULT_GRID, LinkSettings

SCANS_PER_PARTITION = 64
"""Most lidar scans in one partition: few enough to redo, enough that a cache has few files."""

OptionValue = str | int | float


@dataclass(frozen=True)
class ClassInfo:
    """One semantic class: its name, its display colour (RGB, 0-255), and the group that its benchmark reports it in."""

    name: str
    color: tuple[int, int, int]
    group: str = ""


def distinct_color(number: int) -> tuple[int, int, int]:
    """A colour for a class without one: golden-ratio steps around the hues, in rings of different brightness."""
    rgb = colorsys.hsv_to_rgb(number * 0.618034 % 1, (0.85, 0.5, 0.65)[number % 3], (0.95, 0.8, 0.6)[number % 3])
    return round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2])


@dataclass(frozen=True)
class Partition:
    """The unit of work, retry, commit and progress: one sample indoors, up to 64 consecutive scans outdoors."""

    id: str
    sample_ids: tuple[str, ...]


@dataclass(frozen=True)
class Need:
    """Files that a dataset needs on disk.

    Args:
        path: below the root, with <placeholders>.
        content: what it is.
        download: which official download it comes from.
        optional: whether extraction works without it, and `content` says what is lost.
    """

    path: str
    content: str
    download: str
    optional: bool = False


@dataclass(frozen=True)
class Option:
    """A choice that a dataset leaves to the user, `--option NAME=VALUE`. It is part of the cache's identity.

    Args:
        name: the keyword of the dataset's constructor.
        default: its type is the option's type.
        help: what it does.
        choices: all that is allowed; empty: any value of the type.
    """

    name: str
    default: OptionValue
    help: str
    choices: tuple[OptionValue, ...] = ()

    def parse(self, text: str, dataset: str) -> OptionValue:
        """The value that `text` stands for. Raises `UsageError`."""
        kind = type(self.default)
        try:
            value = kind(text)
        except ValueError as error:
            raise UsageError(
                f"option {self.name}={text!r} of dataset {dataset!r}: expected {kind.__name__} ({self.help})"
            ) from error
        if self.choices and value not in self.choices:
            raise UsageError(
                f"option {self.name}={text!r} of dataset {dataset!r}: expected one of "
                f"{', '.join(str(c) for c in self.choices)} ({self.help})"
            )
        return value


@dataclass(frozen=True)
class Defaults:
    """Settings of the published recipe, where the user names none.

    Args:
        grid: tokens (rows, columns) of an image. Images are resized to so many patches.
        links: how points are linked to views.
        layout: of feature stores.
    """

    grid: tuple[int, int] = DEFAULT_GRID
    links: LinkSettings = field(default_factory=LinkSettings)
    layout: str = "fused"


@dataclass(frozen=True, kw_only=True)
class Release:
    """Size of a whole official release, as extraction sees it by default.

    Args:
        samples: of all splits.
        images: that are embedded.
        points: mean number of points of a sample.
        coverage: fraction of points that at least one image sees.
        views_per_point: mean number of images that see a covered point.
        source: where the figures come from, and which are estimated.
    """

    samples: int
    images: int
    points: int
    coverage: float
    views_per_point: float
    source: str


class Dataset(ABC):
    """A dataset in its official layout below `root`.

    Construction checks the layout and raises `MissingDataError` naming the file that is missing; it lists samples but
    opens none. Instances are cheap to build, so every worker builds its own. Options are keywords of the constructor,
    which sets `root` and `ids`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    """Name of the release, for people."""
    needs: ClassVar[tuple[Need, ...]]
    options: ClassVar[tuple[Option, ...]] = ()
    defaults: ClassVar[Defaults] = Defaults()
    samples_per_partition: ClassVar[int] = 1
    release: ClassVar[Release | None] = None
    """Size of the whole release; None where everybody's data are of another size."""
    root: Path
    ids: Mapping[str, Sequence[str]]
    """Split -> ids of its samples, in the order in which a run goes through them."""

    @property
    @abstractmethod
    def classes(self) -> tuple[ClassInfo, ...]:
        """Classes by label index; empty where the dataset has no labels."""

    @abstractmethod
    def read(self, sample_id: str) -> Sample:
        """One sample; pixels and points are loaded only when asked for. Raises `UnknownNameError` for an unknown id."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return tuple(self.ids)

    def sample_ids(self, split: str) -> Sequence[str]:
        """Ids of one split. Raises `UnknownNameError` for an unknown split."""
        if split not in self.splits:
            raise UnknownNameError.of(f"split of dataset {self.name!r}", split, self.splits)
        return self.ids[split]

    def split_of(self, sample_id: str) -> str:
        """The split that holds a sample. Raises `UnknownNameError` for an unknown id."""
        if sample_id not in self._split_of_sample:
            raise self.unknown_sample(sample_id, self._split_of_sample)
        return self._split_of_sample[sample_id]

    @cached_property
    def _split_of_sample(self) -> dict[str, str]:
        return {sample_id: split for split, ids in self.ids.items() for sample_id in ids}

    def unknown_sample(self, sample_id: str, known: Iterable[str]) -> UnknownNameError:
        """The error for an id that is not one of the `known` ones."""
        return UnknownNameError.of(f"sample of dataset {self.name!r}", sample_id, known)

    def sequence(self, sample_id: str) -> str:
        """The drive or scene that a sample belongs to: partitions hold consecutive samples of one of them."""
        return sample_id


def ids_by_split(split_of: Mapping[str, str], splits: Iterable[str]) -> dict[str, list[str]]:
    """Split -> sorted ids, of those of the `splits` that have any."""
    ids = {split: sorted(i for i, of in split_of.items() if of == split) for split in splits}
    return {split: found for split, found in ids.items() if found}


DATASETS: dict[str, str] = {
    "nuscenes": "ditr_cache.datasets.nuscenes.dataset:NuScenesDataset",
    "posed": "ditr_cache.datasets.posed.dataset:PosedDataset",
    "rgbd": "ditr_cache.datasets.rgbd:RGBDDataset",
    "rooms": "ditr_cache.datasets.scannet.dataset:RoomsDataset",
    "s3dis": "ditr_cache.datasets.s3dis.dataset:S3DISDataset",
    "scannet": "ditr_cache.datasets.scannet.dataset:ScanNetDataset",
    "scannet200": "ditr_cache.datasets.scannet.scannet200:ScanNet200Dataset",
    "scannetpp": "ditr_cache.datasets.scannetpp.dataset:ScanNetPPDataset",
    "semantickitti": "ditr_cache.datasets.semantickitti.dataset:SemanticKITTIDataset",
    "structured3d": "ditr_cache.datasets.structured3d.dataset:Structured3DDataset",
    "waymo": "ditr_cache.datasets.waymo.dataset:WaymoDataset",
}
"""Name of every dataset -> module and class, imported when asked for."""


def dataset_class(name: str) -> type[Dataset]:
    """Class of dataset `name`. Raises `UnknownNameError`, naming the nearest."""
    if name not in DATASETS:
        raise UnknownNameError.of("dataset", name, DATASETS)
    module, cls = DATASETS[name].split(":")
    found: type[Dataset] = getattr(importlib.import_module(module), cls)
    return found


def parse_options(name: str, texts: Sequence[str]) -> dict[str, OptionValue]:
    """Values of `NAME=VALUE` texts for dataset `name`.

    Raises:
        UnknownNameError: no such dataset or option.
        UsageError: not NAME=VALUE, or a value that the option does not take.
    """
    known = {option.name: option for option in dataset_class(name).options}
    values = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"option {text!r} of dataset {name!r}: expected NAME=VALUE")
        if key not in known:
            raise UnknownNameError.of(f"option of dataset {name!r}", key, known)
        values[key] = known[key].parse(value, name)
    return values


def changed_options(name: str, options: Mapping[str, OptionValue]) -> dict[str, OptionValue]:
    """Those of the options that are not the dataset's defaults."""
    defaults = {option.name: option.default for option in dataset_class(name).options}
    return {key: value for key, value in sorted(options.items()) if value != defaults.get(key)}


def open_dataset(name: str, root: str | Path, options: Mapping[str, OptionValue] | None = None) -> Dataset:
    """Dataset `name` below the folder `root`.

    Raises:
        UnknownNameError: no such dataset; names the nearest.
        MissingDataError: `root` or a file of the layout is missing, or no sample is there.
        DataError: a folder that cannot be listed, or a file that cannot be used.
    """
    cls: Any = dataset_class(name)
    path = Path(root)
    if not path.is_dir():
        raise MissingDataError(
            f"dataset {name!r}: root {str(root)!r} is not a folder; pass the folder of the unpacked dataset with --root"
        )
    try:
        dataset: Dataset = cls(path, **(options or {}))
    except CacheError:
        raise
    except OSError as error:
        raise DataError(f"dataset {name!r} at {str(root)!r}: cannot be read ({error}); make it readable") from error
    return dataset


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
    result = [partition for split in chosen for partition in _of_split(dataset, split)]
    if not result:
        raise UsageError(f"dataset {dataset.name!r} at {str(dataset.root)!r}: no samples in splits {chosen}")
    return result


def _of_split(dataset: Dataset, split: str) -> Iterator[Partition]:
    size = dataset.samples_per_partition
    if size == 1:
        yield from (Partition(i, (i,)) for i in dataset.sample_ids(split))
        return
    for sequence, members in groupby(dataset.sample_ids(split), key=dataset.sequence):
        ids = tuple(members)
        for first in range(0, len(ids), size):
            yield Partition(f"{sequence}-{first:06d}", ids[first : first + size])
