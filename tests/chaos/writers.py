"""Clocks that jump, two runs on one cache, and two writers of one partition whose steps fall in any order."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ditr_cache.codecs import make_codec
from ditr_cache.errors import CacheError
from ditr_cache.files import is_alive, remove_leftovers
from ditr_cache.schema import CacheMetadata, LinkSettings, SampleInfo, VFMSpec, ViewInfo
from ditr_cache.store import CacheWriter, open_cache
from ditr_cache.verify import verify
from forked_runs import in_child, wait
from kills import Bench, finish, traced
from table import Row
from traced_work import Trace
from verdict import Truth, judge, truth_of

TEN_YEARS = 10 * 365.25 * 86400
CHANGES = ("rename", "replace", "unlink", "mkdir", "link")
POINTS, DIM = 40, 5


# --- clocks ---------------------------------------------------------------------------------------------------------


@contextmanager
def clock_moved(seconds: float) -> Iterator[None]:
    """The clock of this process is wrong by so much; its steady clocks go on."""
    before, nanoseconds = time.time, time.time_ns
    time.time = lambda: before() + seconds
    time.time_ns = lambda: nanoseconds() + int(seconds * 1e9)
    try:
        yield
    finally:
        time.time, time.time_ns = before, nanoseconds


def clock_jumps(bench: Bench, combination: tuple[str, str]) -> Row:
    """Runs that live while the clock of another jumps, or while their files get dates of another century."""
    row = Row(f"clock jumps, two runs, {combination[0]}, {combination[1]}", redone=0)
    truth = bench.truth(f"clean-{combination[0]}-{combination[1]}")
    for jump in (TEN_YEARS, -TEN_YEARS, None):
        for number, dated in enumerate((None, 0.0, 4102444800.0)):  # as they are, 1970, 2100
            cache = f"clock-{jump}-{number}"
            where, trace = bench.folder / cache, Trace(bench.folder / f"{cache}.trace")
            first = in_child(traced(bench.run(cache, combination), trace.path))
            _until(lambda where=where: any(_temporaries(where)) and (where / "cache.json").exists())  # type: ignore[misc]
            os.kill(first, signal.SIGSTOP)  # in the middle of a write, say
            if dated is not None:
                for path in _temporaries(where):
                    os.utime(path, (dated, dated))
            row.trials += 1

            def second(jump: float | None = jump, cache: str = cache, first: int = first) -> None:
                with clock_moved(jump or 0.0):
                    pid = os.getpid()
                    if in_child_resume(first, pid):
                        traced(bench.run(cache, combination), bench.folder / f"{cache}.trace")()

            pids = [in_child(second), first]
            row.trouble += [f"{cache}: a run ended with {code}" for code in map(wait, pids) if code]
            count = [p for e, p, _ in trace.events() if e == "committed"]
            row.redone = max(row.redone or 0, max((count.count(p) - 1 for p in count), default=0))
            finish(bench, row, where, truth)
            row.harmless += 1
            shutil.rmtree(where)
    return row


def in_child_resume(stopped: int, pid: int) -> bool:
    """Let a stopped process go on in half a second, when this one is at work."""
    if os.fork() == 0:
        time.sleep(0.5)
        if is_alive(stopped) and is_alive(pid):
            os.kill(stopped, signal.SIGCONT)
        os._exit(0)
    return True


def _temporaries(cache: Path) -> list[Path]:
    return [p for p in cache.rglob(".*.tmp") if p.parent.name != ".claims"]


def _until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.0005)


def leftovers_by_any_clock(folder: Path) -> Row:
    """Temporary files of processes that live, of this host and of others, are left alone whatever the clocks say."""
    row = Row("clock jumps, leftovers", redone=None)
    for jump in (TEN_YEARS, 0.0, -TEN_YEARS):
        for dated in (None, 0.0, 4102444800.0):
            root = folder / f"leftovers-{jump}-{dated}"
            (root / "geometry").mkdir(parents=True)
            mine = root / "geometry" / f".{socket.gethostname()}+{os.getpid()}+abc.tmp"
            other = root / "geometry" / ".elsewhere+1+abc.tmp"
            mine.write_text("half")
            other.write_text("half")
            if dated is not None:
                os.utime(mine, (dated, dated))
            with clock_moved(jump):
                remove_leftovers(root)
            row.trials += 1
            gone = [path.name for path in (mine, other) if not path.exists()]
            row.harmless += not gone
            row.trouble += [f"{root.name}: {name} of a live process was removed" for name in gone]
    return row


# --- two runs -------------------------------------------------------------------------------------------------------


def two_runs(bench: Bench, combination: tuple[str, str], trials: int, rng: np.random.Generator) -> Row:
    """Two runs that begin at nearly the same moment share the work."""
    row = Row(f"two runs, {combination[0]}, {combination[1]}", redone=0)
    truth = bench.truth(f"clean-{combination[0]}-{combination[1]}")
    for number in range(trials):
        cache = f"both-{number}"
        trace = Trace(bench.folder / f"{cache}.trace")
        pids = []
        for _ in range(2):
            pids.append(in_child(traced(bench.run(cache, combination), trace.path)))
            time.sleep(float(rng.uniform(0, 0.3)))
        row.trouble += [f"{cache}: a run ended with {code}" for code in map(wait, pids) if code]
        row.trials += 1
        count = [p for e, p, _ in trace.events() if e == "embedded"]
        row.redone = max(row.redone or 0, max((count.count(p) - 1 for p in count), default=0))
        row.harmless += 1
        finish(bench, row, bench.folder / cache, truth)
        shutil.rmtree(bench.folder / cache)
    return row


# --- two writers of one partition -----------------------------------------------------------------------------------


SPEC = VFMSpec(
    name="fake", architecture="fake_net", weights_sha256="0" * 64, tap="blocks.3", norm=True, mean=(0.4, 0.5, 0.6),
    std=(0.2, 0.25, 0.3), interpolation="bicubic", image_size=(28, 42), grid=(2, 3), dim=DIM, codec="int8",
)  # fmt: skip


def commit(writer: CacheWriter, seed: int, what: str) -> None:
    """Commit a partition's geometry, or its features, of a content that the seed decides; sizes are mostly alike."""
    rng = np.random.default_rng(0 if what == "features" else seed)
    if what == "geometry":
        view = ViewInfo(id="v", links=POINTS)
        info = SampleInfo(id="scene", split="train", points=POINTS, linked_points=POINTS, views=(view,))
        order = rng.permutation(POINTS)
        arrays: dict[str, np.ndarray[Any, Any]] = {
            "coord": rng.normal(size=(POINTS, 3)).astype(np.float32),
            "source_index": order.astype(np.uint32),
            "offset": np.array([POINTS]),
            "link_point": order.astype(np.uint32),
            "link_uv": rng.integers(0, 65536, (POINTS, 2)).astype(np.uint16),
            "link_depth": rng.uniform(1, 2, POINTS).astype(np.float16),
        }
        writer.commit_geometry("scene", [info], arrays)
        return
    geometry = writer.geometry("scene")
    assert geometry is not None
    rows = np.random.default_rng(seed).normal(size=(POINTS, DIM)).astype(np.float32)
    writer.commit_features(
        SPEC, geometry, make_codec("int8", DIM).encode(rows), np.arange(POINTS, dtype=np.int32), images=1
    )


