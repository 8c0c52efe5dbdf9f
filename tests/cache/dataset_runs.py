"""Extraction of a written release by the package's own run, and its judgement: what the tests of all datasets do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ditr_cache.cached import CachedSample
from ditr_cache.extract import ExtractRequest, extract
from ditr_cache.partition import ExtractSettings
from ditr_cache.progress import RunTotals
from ditr_cache.store import CacheReader, open_cache
from ditr_cache.vfm import VFMRequest
from world import Report, Truth, World, judge

PATCH = 16


@dataclass(frozen=True, eq=False)
class Extracted:
    """A cache that was made of a written release."""

    cache: CacheReader
    totals: RunTotals
    grid: tuple[int, int]

    def sample(self, sample_id: str) -> CachedSample:
        return self.cache.read(sample_id)

    def report(self, truth: Truth, world: World) -> Report:
        """The judge's word on one sample."""
        return judge(self.sample(truth.sample_id), truth, world, self.grid, self.cache.metadata.class_names)


def run_dataset(
    name: str,
    root: Path,
    out: Path,
    checkpoint: Path,
    *,
    grid: tuple[int, int] = (12, 16),
    options: Mapping[str, str | int | float] | None = None,
    links: Mapping[str, int | float | str] | None = None,
    fuse: str = "last",
    splits: Sequence[str] | None = None,
) -> Extracted:
    """`ditr-cache extract` in this process, by the position network, one row per point.

    Args:
        name: of the dataset, as in the registry.
        root: where its writer wrote.
        out: of the cache.
        checkpoint: the session's fixture `position_checkpoint`.
        grid: of tokens, of 16 pixels each.
        options: of the dataset.
        links: link settings in place of the dataset's defaults.
        fuse: `last` or `nearest`: the judge knows no means.
        splits: None takes all.
    """
    request = ExtractRequest(
        settings=ExtractSettings(
            dataset=name,
            root=str(root),
            cache=str(out),
            vfm=VFMRequest(
                name="test_vit",
                checkpoint=str(checkpoint),
                image_size=(grid[0] * PATCH, grid[1] * PATCH),
                device="cpu",
            ),
            options=dict(options or {}),
            layout="fused",
            fuse=fuse,
            codec="float16",
        ),
        links=dict(links or {}),
        splits=None if splits is None else tuple(splits),
        workers=0,
    )
    totals = extract(request, quiet=True)
    return Extracted(open_cache(out), totals, grid)
