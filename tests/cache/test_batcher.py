"""Batches that several partitions fill: what runs when, what ends up where, and that nobody waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from ditr_cache.batcher import Batcher, Stopped
from ditr_cache.errors import DataError
from ditr_cache.timeline import Timeline

SOON = 30.0
"""Seconds after which a test takes it that something hangs."""

BAD = 255
"""An image whose tokens are not finite."""


def image(number: int) -> NDArray[np.uint8]:
    return np.full((2, 2, 3), number, np.uint8)


class Network:
    """Tokens [1, 1, 1] that hold the image's number. Keeps the numbers of each batch; waits where it is told to."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()
        self.threads: set[str] = set()
        self.ended = 0

    def launch(self, images: Sequence[NDArray[np.uint8]]) -> Pass:
        self.threads.add(threading.current_thread().name)
        self.batches.append([int(i[0, 0, 0]) for i in images])
        return Pass(self, self.batches[-1])


class Pass:
    def __init__(self, network: Network, numbers: list[int]) -> None:
        self.network, self.numbers = network, numbers

    def outcomes(self) -> list[torch.Tensor | DataError]:
        assert self.network.go.wait(SOON)
        self.network.ended += 1
        return [DataError("not finite") if n == BAD else torch.full((1, 1, 1), float(n)) for n in self.numbers]


def embed(
    batcher: Batcher,
    images: Iterable[tuple[int, NDArray[np.uint8]]],
    timeline: Timeline | None = None,
    commit: Callable[[], Any] = lambda: None,
) -> list[int]:
    """What comes back for a partition of these images, which is then committed: pairs of key and token agree."""
    with (
        batcher.turn() as turn,
        closing(batcher.embed(images, timeline or Timeline(), turn)) as embedded,
    ):
        found = [(key, int(tokens.item())) for key, tokens in embedded]
        commit()
    assert [key for key, _ in found] == [value for _, value in found]
    return [key for key, _ in found]


