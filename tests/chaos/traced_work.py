"""What workers do, noted in a file as they do it, so that what a kill cost can be counted afterwards.

Imported by a process that extracts, with the environment variable CHAOS_TRACE naming the file; by dask workers as a
preload. Every line is an event, a partition and a process; appended at once, it survives the process.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditr_cache.batcher import Batcher
from ditr_cache.partition import PartitionWorker
from ditr_cache.store import CacheWriter

TRACE = "CHAOS_TRACE"

_at_work = threading.local()


def note(event: str, partition: str) -> None:
    """Append one event."""
    trace = os.environ.get(TRACE)
    if trace:
        descriptor = os.open(trace, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(descriptor, f"{event} {partition} {os.getpid()}\n".encode())
        finally:
            os.close(descriptor)


def _install() -> None:
    work, embed, commit = PartitionWorker.__call__, Batcher.embed, CacheWriter.commit_features
    geometry = CacheWriter.commit_geometry

    def traced_work(self: PartitionWorker, partition: Any) -> Any:
        _at_work.partition = partition.id
        note("begun", partition.id)
        return work(self, partition)

    def traced_embed(self: Batcher, *arguments: Any) -> Iterator[Any]:
        yield from embed(self, *arguments)
        note("embedded", _at_work.partition)

    def traced_commit(self: CacheWriter, spec: Any, record: Any, *arguments: Any, **named: Any) -> Any:
        found = commit(self, spec, record, *arguments, **named)
        note("committed", record.partition)
        return found

    def traced_geometry(self: CacheWriter, partition: str, *arguments: Any, **named: Any) -> Any:
        note("linked", partition)
        return geometry(self, partition, *arguments, **named)

    PartitionWorker.__call__ = traced_work  # type: ignore[method-assign]
    Batcher.embed = traced_embed  # type: ignore[method-assign,assignment]
    CacheWriter.commit_features = traced_commit  # type: ignore[method-assign]
    CacheWriter.commit_geometry = traced_geometry  # type: ignore[method-assign]


if not getattr(PartitionWorker, "traced", False):  # dask loads a preload under another name
    PartitionWorker.traced = True  # type: ignore[attr-defined]
    _install()


@dataclass
class Trace:
    """The events of a file, oldest first."""

    path: Path

    def events(self, since: int = 0) -> list[tuple[str, str, int]]:
        """(event, partition, process), from a number of them on."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [(e, p, int(n)) for e, p, n in (line.split() for line in lines[since:] if line.count(" ") == 2)]

    def lost(self, since: int, present: set[str], features: bool = True) -> tuple[int, int]:
        """What a kill cost, of the worker that it cost most.

        Args:
            since: number of the first event of the run.
            present: partitions that are committed now.
            features: count features; otherwise geometry.

        Returns:
            Partitions whose features were all embedded (whose geometry was linked), and partitions that had begun, of
            those that are not committed.
        """
        complete, begun = Counter[int](), Counter[int]()
        for event, partition, process in set(self.events(since)):
            if partition not in present:
                complete[process] += event == ("embedded" if features else "linked")
                begun[process] += event == "begun"
        return max(complete.values(), default=0), max(begun.values(), default=0)
