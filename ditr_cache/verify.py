"""Check a cache byte by byte against its commit records, and take back what is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ditr_cache.errors import CorruptCacheError, FormatVersionError, MismatchError, MissingDataError
from ditr_cache.files import Paths, local_path, read_document, remove_folder, remove_leftovers
from ditr_cache.schema import CacheMetadata, FeatureRecord, GeometryRecord, VFMSpec
from ditr_cache.store import array_digest, check_index, read_array


@dataclass
class VerifyReport:
    """What was found. Entries are paths below the cache, `geometry/<partition>` or `features/<key>/<partition>`.

    Args:
        checked, ok: numbers of committed partitions and documents.
        corrupt: content differs from the record, or the record itself was altered.
        missing: committed, but files (or the geometry they belong to) are gone.
        mismatched: features of another geometry or of another VFM.
        reasons: entry -> what is wrong with it.
    """

    checked: int = 0
    ok: int = 0
    corrupt: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.corrupt or self.missing or self.mismatched)

    def to_dict(self) -> dict[str, object]:
        """The object that `--json` prints."""
        return {
            "checked": self.checked,
            "ok": self.ok,
            "corrupt": self.corrupt,
            "missing": self.missing,
            "mismatched": self.mismatched,
        }


def verify(url: str | Path, *, repair: bool = False, progress: Callable[[str], None] | None = None) -> VerifyReport:
    """Re-read every committed byte and compare it with the digests of the records.

    Args:
        url: the cache.
        repair: remove bad partitions (record first), so that the next `extract` rebuilds just those.
        progress: called with every entry before it is checked.

    Raises:
        MissingDataError: no cache there.
        FormatVersionError: written by a newer version.
        CorruptCacheError: `cache.json` itself is damaged; nothing else can be judged then.
    """
    paths = Paths(local_path(url))
    if not paths.metadata.exists():
        raise MissingDataError(f"{str(paths.root)!r} is not a cache: it has no cache.json")
    read_document(paths.metadata, CacheMetadata)
    report = VerifyReport()
    for entry, check, remove in _entries(paths):
        if progress is not None:
            progress(entry)
        report.checked += 1
        try:
            check()
        except FormatVersionError:
            raise
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


def _entries(paths: Paths) -> Iterator[tuple[str, Callable[[], object], Callable[[], None]]]:
    """(entry, check that raises, remove) of every committed thing; features come after their geometry."""
    geometry: dict[str, GeometryRecord] = {}

    def check_geometry(path: Path) -> None:
        record = read_document(path, GeometryRecord)
        _check_arrays(path.with_suffix(".zarr"), record)
        geometry[path.stem] = record

    def check_features(path: Path, spec_path: Path) -> None:
        record = read_document(path, FeatureRecord)
        spec = read_document(spec_path, VFMSpec)
        if record.vfm_digest != spec.digest:
            raise MismatchError(f"made by VFM {record.vfm_digest[:16]}, its store is of {spec.digest[:16]}")
        if path.stem not in geometry:
            raise MissingDataError("the geometry that these features belong to is missing or damaged")
        if record.geometry_digest != geometry[path.stem].digest:
            raise MismatchError(
                f"made from geometry {record.geometry_digest[:16]}, the cache's is {geometry[path.stem].digest[:16]}"
            )
        folder = path.with_suffix(".zarr")
        _check_arrays(folder, record)
        index = read_array(folder, "index", record.arrays["index"])
        check_index(spec, geometry[path.stem], index, record.arrays["table"].shape[0])

    for path in sorted(paths.geometry.glob("*.json")):
        yield f"geometry/{path.stem}", partial(check_geometry, path), partial(_remove, path)
    for folder in sorted(p for p in (paths.root / "features").glob("*") if p.is_dir()):
        spec_path = folder / "vfm.json"
        records = sorted(p for p in folder.glob("*.json") if p.name != "vfm.json")
        if not records and not spec_path.exists():
            continue  # a run was killed before it committed anything here
        remove_spec = partial(spec_path.unlink, missing_ok=True)
        yield f"features/{folder.name}/vfm.json", partial(_check_spec, spec_path), remove_spec
        for path in records:
            yield (
                f"features/{folder.name}/{path.stem}",
                partial(check_features, path, spec_path),
                partial(_remove, path),
            )


def _check_spec(path: Path) -> None:
    spec = read_document(path, VFMSpec)
    if spec.key != path.parent.name:
        raise MismatchError(f"the folder is named {path.parent.name!r} but describes {spec.key!r}")


def _check_arrays(folder: Path, record: GeometryRecord | FeatureRecord) -> None:
    for name, size in record.files.items():
        path = folder / name
        if not path.is_file():
            raise MissingDataError(f"{path} is committed but missing")
        if path.stat().st_size != size:
            raise CorruptCacheError(f"{path}: expected {size} bytes as committed, got {path.stat().st_size}")
    for name, info in record.arrays.items():
        if array_digest(read_array(folder, name, info)) != info.sha256:
            raise CorruptCacheError(f"{folder / name}: its content is not what was committed (SHA-256 differs)")


def _remove(record: Path) -> None:
    """Take a commit back: the record first, so that no reader takes the rest for a partition."""
    record.unlink(missing_ok=True)
    remove_folder(record.with_suffix(".zarr"))
