"""What a worker does when: seconds per stage of each partition, and on request every span, as a Chrome trace."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from ditr_cache.files import storage_errors

T = TypeVar("T")

STAGES = ("read", "link", "decode", "resize", "forward", "lift", "encode", "write")
"""From the dataset's files to a committed partition. They run beside each other, in several threads each."""

MAX_SPANS = 1 << 15
"""Spans that are kept of one partition: those of some 10 000 images, a megabyte on the way from a worker."""

# Of one clock for all processes: monotonic clocks start at the boot of each host.
_EPOCH = time.time_ns() - time.perf_counter_ns()


class Span(NamedTuple):
    """One stretch of work.

    Args:
        stage: one of `STAGES`.
        thread: the name of the thread that did it.
        start, end: nanoseconds since 1970.
    """

    stage: str
    thread: str
    start: int
    end: int


def this_process() -> str:
    """Host and process id, which tell one worker from another."""
    return f"{socket.gethostname()}:{os.getpid()}"


class Timeline:
    """The stages of one partition. Safe to use from several threads.

    Args:
        keep_spans: keep every span, up to `MAX_SPANS`; else sums alone.
    """

    def __init__(self, *, keep_spans: bool = False) -> None:
        self._lock = threading.Lock()
        self._seconds = dict.fromkeys(STAGES, 0.0)
        self._spans: list[Span] = []
        self._keep_spans = keep_spans

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record the block as one stretch of a stage, also where it raises."""
        start = time.perf_counter_ns()
        try:
            yield
        finally:
            self.add(name, start, time.perf_counter_ns())

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The same items; what it takes to get each is recorded."""
        iterator = iter(items)
        while True:
            with self.stage(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def add(self, name: str, start: int, end: int, *, share: float = 1.0, span: bool = True) -> None:
        """Record one stretch of a stage.

        Args:
            name: one of `STAGES`.
            start, end: of `time.perf_counter_ns`.
            share: of the stretch that counts for this partition, where several share it.
            span: whether this partition keeps the span; of those that share it one should.
        """
        with self._lock:
            self._seconds[name] += (end - start) * share * 1e-9
            if span and self._keep_spans and len(self._spans) < MAX_SPANS:
                self._spans.append(Span(name, threading.current_thread().name, start + _EPOCH, end + _EPOCH))

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent in each stage, summed over threads."""
        with self._lock:
            return dict(self._seconds)

    @property
    def spans(self) -> tuple[Span, ...]:
        """What was kept so far."""
        with self._lock:
            return tuple(self._spans)


def describe_stages(seconds: Mapping[str, float], wall: float, workers: int) -> str:
    """One line: seconds per stage, and how much of the wall time of its workers the forward pass took."""
    share = seconds.get("forward", 0.0) / max(wall * max(1, workers), 1e-9)
    stages = ", ".join(f"{name} {seconds.get(name, 0.0):.1f}" for name in STAGES)
    return f"seconds per stage: {stages}; forward {share:.0%} of {wall:.1f} s"


class ChromeTrace:
    """A trace for chrome://tracing or Perfetto, written while the run goes on: memory does not grow with the dataset.

    Args:
        path: of the JSON file; replaced where it exists.

    Raises:
        StorageError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._processes: dict[str, int] = {}
        self._threads: dict[tuple[str, str], int] = {}
        with storage_errors(self.path, "write"):
            self._file = self.path.open("w", encoding="utf-8")
        self._write('{"displayTimeUnit": "ms", "traceEvents": [')
        self._empty = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the file, however the run ended."""
        try:
            self._write("\n]}\n")
        finally:
            self._file.close()

    def add(self, process: str, partition: str, spans: Sequence[Span]) -> None:
        """Append the spans of one partition.

        Args:
            process: which worker ran it, see `this_process`.
            partition: its id.
            spans: in any order.
        """
        for span in spans:
            pid, tid = self._numbers(process, span.thread)
            self._event(
                name=span.stage,
                cat="ditr",
                ph="X",
                ts=span.start / 1000,
                dur=(span.end - span.start) / 1000,
                pid=pid,
                tid=tid,
                args={"partition": partition},
            )

    def _numbers(self, process: str, thread: str) -> tuple[int, int]:
        """Numbers of a process and of its thread; both are named in the file where they are new."""
        if process not in self._processes:
            self._processes[process] = len(self._processes) + 1
            self._event(name="process_name", ph="M", pid=self._processes[process], args={"name": process})
        pid = self._processes[process]
        if (process, thread) not in self._threads:
            self._threads[process, thread] = len(self._threads) + 1
            self._event(name="thread_name", ph="M", pid=pid, tid=self._threads[process, thread], args={"name": thread})
        return pid, self._threads[process, thread]

    def _event(self, **fields: object) -> None:
        self._write(("\n" if self._empty else ",\n") + json.dumps(fields))
        self._empty = False

    def _write(self, text: str) -> None:
        with storage_errors(self.path, "write"):
            self._file.write(text)