def metadata() -> CacheMetadata:
    """Of the caches that two writers share."""
    return CacheMetadata(
        dataset="fake", class_names=("floor",), class_colors=((1, 2, 3),), links=LinkSettings(), class_groups=()
    )


class OtherWriter:
    """A process that commits when it is told to. Forked off before this one reads or writes any array."""

    def __init__(self) -> None:
        (self._asked, ask), (answered, answer) = os.pipe(), os.pipe()
        self.pid = in_child(lambda: self._serve(answer))
        self._ask, self._answers = os.fdopen(ask, "w"), os.fdopen(answered)

    def commit(self, root: Path, seed: int, what: str) -> list[str]:
        """Commit there; the errors."""
        print(json.dumps([str(root), seed, what]), file=self._ask, flush=True)
        failures: list[str] = json.loads(self._answers.readline())
        return failures

    def stop(self) -> None:
        """End the process."""
        os.kill(self.pid, signal.SIGKILL)
        wait(self.pid)

    def _serve(self, answer: int) -> None:
        with os.fdopen(self._asked) as asked, os.fdopen(answer, "w") as answers:
            for line in asked:
                root, seed, what = json.loads(line)
                failures: list[str] = []
                _try(CacheWriter(root), seed, what, failures)
                print(json.dumps(failures), file=answers, flush=True)


