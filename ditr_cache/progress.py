"""What a run tells while it goes on: one event per partition."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from ditr_cache.display import StatusDisplay
from ditr_cache.schema import BrokenView
from ditr_cache.timeline import STAGES, Span


@dataclass(frozen=True, kw_only=True)
class PartitionSummary:
    """What became of one partition. Small: it travels from workers to the client.

    Args:
        partition: its id.
        status: `done` (features made), `reused` (already there), `failed`, or `busy` (another run is making them).
        geometry: `computed`, `reused`, or `none` where the partition failed before it.
        images: images embedded.
        points, valid_points: of the partition; points with a feature.
        bytes: written to the cache.
        failures: views and samples left out (view is empty for a whole sample).
        fatal: the storage failed; no further partition can be written.
        process: which worker ran it; empty where none did.
        stages: seconds spent in each of `timeline.STAGES`.
        spans: the same one by one, where a profile is wanted.
    """

    partition: str
    status: str
    geometry: str = "none"
    images: int = 0
    points: int = 0
    valid_points: int = 0
    bytes: int = 0
    failures: tuple[BrokenView, ...] = ()
    fatal: bool = False
    process: str = ""
    stages: Mapping[str, float] = field(default_factory=dict)
    spans: tuple[Span, ...] = ()


@dataclass
class RunTotals:
    """Sums over the partitions of one run, and what `extract --json` prints."""

    started: float = field(default_factory=time.perf_counter)
    partitions: dict[str, int] = field(default_factory=lambda: {"done": 0, "reused": 0, "failed": 0})
    geometry: dict[str, int] = field(default_factory=lambda: {"computed": 0, "reused": 0})
    images: int = 0
    points: int = 0
    covered: int = 0
    points_seen: int = 0
    bytes: int = 0
    failures: list[BrokenView] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    workers: set[str] = field(default_factory=set)

    def add(self, summary: PartitionSummary) -> None:
        """Count one finished partition."""
        self.partitions[summary.status] += 1
        if summary.geometry in self.geometry:
            self.geometry[summary.geometry] += 1
        self.images += summary.images
        self.bytes += summary.bytes
        self.covered += summary.valid_points
        self.points_seen += summary.points
        if summary.status == "done":
            self.points += summary.points
        self.failures.extend(summary.failures)
        for stage, seconds in summary.stages.items():
            self.stages[stage] += seconds
        if summary.process:
            self.workers.add(summary.process)

    @property
    def seconds(self) -> float:
        """Since the run started."""
        return time.perf_counter() - self.started

    @property
    def finished(self) -> int:
        """Partitions that are through, however they ended."""
        return sum(self.partitions.values())

    @property
    def coverage(self) -> float:
        """Fraction of the points met, reused partitions included, that have a feature."""
        return self.covered / self.points_seen if self.points_seen else 0.0

    def to_dict(self) -> dict[str, object]:
        """The object that `--json` prints. Images, points, bytes and stages are of this run, coverage is of all it met.

        Stages are seconds of work, summed over threads and workers: together more than the seconds that passed.
        """
        return {
            "partitions": dict(self.partitions),
            "geometry": dict(self.geometry),
            "images": self.images,
            "points": self.points,
            "coverage": round(self.coverage, 6),
            "seconds": round(self.seconds, 3),
            "bytes": self.bytes,
            "stages": {stage: round(seconds, 3) for stage, seconds in self.stages.items()},
            "failures": [{"sample": f.sample, "view": f.view or None, "error": f.error} for f in self.failures],
        }

    def line(self, total: int) -> str:
        """One line that says where the run stands."""
        seconds = max(self.seconds, 1e-9)
        left = (total - self.finished) * seconds / self.finished if self.finished else 0.0
        failed = f", {self.partitions['failed']} failed" if self.partitions["failed"] else ""
        return (
            f"{self.finished}/{total} partitions ({self.partitions['reused']} reused{failed})  "
            f"{self.images / seconds:.1f} images/s  {human_count(self.points / seconds)} points/s  "
            f"{human_bytes(self.bytes)}  ETA {left:.0f} s"
        )


def human_bytes(size: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def human_count(number: float) -> str:
    """A count with a decimal suffix."""
    for unit in ("", "k", "M"):
        if abs(number) < 1000:
            return f"{number:.0f}{unit}"
        number /= 1000
    return f"{number:.1f}G"


class ProgressDisplay(StatusDisplay):
    """Keeps the totals of a run of so many partitions and shows them."""

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        super().__init__("extract", total, quiet=quiet)
        self.totals = RunTotals()

    def __call__(self, summary: PartitionSummary) -> None:
        """Count and show one finished partition."""
        self.totals.add(summary)
        for failure in summary.failures:
            self.skipped(failure.sample + (f" view {failure.view}" if failure.view else ""), failure.error)
        self.show(self.totals.finished, self.totals.line(self.total))
