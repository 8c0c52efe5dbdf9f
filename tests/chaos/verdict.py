"""What a reader and `verify` say of a cache that something happened to, against what a clean one gives."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditr_cache import open_cache
from ditr_cache.errors import CacheError
from ditr_cache.groups import open_group
from ditr_cache.store import CacheReader
from ditr_cache.verify import verify

Arrays = dict[str, NDArray[np.generic]]
Truth = dict[str, Arrays]
"""Every read of a clean cache, by its name, and the arrays that it gives."""


@dataclass
class Verdict:
    """Of one cache.

    Args:
        found: `verify` tells of something.
        refused: reads that raise, or samples and VFMs that are not offered.
        wrong: reads that give other arrays than the clean cache. There must be none.
        crashes: errors that are none of the package's. There must be none.
        right: number of reads that give what the clean cache gives.
    """

    found: bool = False
    refused: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)
    right: int = 0

    @property
    def silent(self) -> list[str]:
        """What nobody was told."""
        return [*self.wrong, *self.crashes]


def reads(reader: CacheReader, samples: list[str], keys: list[str]) -> Iterator[tuple[str, Callable[[], Arrays]]]:
    """Every way to read samples: as decoded, and as stored, whole, in part, and by each choice of view."""
    for sample in samples:
        yield f"{sample} points", lambda s=sample: _points(reader, s)  # type: ignore[misc]
        for key in keys:
            yield f"{sample} {key} read", lambda s=sample, k=key: _decoded(reader, s, k)  # type: ignore[misc]
            for view in (None, "nearest", "random"):
                yield (
                    f"{sample} {key} stored {view}",
                    lambda s=sample, k=key, v=view: _stored(reader, s, k, v),  # type: ignore[misc]
                )


def truth_of(cache: Path) -> Truth:
    """What a clean cache gives. Choices that a layout does not offer are left out."""
    reader = open_cache(cache)
    truth: Truth = {}
    for name, read in reads(reader, reader.samples, sorted(reader.vfms)):
        layout = next((s.layout for k, s in reader.vfms.items() if k in name), "views")
        if layout == "views" or not name.endswith(("nearest", "random")):
            truth[name] = read()
    return truth


def judge(
    cache: str | Path, truth: Truth, *others: Truth, with_verify: bool = True, keys: list[str] | None = None
) -> Verdict:
    """Read everything that the clean cache has, and verify. A read is right that gives what any of several gave."""
    verdict = Verdict()
    logging.getLogger("ditr_cache").setLevel(logging.CRITICAL)
    samples = sorted({name.split(" ")[0] for name in truth})
    keys = keys if keys is not None else sorted({n.split(" ")[1] for n in truth if not n.endswith(" points")})
    try:
        calls = dict(reads(open_cache(cache), samples, keys))
    except CacheError as error:
        verdict.refused.append(f"open: {error}")
        calls = {}
    except Exception as error:
        verdict.crashes.append(f"open: {type(error).__name__}: {error}")
        calls = {}
    for name, call in calls.items():
        if name in truth:
            _compare(name, call, [t[name] for t in (truth, *others)], verdict)
    if with_verify:
        try:
            verdict.found = not verify(cache).clean
        except CacheError:
            verdict.found = True
        except Exception as error:
            verdict.crashes.append(f"verify: {type(error).__name__}: {error}")
    return verdict


def _compare(name: str, call: Callable[[], Arrays], clean: list[Arrays], verdict: Verdict) -> None:
    try:
        found = call()
    except CacheError as error:
        verdict.refused.append(f"{name}: {error}")
    except Exception as error:
        verdict.crashes.append(f"{name}: {type(error).__name__}: {error}")
    else:
        differing = [[n for n in c if n not in found or not _same(found[n], c[n])] for c in clean]
        if all(differing):
            verdict.wrong.append(f"{name}: {', '.join(differing[0])}")
        else:
            verdict.right += 1


def _same(a: NDArray[np.generic], b: NDArray[np.generic]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _arrays(mapping: dict[str, object]) -> Arrays:
    return {k: v for k, v in mapping.items() if isinstance(v, np.ndarray)}


def _points(reader: CacheReader, sample: str) -> Arrays:
    """All arrays of the geometry of a sample's partition, those too that no reader's method gives."""
    stored = _arrays(vars(reader.read_stored(sample, None)))
    partition, _ = reader._locate(sample)
    record = reader.geometry[partition]
    group = open_group(reader.paths, reader.paths.geometry, record)
    return stored | {f"whole {name}": group.read(name) for name in record.arrays}


def _decoded(reader: CacheReader, sample: str, key: str) -> Arrays:
    return _arrays(dict(reader.read(sample, key)))


def _stored(reader: CacheReader, sample: str, key: str, view: str | None) -> Arrays:
    features = reader.read_stored(sample, key, view=view, rng=np.random.default_rng(0)).features
    assert features is not None
    some = np.arange(0, features.rows, 3)
    part, whole = features.take(some), features.encoded
    found: Arrays = {"index": features.index, "part": part.table, "whole": whole.table, "decoded": features.decoded()}
    if part.scale is not None and whole.scale is not None:
        found |= {"part scale": part.scale, "scale": whole.scale}
    return found