def numbered(numbers: Iterable[int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    return ((n, image(n)) for n in numbers)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="partition")
    yield pool
    pool.shutdown(cancel_futures=True)


def soon(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# --- one partition --------------------------------------------------------------------------------------------------


@given(count=st.integers(0, 20), batch_size=st.integers(1, 6), ahead=st.integers(0, 2))
def test_tokens_come_back_in_order_and_batches_have_one_size(count: int, batch_size: int, ahead: int) -> None:
    network = Network()
    assert embed(Batcher(network, batch_size, ahead=ahead), numbered(range(count))) == list(range(count))
    assert all(len(batch) == batch_size for batch in network.batches)
    flat = [n for batch in network.batches for n in batch]
    assert flat[:count] == list(range(count))
    assert set(flat[count:]) <= {count - 1}, "padded with the last image"
    assert len(flat) - count < batch_size
    assert len(network.threads) <= 1


@pytest.mark.parametrize("ahead", [0, 1])
def test_few_images_are_taken_ahead(threads: ThreadPoolExecutor, ahead: int) -> None:
    """However slow the network and however long the partition: memory is bounded."""
    network, taken = Network(), []
    network.go.clear()
    batcher = Batcher(network, 3, ahead=ahead)

    def images() -> Iterator[tuple[int, NDArray[np.uint8]]]:
        for n in range(100):
            taken.append(n)
            yield n, image(n)

    done = threads.submit(embed, batcher, images())
    most = 3 * (2 + ahead)
    soon(lambda: len(taken) == most + 1 and len(network.batches) == 1 + ahead)  # one to know whether it is the last
    time.sleep(0.05)
    assert (len(taken), len(network.batches)) == (most + 1, 1 + ahead)
    network.go.set()
    assert done.result(SOON) == [*range(100)]


def test_launched_ahead_the_next_batch_waits_on_the_device(threads: ThreadPoolExecutor) -> None:
    network = Network()
    network.go.clear()
    done = threads.submit(embed, Batcher(network, 2, ahead=1), numbered(range(8)))
    soon(lambda: len(network.batches) == 2)
    assert network.ended == 0
    network.go.set()
    assert done.result(SOON) == list(range(8))


# --- several partitions ---------------------------------------------------------------------------------------------


class Source:
    """Images of one partition that the test hands out one after the other.

    The batcher gets each when it has seen that it is not the last: when the next is given.
    """

    def __init__(self, threads: ThreadPoolExecutor, batcher: Batcher) -> None:
        self.allowed, self.asked = threading.Semaphore(0), threading.Event()
        self.numbers: list[int | None] = []
        self.timeline = Timeline()
        self.committed = threading.Event()
        self.committed.set()
        images, commit = self._images(), lambda: self.committed.wait(SOON)
        self.found: Future[list[int]] = threads.submit(embed, batcher, images, self.timeline, commit)
        assert self.asked.wait(SOON)

    def give(self, *numbers: int | None) -> None:
        """Hand out images; None ends them."""
        self.numbers.extend(numbers)
        self.allowed.release(len(numbers))

    def _images(self) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        for position in range(1000):
            self.asked.set()
            assert self.allowed.acquire(timeout=SOON)
            number = self.numbers[position]
            if number is None:
                return
            yield number, image(number)


def test_a_batch_fills_across_partitions(threads: ThreadPoolExecutor) -> None:
    network = Network()
    batcher = Batcher(network, 4)
    first, second = Source(threads, batcher), Source(threads, batcher)
    first.give(1, 2, None)
    second.give(5, 6)
    time.sleep(0.02)
    assert network.batches == [], "the second may fill it"
    second.give(7)
    assert first.found.result(SOON) == [1, 2]
    assert network.batches == [[1, 2, 5, 6]]
    second.give(None)
    assert second.found.result(SOON) == [5, 6, 7]
    assert network.batches[1:] == [[7, 7, 7, 7]]
    total = first.timeline.seconds["forward"] + second.timeline.seconds["forward"]
    assert 0 < first.timeline.seconds["forward"] < second.timeline.seconds["forward"] < total


def test_a_tail_is_not_held_back_once_nothing_can_come(threads: ThreadPoolExecutor) -> None:
    network = Network()
    batcher = Batcher(network, 4)
    first, second = Source(threads, batcher), Source(threads, batcher)
    first.give(1, None)
    second.give(None)
    assert (first.found.result(SOON), second.found.result(SOON)) == ([1], [])
    assert network.batches == [[1, 1, 1, 1]]


def test_the_partition_that_began_first_goes_first(threads: ThreadPoolExecutor) -> None:
    network = Network()
    network.go.clear()
    batcher = Batcher(network, 2)
    first, second = Source(threads, batcher), Source(threads, batcher)
    second.give(50, 51, 52, 53, 54)
    soon(lambda: len(network.batches) == 1)
    first.give(1, 2, 3)
    soon(lambda: first.allowed._value == 0)
    time.sleep(0.02)
    network.go.set()
    soon(lambda: len(network.batches) == 3)
    assert network.batches == [[50, 51], [1, 2], [52, 53]]
    for source in (first, second):
        source.give(None)
    assert (first.found.result(SOON), second.found.result(SOON)) == ([1, 2, 3], [50, 51, 52, 53, 54])


def test_the_last_image_waits_until_the_partition_before_is_committed(threads: ThreadPoolExecutor) -> None:
    """Killed at any moment, a process loses one embedded partition at most."""
    network = Network()
    batcher = Batcher(network, 2)
    first, second = Source(threads, batcher), Source(threads, batcher)
    first.committed.clear()
    first.give(1, None)
    soon(batcher._turn.locked)
    second.give(5, 6, 7, 8, None)
    soon(lambda: network.batches == [[1, 5], [6, 7]])
    time.sleep(0.05)
    assert network.batches == [[1, 5], [6, 7]] and not first.found.done()
    first.committed.set()
    assert (first.found.result(SOON), second.found.result(SOON)) == ([1], [5, 6, 7, 8])
    assert network.batches[2:] == [[8, 8]]


def test_a_turn_is_left_by_who_fails_to_commit(threads: ThreadPoolExecutor) -> None:
    def fails() -> None:
        raise OSError("disk full")

    batcher = Batcher(Network(), 1)
    with pytest.raises(OSError, match="disk full"):
        embed(batcher, numbered([1, 2]), commit=fails)
    assert embed(batcher, numbered([1, 2])) == [1, 2]


def test_stopped_nobody_waits_for_a_turn(threads: ThreadPoolExecutor) -> None:
    network = Network()
    batcher = Batcher(network, 1)
    first, second = Source(threads, batcher), Source(threads, batcher)
    first.committed.clear()
    first.give(1, None)
    soon(lambda: network.batches == [[1]])
    second.give(5, None)
    soon(lambda: second.allowed._value == 0)
    batcher.stop()
    with pytest.raises(Stopped):
        second.found.result(SOON)
    first.committed.set()
    assert first.found.result(SOON) == [1]


@given(st.lists(st.lists(st.integers(20, 250), max_size=12), min_size=1, max_size=4), st.integers(1, 5))
def test_nobody_waits_for_ever(partitions: list[list[int]], batch_size: int) -> None:
    batcher = Batcher(Network(), batch_size, ahead=1)
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = [pool.submit(embed, batcher, numbered(numbers)) for numbers in partitions]
        assert [f.result(SOON) for f in found] == partitions


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_tokens_that_are_not_finite_fail_their_own_partition_only(threads: ThreadPoolExecutor) -> None:
    network = Network()
    batcher = Batcher(network, 2)
    first, second = Source(threads, batcher), Source(threads, batcher)
    first.give(BAD)
    second.give(2, 3)
    with pytest.raises(DataError, match="not finite"):
        first.give(None)
        first.found.result(SOON)
    second.give(None)
    assert second.found.result(SOON) == [2, 3]
    assert network.batches == [[BAD, 2], [3, 3]]


def test_an_error_of_the_network_reaches_all_of_its_batch_and_no_other() -> None:
    class Failing(Network):
        def launch(self, images: Sequence[NDArray[np.uint8]]) -> Pass:
            launched = super().launch(images)
            if len(self.batches) == 1:
                raise RuntimeError("out of memory")
            return launched

    batcher = Batcher(Failing(), 2)
    with pytest.raises(RuntimeError, match="out of memory"):
        embed(batcher, numbered(range(5)))
    assert embed(batcher, numbered(range(5))) == list(range(5))


def test_a_partition_that_is_given_up_does_not_hold_others_back(threads: ThreadPoolExecutor) -> None:
    network = Network()
    batcher = Batcher(network, 4)

    def broken() -> Iterator[tuple[int, NDArray[np.uint8]]]:
        yield 1, image(1)
        raise OSError("unreadable")

    other = Source(threads, batcher)
    other.give(5, None)
    with pytest.raises(OSError, match="unreadable"):
        embed(batcher, broken())
    assert other.found.result(SOON) == [5]
    assert network.batches == [[5, 5, 5, 5]]


def test_stopped_nobody_waits_and_nothing_more_runs(threads: ThreadPoolExecutor) -> None:
    network = Network()
    network.go.clear()
    batcher = Batcher(network, 1)
    busy: list[Future[Any]] = [threads.submit(embed, batcher, numbered(range(n, n + 9))) for n in (20, 40)]
    soon(lambda: len(network.batches) == 1)
    batcher.stop()
    network.go.set()
    for future in busy:
        with pytest.raises(Stopped):
            future.result(SOON)
    assert len(network.batches) == 1
    with pytest.raises(Stopped):
        batcher.check()
    with pytest.raises(Stopped):
        embed(batcher, numbered([1]))


def test_its_threads_end_with_it() -> None:
    batcher = Batcher(Network(), 1)
    embed(batcher, numbered([1]))
    ends = [*batcher._launcher._threads, *batcher._completer._threads]
    assert len(ends) == 2 and all(thread.is_alive() for thread in ends)
    del batcher
    for thread in ends:
        thread.join(SOON)
        assert not thread.is_alive()
