"""One thread launches the VFM, on batches that several partitions fill together; another waits for their tokens.

Every batch has the same size; the last images of all are padded. So the same kernels run for every batch, tokens of an
image do not depend on what else is in its batch, and torch.compile compiles once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ditr_cache.errors import DataError
from ditr_cache.timeline import Timeline

K = TypeVar("K")

POLL = 0.2
"""Seconds after which one who waits for a turn looks whether the run ends."""


class Stopped(Exception):  # noqa: N818  nobody's error
    """The run ends; what is not committed yet is left to the next one."""


class Launched(Protocol):
    """A forward pass that was started."""

    def outcomes(self) -> Sequence[torch.Tensor | DataError]:
        """Tokens [rows, columns, C] of each image, or what is wrong with them; waits for them."""


class Launches(Protocol):
    """What a `Batcher` needs of a VFM."""

    def launch(self, images: Sequence[NDArray[np.uint8]]) -> Launched:
        """Start the forward pass of prepared images [h, w, 3]."""


class Batcher:
    """Tokens of images that come from several partitions at once. Safe to use from several threads.

    A batch runs as soon as it is full, or as soon as no partition can add to it. Images of the partition that began
    first go first, so that partitions end one after the other: one is lifted and written while the next is embedded.
    The last image of the next is held back until the one before is committed, see `turn`.

    Args:
        vfm: launched by one thread alone.
        batch_size: images per forward pass.
        ahead: batches that are launched before the one before them has ended: 1 where `launch` returns before the
            device is done, so that the device always has its next batch; else 0.
    """

    def __init__(self, vfm: Launches, batch_size: int, *, ahead: int = 0) -> None:
        self.batch_size = batch_size
        self._vfm, self._ahead = vfm, ahead
        # Beside what is launched, a whole batch waits. So whoever may feed no more can always be served.
        self._most = batch_size * (2 + ahead)
        self._lock = threading.Lock()
        self._feeds: list[_Feed] = []
        self._running = 0
        self._stopped = False
        self._last_end = 0
        self._turn = threading.Lock()
        # Their threads end when this object is let go of, or with the interpreter. A thread that waits for the device
        # cannot see that the next batch has become full.
        self._launcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="launch")
        self._completer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forward")

    @contextmanager
    def turn(self) -> Iterator[Turn]:
        """What a partition holds from its last image to its commit, where this context ends.

        So at most one partition is embedded and not committed, whenever the process is killed.
        """
        turn = Turn(self, self._turn)
        try:
            yield turn
        finally:
            turn.leave()

    def embed(
        self, images: Iterable[tuple[K, NDArray[np.uint8]]], timeline: Timeline, turn: Turn
    ) -> Generator[tuple[K, torch.Tensor], None, None]:
        """Tokens [rows, columns, C] of the images of one partition, in their order, each with its key.

        Images are taken from the iterable a batch or two ahead of the tokens that are asked for. Close the iterator
        where it is left early.

        Args:
            images: (key, prepared image [h, w, 3]).
            timeline: gets the partition's share of the forward passes.
            turn: of the partition; taken before its last image.

        Raises:
            DataError: tokens that are not finite.
            Stopped: the run ends.
        """
        feed = _Feed(timeline)
        fed: deque[tuple[K, Future[torch.Tensor]]] = deque()
        with self._lock:
            self.check()
            self._feeds.append(feed)
        try:
            given = iter(images)
            upcoming = next(given, None)
            while upcoming is not None:
                key, image = upcoming
                upcoming = next(given, None)
                if upcoming is None and not turn.take(wait=False):
                    self._close(feed)  # who has the turn must not wait for this partition in turn
                    while fed:
                        yield _received(*fed.popleft())
                    turn.take()
                fed.append((key, self._add(feed, image)))
                while fed and (fed[0][1].done() or len(fed) >= self._most):
                    yield _received(*fed.popleft())
            self._close(feed)
            while fed:
                yield _received(*fed.popleft())
        finally:
            with self._lock:
                self._feeds.remove(feed)
                self._wake()

    def check(self) -> None:
        """Raise `Stopped` where the run ends."""
        if self._stopped:
            raise Stopped

    def stop(self) -> None:
        """Take no further images; who waits for tokens gets `Stopped`. A batch that runs is completed."""
        with self._lock:
            self._stopped = True
            waiting = [item for feed in self._feeds for item in feed.waiting]
            for feed in self._feeds:
                feed.waiting.clear()
        for item in waiting:
            item.tokens.set_exception(Stopped())

    def _add(self, feed: _Feed, image: NDArray[np.uint8]) -> Future[torch.Tensor]:
        tokens: Future[torch.Tensor] = Future()
        with self._lock:
            self.check()
            feed.waiting.append(_Item(image, tokens, feed))
            self._wake()
        return tokens

    def _close(self, feed: _Feed) -> None:
        with self._lock:
            feed.open = False
            self._wake()

    def _ready(self) -> bool:
        waiting = sum(len(feed.waiting) for feed in self._feeds)
        return waiting >= self.batch_size or (waiting > 0 and not any(feed.open for feed in self._feeds))

    def _wake(self) -> None:
        """Launch what is ready, as far ahead as may be. To be called with the lock, whenever one of both changes."""
        while self._running <= self._ahead and self._ready():
            self._running += 1
            self._launcher.submit(self._launch, self._take())

    def _take(self) -> list[_Item]:
        """The next batch."""
        taken: list[_Item] = []
        for feed in self._feeds:
            while feed.waiting and len(taken) < self.batch_size:
                taken.append(feed.waiting.popleft())
        return taken

    def _launch(self, batch: list[_Item]) -> None:
        start = time.perf_counter_ns()
        images = [item.image for item in batch]
        images += images[-1:] * (self.batch_size - len(images))
        tokens, feeds = [item.tokens for item in batch], [item.feed for item in batch]
        batch.clear()  # the images are the device's now; who submitted this call still has the list
        try:
            launched = self._vfm.launch(images)
        except BaseException as error:  # whoever waits for the tokens has to know, whatever it is
            self._end(tokens, [error] * len(tokens))
        else:
            self._completer.submit(self._complete, _Running(launched, tokens, feeds, start))

    def _complete(self, running: _Running) -> None:
        try:
            outcomes = running.launched.outcomes()
        except BaseException as error:  # as above
            self._end(running.tokens, [error] * len(running.tokens))
            return
        end = time.perf_counter_ns()
        start = max(running.start, self._last_end)  # one that was launched ahead has waited for the one before
        self._last_end = end
        for i, feed in enumerate(dict.fromkeys(running.feeds)):
            share = running.feeds.count(feed) / len(running.feeds)
            feed.timeline.add("forward", start, end, share=share, span=not i)
        self._end(running.tokens, outcomes)

    def _end(self, waiting: Sequence[Future[torch.Tensor]], outcomes: Sequence[torch.Tensor | BaseException]) -> None:
        """A batch that has ended makes room for the next, before those who wait for it go on."""
        with self._lock:
            self._running -= 1
            self._wake()
        for tokens, outcome in zip(waiting, outcomes, strict=False):  # without those of the padding
            if isinstance(outcome, BaseException):
                tokens.set_exception(outcome)
            else:
                tokens.set_result(outcome)


class Turn:
    """The turn of one partition to be embedded to its end, see `Batcher.turn`."""

    def __init__(self, batcher: Batcher, lock: threading.Lock) -> None:
        self._batcher, self._lock, self._mine = batcher, lock, False

    def take(self, *, wait: bool = True) -> bool:
        """Take the turn; whether it is this partition's.

        Args:
            wait: until the partition before is committed or given up.

        Raises:
            Stopped: the run ends.
        """
        self._mine = self._lock.acquire(blocking=False)
        while wait and not self._mine:
            self._batcher.check()
            self._mine = self._lock.acquire(timeout=POLL)
        return self._mine

    def leave(self) -> None:
        """Leave the turn to the next partition, where it was taken."""
        if self._mine:
            self._mine = False
            self._lock.release()


class _Feed:
    """Images of one partition that wait for a batch."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.waiting: deque[_Item] = deque()
        self.open = True


class _Item(NamedTuple):
    image: NDArray[np.uint8]
    tokens: Future[torch.Tensor]
    feed: _Feed


class _Running(NamedTuple):
    launched: Launched
    tokens: Sequence[Future[torch.Tensor]]
    feeds: Sequence[_Feed]
    start: int


def _received(key: K, future: Future[torch.Tensor]) -> tuple[K, torch.Tensor]:
    tokens = future.result()
    if tokens.is_cuda:  # made on another stream than that of this thread, whose work must be waited for before reuse
        tokens.record_stream(torch.cuda.current_stream(tokens.device))
    return key, tokens
