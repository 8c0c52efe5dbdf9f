"""A disk that is full, or whose blocks cannot be read: at every single call, and by true limits of the kernel."""

from __future__ import annotations

import builtins
import errno
import io
import logging
import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditr_cache.errors import CacheError
from ditr_cache.verify import verify
from forked_runs import in_child, wait
from kills import Bench, finish
from table import Row
from verdict import Truth, judge

CHANGES = ("fsync", "rename", "replace", "mkdir", "link", "open", "write")


@dataclass
class FailingCalls:
    """Lets the n-th call of some functions of the system fail, and with `onwards` all that follow.

    Args:
        code: the error number.
        at: which call, from 0.
        onwards: later ones fail, too.
        below: only calls for files below this folder count, where they name one.
    """

    code: int
    at: int
    onwards: bool
    below: Path
    count: int = 0
    failed: bool = False
    short: bool = False
    """Reads give half of what is asked for instead of an error."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self) -> bool:
        """Count a call; whether it has to fail."""
        with self._lock:
            number, self.count = self.count, self.count + 1
        due = number == self.at or (self.onwards and number > self.at)
        self.failed |= due
        return due

    def check(self) -> None:
        """Count a call, and raise where it has to fail."""
        if self.fail():
            raise OSError(self.code, os.strerror(self.code))

    def concerns(self, path: object) -> bool:
        """Whether a path, or the file of a descriptor, lies below the folder."""
        with suppress(OSError, TypeError):
            named = Path(f"/proc/self/fd/{path}").readlink() if isinstance(path, int) else os.fspath(path)  # type: ignore[call-overload]
            return str(named).startswith(str(self.below))
        return False

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Calls that change the disk."""
        with _replaced(os, {n: self._checked(getattr(os, n)) for n in CHANGES if n not in ("open", "write")}):
            opened = {"open": self._opener(io.open, "wax+", _Writing)}
            with _replaced(io, opened), _replaced(builtins, opened), _replaced(os, {"open": self._os_open(os.O_CREAT)}):
                yield

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Calls that look at the disk."""
        opened = {"open": self._opener(io.open, "r", _Reading)}
        calls = {"open": self._os_open(0), "stat": self._checked(os.stat)}
        calls |= {"pread": self._pread(os.pread), "preadv": self._preadv(os.preadv)}
        with _replaced(io, opened), _replaced(builtins, opened), _replaced(os, calls):
            yield

    def _checked(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def checked(path: Any, *arguments: Any, **named: Any) -> Any:
            if self.concerns(path):
                self.check()
            return call(path, *arguments, **named)

        return checked

    def _pread(self, call: Callable[..., bytes]) -> Callable[..., bytes]:
        def pread(descriptor: int, count: int, offset: int) -> bytes:
            if self.concerns(descriptor) and self.fail():
                if not self.short:
                    raise OSError(self.code, os.strerror(self.code))
                count //= 2
            return call(descriptor, count, offset)

        return pread

    def _preadv(self, call: Callable[..., int]) -> Callable[..., int]:
        def preadv(descriptor: int, parts: Sequence[Any], offset: int) -> int:
            if self.concerns(descriptor) and self.fail():
                if not self.short:
                    raise OSError(self.code, os.strerror(self.code))
                parts = [memoryview(parts[0])[: len(parts[0]) // 2]]
            return call(descriptor, parts, offset)

        return preadv

    def _os_open(self, flags: int) -> Callable[..., int]:
        call = os.open

        def opened(path: Any, how: int, *arguments: Any, **named: Any) -> int:
            if self.concerns(path) and (how & flags or not flags):
                self.check()
            return call(path, how, *arguments, **named)

        return opened

    def _opener(self, call: Callable[..., Any], modes: str, wrap: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            if not self.concerns(path) or not set(mode) & set(modes):
                return call(path, mode, *arguments, **named)
            self.check()
            return wrap(call(path, mode, *arguments, **named), self)

        return opened


class _Wrapped:
    """A file, all of whose calls but some are its own."""

    def __init__(self, file: Any, calls: FailingCalls) -> None:
        self._file, self._calls = file, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


class _Writing(_Wrapped):
    def write(self, content: Any) -> int:
        if self._calls.fail():
            part = (
                memoryview(content)[: len(content) // 2]
                if not isinstance(content, str)
                else content[: len(content) // 2]
            )
            self._file.write(part)  # what a disk does that runs full: the first half is there
            self._file.flush()
            raise OSError(self._calls.code, os.strerror(self._calls.code))
        return int(self._file.write(content))


class _Reading(_Wrapped):
    def read(self, *arguments: Any) -> Any:
        content = self._file.read(*arguments)
        if self._calls.fail():
            if not self._calls.short:
                raise OSError(self._calls.code, os.strerror(self._calls.code))
            content = content[: len(content) // 2]
        return content


@contextmanager
def _replaced(owner: Any, functions: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in functions}
    for name, function in functions.items():
        setattr(owner, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(owner, name, function)


def full_at_every_call(bench: Bench, combination: tuple[str, str], step: int, *, onwards: bool) -> Row:
    """Runs whose n-th change of the disk fails: only that one, or all from there on."""
    row = Row(f"ENOSPC at call n{' and later' if onwards else ''}, {combination[0]}, {combination[1]}")
    clean = f"clean-{combination[0]}-{combination[1]}"
    truth, at = bench.truth(clean), 0
    while True:
        cache = f"full-{combination[0]}-{combination[1]}-{onwards}-{at}"
        task = bench.run(cache, combination)

        def run(task: Callable[[], None] = task, at: int = at, cache: str = cache) -> None:
            calls = FailingCalls(errno.ENOSPC, at, onwards, bench.folder / cache)
            with calls.writing():
                code = quietly(task)
            (bench.folder / "failed").write_text(str(calls.failed))
            os._exit(code)

        code = wait(in_child(run))
        if (bench.folder / "failed").read_text() == "False":
            return row
        row.trials += 1
        _after_failure(bench, row, cache, truth, combination, code)
        at += step


def quietly(task: Callable[[], None]) -> int:
    """Run a task that may fail, as it should: with an error of the package, or a partition that failed. Then 4."""
    logging.getLogger("ditr_cache").setLevel(logging.CRITICAL)
    try:
        task()
    except (CacheError, RuntimeError):
        return 4
    return 0


def _after_failure(bench: Bench, row: Row, cache: str, truth: Truth, combination: tuple[str, str], code: int) -> None:
    """A run has failed with 4, or was done in spite of it: nothing is wrong in its cache, and the next completes it."""
    where = bench.folder / cache
    if code not in (0, 4):
        row.trouble.append(f"{cache}: ended with {code}, expected an error of the package")

    def look() -> dict[str, Any]:
        verdict = judge(where, truth)
        exists = (where / "cache.json").exists()
        return {"silent": verdict.silent, "found": verdict.found and exists, "right": verdict.right}

    found = bench.ask(look)
    row.silent += [f"{cache}: {text}" for text in found["silent"]]
    row.found += found["found"]
    row.refused += found["right"] < len(truth)
    row.harmless += found["right"] == len(truth)
    again = wait(in_child(bench.run(cache, combination)))
    if again:
        row.trouble.append(f"{cache}: the run after it ended with {again}")
    finish(bench, row, where, truth)
    shutil.rmtree(where, ignore_errors=True)


def file_size_limits(bench: Bench, combination: tuple[str, str], limits: Sequence[int]) -> Row:
    """Runs in processes whose files the kernel lets not grow beyond a limit."""
    row = Row(f"files limited (RLIMIT_FSIZE), {combination[0]}, {combination[1]}")
    truth = bench.truth(f"clean-{combination[0]}-{combination[1]}")
    for limit in limits:
        cache = f"limited-{combination[0]}-{combination[1]}-{limit}"
        task = bench.run(cache, combination)

        def run(task: Callable[[], None] = task, limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            os._exit(quietly(task))

        row.trials += 1
        _after_failure(bench, row, cache, truth, combination, wait(in_child(run)))
    return row


def tiny_disk(bench: Bench, combination: tuple[str, str], kilobytes: Sequence[int]) -> Row | None:
    """Runs on a file system of so many kilobytes, which is enlarged afterwards; None where none may be mounted."""
    row = Row(f"tmpfs that runs full, {combination[0]}, {combination[1]}")
    truth = bench.truth(f"clean-{combination[0]}-{combination[1]}")
    disk = bench.folder / "disk"
    disk.mkdir(exist_ok=True)
    for size in kilobytes:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", str(disk)], capture_output=True, check=False
        )
        if mounted.returncode:
            return None
        try:
            task = bench.run("disk/cache", combination)
            code = wait(in_child(lambda task=task: os._exit(quietly(task))))  # type: ignore[misc]
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            row.trials += 1
            _after_failure(bench, row, "disk/cache", truth, combination, code)
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)
    return row


def unreadable_at_every_call(cache: Path, truth: Truth, step: int, *, short: bool) -> Row:
    """Reads of a finished cache whose n-th call of the system fails, or gives fewer bytes than were asked for.

    Nothing is damaged: whatever is read must be right, and whoever reads again gets all of it.
    """
    row = Row("short read at call n" if short else "EIO at call n of a reader")
    at = 0
    while True:
        calls = FailingCalls(errno.EIO, at, onwards=False, below=cache, short=short)
        with calls.reading():
            verdict = judge(cache, truth, with_verify=False)
        if not calls.failed:
            return row
        row.trials += 1
        row.refused += bool(verdict.refused)
        row.harmless += not verdict.refused
        row.silent += [f"call {at}: {text}" for text in verdict.silent]
        at += step


def verify_unreadable(cache: Path, step: int) -> Row:
    """`verify` of a finished cache whose n-th call fails: it tells, by an error of the package or in its report."""
    row, at = Row("EIO at call n of verify"), 0
    while True:
        calls = FailingCalls(errno.EIO, at, onwards=False, below=cache)
        with calls.reading():
            try:
                row.found += not verify(cache).clean
            except CacheError:
                row.found += 1
            except Exception as error:
                row.silent.append(f"call {at}: {type(error).__name__}: {error}")
        if not calls.failed:
            return row
        row.trials += 1
        at += step
