"""Check a cache byte by byte against its commit records, and take back what is damaged."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ditr_cache.arrays import array_digest
from ditr_cache.codec_state import read_codec
from ditr_cache.datasets.base import Dataset, open_dataset
from ditr_cache.errors import CacheError, CorruptCacheError, FormatVersionError, MismatchError, MissingDataError
from ditr_cache.files import (
    RESERVED_NAMES,
    Location,
    Paths,
    check_files,
    exists,
    file_name,
    groups_of,
    location,
    read_document,
    read_record,
    remove_group,
    remove_leftovers,
)
from ditr_cache.groups import open_group
from ditr_cache.same_source import compare_source
from ditr_cache.schema import CacheMetadata, FeatureRecord, GeometryRecord, VFMSpec
from ditr_cache.store import check_index


@dataclass
class VerifyReport:
    """What was found. Entries are paths below the cache, `geometry/<partition>` or `features/<key>/<partition>`.

    Args:
        checked, ok: numbers of committed partitions and documents.
        corrupt: content differs from the record, or the record itself was altered.
        missing: committed, but files (or the geometry they belong to) are gone.
        mismatched: features of another geometry or of another VFM; geometry of another dataset than there is now.
        not_compared: geometry whose samples the dataset does not have or cannot read, never removed; None where it was
            not asked.
        reasons: entry -> what is wrong with it.
    """

    checked: int = 0
    ok: int = 0
    corrupt: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    not_compared: list[str] | None = None
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.corrupt or self.missing or self.mismatched or self.not_compared)

    def to_dict(self) -> dict[str, object]:
        """The object that `--json` prints."""
        found: dict[str, object] = {
            "checked": self.checked,
            "ok": self.ok,
            "corrupt": self.corrupt,
            "missing": self.missing,
            "mismatched": self.mismatched,
        }
        return found if self.not_compared is None else {**found, "not_compared": self.not_compared}


def verify(
    url: str | os.PathLike[str],
    *,
    repair: bool = False,
    root: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> VerifyReport:
    """Re-read every committed byte and compare it with the digests of the records.

    Args:
        url: the cache.
        repair: remove bad partitions (record first), so that the next `extract` rebuilds just those.
        root: of the dataset that the cache was made of: compare points, labels, cameras and poses with it, too.
        progress: called with every entry before it is checked.

    Raises:
        MissingDataError: no cache there, or not the dataset at `root`.
        FormatVersionError: written by a newer version.
        CorruptCacheError: `cache.json` itself is damaged; nothing else can be judged then.
    """
    paths = Paths(location(url))
    if not exists(paths.metadata):
        raise MissingDataError(f"{str(paths.root)!r} is not a cache: it has no cache.json")
    metadata = read_document(paths.metadata, CacheMetadata)
    dataset = None if root is None else open_dataset(metadata.dataset, root, metadata.dataset_options)
    report = VerifyReport(not_compared=None if dataset is None else [])
    for entry, check, remove in _entries(paths, dataset):
        if progress is not None:
            progress(entry)
        report.checked += 1
        try:
            check()
        except FormatVersionError:
            raise
        except _NotComparedError as error:
            assert report.not_compared is not None
            report.not_compared.append(entry)
            report.reasons[entry] = str(error)
            continue
        except MismatchError as error:
            found, reason = report.mismatched, str(error)
        except MissingDataError as error:
            found, reason = report.missing, str(error)
        except CorruptCacheError as error:
            found, reason = report.corrupt, str(error)
        else:
            report.ok += 1
            continue
        found.append(entry)
        report.reasons[entry] = reason
        if repair:
            remove()
    if repair:
        remove_leftovers(paths.root)
    return report


class _NotComparedError(Exception):
    """The dataset cannot say whether a partition is right; the partition itself is whole."""


def _entries(paths: Paths, dataset: Dataset | None) -> Iterator[tuple[str, Callable[[], object], Callable[[], None]]]:
    """(entry, check that raises, remove) of every committed thing; features come after their geometry."""
    geometry: dict[str, GeometryRecord] = {}

    def check_geometry(path: Location) -> None:
        record = read_record(path, GeometryRecord)
        points: dict[str, NDArray[Any]] = {}
        for name, array in verified_arrays(paths, path.parent, record):
            if dataset is not None and not name.startswith("link_"):
                points[name] = array
        geometry[path.stem] = record
        if dataset is None:
            return
        try:
            compare_source(record, points, dataset.read)
        except MismatchError:
            del geometry[path.stem]  # nor do its features stand
            raise
        except CacheError as error:
            raise _NotComparedError(f"cannot be compared with the dataset: {error}") from error

    def check_features(path: Location, spec_path: Location) -> None:
        record = read_record(path, FeatureRecord)
        spec = read_document(spec_path, VFMSpec)
        if record.vfm_digest != spec.digest:
            raise MismatchError(f"made by VFM {record.vfm_digest[:16]}, its store is of {spec.digest[:16]}")
        if path.stem not in geometry:
            raise MissingDataError("the geometry that these features belong to is missing, damaged or outdated")
        if record.geometry_digest != geometry[path.stem].digest:
            raise MismatchError(
                f"made from geometry {record.geometry_digest[:16]}, the cache's is {geometry[path.stem].digest[:16]}"
            )
        for name, array in verified_arrays(paths, path.parent, record):
            if name == "index":
                check_index(spec, geometry[path.stem], array, record.arrays["table"].shape[0])

    for path in paths.records(paths.geometry):
        yield f"geometry/{path.stem}", partial(check_geometry, path), partial(_remove, path)
    for folder in paths.stores:
        spec_path = folder / "vfm.json"
        records = paths.records(folder)
        if not records and not exists(spec_path):
            continue  # a run was killed before it committed anything here
        yield f"features/{folder.name}/vfm.json", partial(_check_spec, paths, spec_path), partial(_remove_spec, folder)
        for path in records:
            yield (
                f"features/{folder.name}/{path.stem}",
                partial(check_features, path, spec_path),
                partial(_remove, path),
            )


def _check_spec(paths: Paths, path: Location) -> None:
    spec = read_document(path, VFMSpec)
    if file_name(spec.key) != path.parent.name:
        raise MismatchError(f"the folder is named {path.parent.name!r} but describes {spec.key!r}")
    read_codec(paths, spec)


def verified_arrays(
    paths: Paths, folder: Location, record: GeometryRecord | FeatureRecord
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Every array of a committed group, after its content was compared with the digest in the record.

    Raises:
        MissingDataError: a file is gone.
        CorruptCacheError: the content is not what was committed.
    """
    where = paths.group(folder, record)
    try:
        check_files(where, record.files, record.offsets)
    except CorruptCacheError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise MissingDataError(str(error)) from error
        raise
    group = open_group(paths, folder, record, whole=True)
    group.check()
    for name, info in record.arrays.items():
        array = group.read(name)
        if array_digest(array) != info.sha256:
            raise CorruptCacheError(f"{where}/{name}: its content is not what was committed (SHA-256 differs)")
        yield name, array


def _remove(record: Location) -> None:
    """Take a commit back: the record first, so that no reader takes the rest for a partition."""
    record.unlink(missing_ok=True)
    for group in groups_of(record):
        remove_group(group)


def _remove_spec(folder: Location) -> None:
    for name in RESERVED_NAMES:
        (folder / f"{name}.json").unlink(missing_ok=True)
