"""Claims: who makes which partition, so that two runs on one cache share the work instead of doing it twice.

A claim is a small file that only one can create. Its owner rewrites it every few seconds for as long as it works; one
whose owner is gone, or that was not rewritten for a while, is free to be taken. That is judged by what a claim says and
by the observer's own steady clock, never by time stamps: clocks of hosts differ, and jump. A claim saves work, and no
more: that a cache is never damaged rests on its commits, even where two believe that they own the same partition.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from ditr_cache.errors import StorageError
from ditr_cache.files import Location, Paths, file_name, is_alive, storage_errors, temporary_prefix
from ditr_cache.remote import RemotePath

log = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
"""How often an owner says that it still works."""

STALE_SECONDS = 60.0
"""After so long without a beat a claim of another host is free."""


POLL_SECONDS = 2.0
"""How often who waits for a claim of another run looks for it."""


def new_run() -> str:
    """A name for a run that no other has."""
    return uuid.uuid4().hex


def geometry_claim(partition: str) -> str:
    """Name of the claim on the geometry of a partition."""
    return f"geometry/{partition}"


def features_claim(key: str, partition: str) -> str:
    """Name of the claim on one VFM's features of a partition; with an empty partition, how the names of all start."""
    return f"features/{key}/{partition}"


class TakenOverError(Exception):
    """Another run works on what this one had claimed."""


class Claims:
    """Claims of one process of a run.

    Args:
        paths: of the cache.
        run: name of the run; its processes take over from each other at once, as their executor says who works.
        clock: steady seconds, to judge the claims of others by.
    """

    def __init__(self, paths: Paths, run: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._run, self._clock = paths.root / ".claims", run, clock
        self._held: dict[str, int] = {}
        """Name -> number of the last beat, of the claims held."""
        self._seen: dict[str, tuple[bytes, float]] = {}
        """Name -> what a claim of another said, and since when it says so."""
        self._lock = threading.Lock()
        self._beating: threading.Thread | None = None

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[bool]:
        """Hold a claim for the block where it is free; gives whether it is held.

        Raises:
            StorageError: the claim can be neither read nor written.
        """
        held = self.take(name)
        try:
            yield held
        finally:
            if held:
                self.release(name)

    def take(self, name: str) -> bool:
        """Take a claim where it is free, and say whether it was. Raises as `hold`."""
        path, content = self._path(name), self._content(0)
        if not _create(path, content):
            found = _read(path)
            if found is not None and not self._is_free(name, found):
                return False
            if found is not None and not _remove(path, found):
                return False
            if not _create(path, content):
                return False
        with self._lock:
            self._held[name] = 0
            if self._beating is None:
                self._beating = threading.Thread(target=self._beat, name="claims", daemon=True)
                self._beating.start()
        return True

    def is_free(self, name: str) -> bool:
        """Whether a claim could be taken. Raises as `hold`."""
        found = _read(self._path(name))
        return found is None or self._is_free(name, found)

    def check(self, name: str) -> None:
        """Raise `TakenOverError` where a claim is held no more: after a long sleep another run may have it."""
        found = _read(self._path(name))
        if found is None or json.loads(found)["run"] != self._run:
            raise TakenOverError(name)

    def release(self, name: str) -> None:
        """Give a claim back."""
        with self._lock:
            beat = self._held.pop(name)
            with contextlib.suppress(StorageError):  # then it is stale in a minute
                _remove(self._path(name), self._content(beat))

    def owners(self, prefix: str) -> list[str]:
        """Names of claims that start so, and are held as far as can be told at once. Raises as `hold`."""
        start = file_name(prefix)
        names = [path.name for path in _listed(self._folder) if path.name.startswith(start)]
        contents = {name: _read(self._folder / name) for name in names}
        return [name for name, found in contents.items() if found is not None and not self._is_free(name, found)]

    def _path(self, name: str) -> Location:
        return self._folder / file_name(name)

    def _content(self, beat: int) -> bytes:
        owner = {"run": self._run, "host": socket.gethostname(), "pid": os.getpid(), "beat": beat}
        return json.dumps(owner).encode()

    def _is_free(self, name: str, found: bytes) -> bool:
        try:
            owner = json.loads(found)
            run, host, pid = owner["run"], owner["host"], int(owner["pid"])
        except (ValueError, KeyError, TypeError):
            run, host, pid = "", "", 0  # half written, on a file system where that happens
        if run == self._run or (host == socket.gethostname() and not is_alive(pid)):
            return True
        now = self._clock()
        content, since = self._seen.get(name, (b"", now))
        if content != found:
            self._seen[name] = (found, now)
            return False
        return now - since > STALE_SECONDS

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            with self._lock:
                if not self._held:  # the next claim starts another thread
                    self._beating = None
                    return
                for name, beat in self._held.items():
                    try:
                        _replace(self._path(name), self._content(beat), self._content(beat + 1))
                        self._held[name] = beat + 1
                    except StorageError as error:
                        log.warning("claim %s: %s", name, error)


def _listed(folder: Location) -> list[Location]:
    if isinstance(folder, RemotePath):
        return [folder / name for name in folder.children()]
    return [path for path in sorted(folder.glob("*")) if not path.name.startswith(".")]


def _read(path: Location) -> bytes | None:
    if isinstance(path, RemotePath):
        with contextlib.suppress(FileNotFoundError):
            return path.read_bytes()
        return None
    with storage_errors(path, "read"), contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    return None


def _create(path: Location, content: bytes) -> bool:
    """Create a file, with its content at once, where there is none; gives whether there was none."""
    if isinstance(path, RemotePath):
        return path.create(content)
    with storage_errors(path, "write"), _temporary(path, content) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
    return True


def _replace(path: Location, old: bytes, new: bytes) -> None:
    """Rewrite a file that says `old`; where it says something else, leave it."""
    if _read(path) != old:
        return
    if isinstance(path, RemotePath):
        path.write_bytes(new)
        return
    with storage_errors(path, "write"), _temporary(path, new) as temporary:
        temporary.replace(path)


def _remove(path: Location, content: bytes) -> bool:
    """Remove a file that says so; gives whether it did."""
    if _read(path) != content:
        return False
    if isinstance(path, RemotePath):
        path.unlink(missing_ok=True)
        return True
    with storage_errors(path, "remove"):
        # Moved away first: of several that remove it, one does.
        taken = path.with_name(f"{temporary_prefix()}{uuid.uuid4().hex}.tmp")
        try:
            path.rename(taken)
        except FileNotFoundError:
            return False
        mine = taken.read_bytes() == content
        if not mine:  # another took and rewrote it in between
            with contextlib.suppress(FileExistsError):
                os.link(taken, path)
        taken.unlink()
        return mine


@contextlib.contextmanager
def _temporary(path: Path, content: bytes) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=temporary_prefix(), suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        temporary.chmod(0o666)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