class Between:
    """Runs something before the n-th change of the disk by this process that another one can see."""

    def __init__(self, at: int, then: Callable[[], None]) -> None:
        self.left, self._then = at, then
        self.done = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While this holds."""
        before = {name: getattr(os, name) for name in CHANGES}
        for name, call in before.items():
            setattr(os, name, self._wrapped(call))
        try:
            yield
        finally:
            for name, call in before.items():
                setattr(os, name, call)

    def _wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, *arguments: Any, **named: Any) -> Any:
            if Path(path).is_absolute() and ".tmp/" not in os.fspath(path):
                if self.left == 0 and not self.done:
                    self.done = True
                    self._then()
                self.left -= 1
            return call(path, *arguments, **named)

        return wrapped


def two_writers(folder: Path, other: OtherWriter, what: str, step: int, *, alike: bool) -> Row:
    """Two writers without claims commit one partition, one of them before every `step`-th change of the other.

    Of the same content, as two runs are, nothing may come of it. Of different content, a reader may get the one or the
    other, as a whole, or an error; never a mixture.
    """
    row = Row(f"two writers, {what}, {'same' if alike else 'different'} content")
    truths = []
    for seed in (1, 1 if alike else 2):
        writer = CacheWriter.create(folder / f"writers-{what}-{alike}-{len(truths)}", metadata())
        commit(writer, 1, "geometry")
        commit(writer, seed, what)
        truths.append(truth_of(writer.paths.root))
    for at in range(0, 1000, step):
        writer = CacheWriter.create(folder / f"writers-{what}-{alike}-at-{at}", metadata())
        if what == "features":
            commit(writer, 1, "geometry")
        failures: list[str] = []

        def commit_there(root: Path = writer.paths.root, failures: list[str] = failures) -> None:  # type: ignore[assignment]
            failures += other.commit(root, 2 - alike, what)

        between = Between(at, commit_there)
        with between.installed():
            _try(writer, 1, what, failures)
        if not between.done:
            break
        row.trials += 1
        _judge_writers(row, writer.paths.root, truths, failures, alike, f"step {at}")
        _try(writer, 1, what, [])
        row.completed += 1
        row.identical += verify(writer.paths.root).clean and not judge(writer.paths.root, truths[0]).silent
        shutil.rmtree(writer.paths.root)
    return row


def _try(writer: CacheWriter, seed: int, what: str, failures: list[str]) -> None:
    try:
        commit(writer, seed, what)
    except CacheError as error:
        failures.append(str(error))


def _judge_writers(row: Row, root: Path, truths: list[Truth], failures: list[str], alike: bool, where: str) -> None:
    verdict = judge(root, *truths)  # every read gives all of the one content, or all of the other, or is refused
    row.found += verdict.found
    row.refused += bool(verdict.refused)
    row.harmless += not verdict.found and not verdict.refused and not verdict.silent
    row.silent += [f"{where}: {text}" for text in verdict.silent]
    if verdict.refused and not verdict.found and open_cache(root).samples:
        row.silent.append(f"{where}: verify says clean, but a reader refuses: {verdict.refused[0]}")
    if alike and (verdict.refused or verdict.found):
        row.trouble.append(f"{where}: two runs of the same content damaged each other: {json.dumps(failures)}")


def reader_meets_writer(folder: Path, other: OtherWriter, step: int) -> Row:
    """A partition is committed anew, with other content, before the n-th call of a reader that opened the old one."""
    row, truths = Row("extracted again under a reader"), []
    for at in range(0, 1000, step):
        writer = CacheWriter.create(folder / f"reader-{at}", metadata())
        for what in ("geometry", "features"):
            commit(writer, 1, what)
        if not truths:  # of the old content, and of the new
            truths.append(truth_of(writer.paths.root))
            other.commit(writer.paths.root, 2, "geometry")  # type: ignore[arg-type]
            other.commit(writer.paths.root, 2, "features")  # type: ignore[arg-type]
            truths.append(truth_of(writer.paths.root))
            for what in ("geometry", "features"):
                commit(writer, 1, what)
        left, done = at, False

        def again(path: object, writer: CacheWriter = writer) -> None:
            nonlocal left, done
            if left == 0 and not done:
                done = True
                for what in ("geometry", "features"):
                    other.commit(writer.paths.root, 2, what)  # type: ignore[arg-type]
            left -= "scene" in os.fspath(path) if not isinstance(path, int) else 0  # type: ignore[call-overload]

        with _looking(again):
            verdict = judge(writer.paths.root, *truths, with_verify=False)
        if not done:
            break
        row.trials += 1
        row.refused += bool(verdict.refused)
        row.harmless += not verdict.refused
        fresh = judge(writer.paths.root, truths[1])
        row.found += fresh.found
        row.silent += [f"call {at}: {text}" for text in [*verdict.silent, *fresh.silent, *fresh.refused]]
        shutil.rmtree(writer.paths.root)
    return row


@contextmanager
def _looking(before: Callable[[object], None]) -> Iterator[None]:
    """Calls something before every file that is opened or looked at."""
    calls = {name: getattr(os, name) for name in ("open", "stat")}

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def look(path: Any, *arguments: Any, **named: Any) -> Any:
            before(path)
            return call(path, *arguments, **named)

        return look

    for name, call in calls.items():
        setattr(os, name, wrapped(call))
    try:
        yield
    finally:
        for name, call in calls.items():
            setattr(os, name, call)
