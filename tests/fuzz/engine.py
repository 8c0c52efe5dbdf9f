"""Runs targets in child processes: one that hangs, takes memory or dies ends its child, and is reported with its input.

A target is a function of bytes that may raise `CacheError` and nothing else. What else happens is a finding.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import os
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from ditr_cache.errors import CacheError
from mutate import mutated

SECONDS = 2.0
"""Longest time of one execution."""

KILL_SECONDS = 20.0
"""Time after which a child that does not even handle its alarm is killed: it hangs within a library."""

MEMORY = 1 << 30
"""Most address space that an execution may ask for, beyond what its process had. The largest image that is decoded, of
64 million pixels, takes three quarters of it."""

EXECUTIONS_PER_CHILD = 3000


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    Args:
        name: of it.
        corpus: valid inputs.
        run: reads an input; raises `CacheError` for one that cannot be used.
        repair: makes a mutated input pass the checks of its envelope (checksums), so that more than these is reached.
        kept: bytes at the start that are not mutated.
    """

    name: str
    corpus: Sequence[bytes]
    run: Callable[[bytes], None]
    repair: Callable[[bytes], bytes] | None = None
    kept: int = 0


@dataclass(frozen=True)
class Finding:
    """An input that a target did not survive."""

    target: str
    what: str
    data: bytes

    @property
    def signature(self) -> str:
        """Equal for findings of one cause, as far as the place of the exception tells."""
        return f"{self.target}: {self.what.splitlines()[0]}"

    def save(self, folder: Path) -> Path:
        """Write the input, and beside it what happened; returns the input's path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.target}-{hashlib.sha256(self.data).hexdigest()[:12]}"
        path.write_bytes(self.data)
        path.with_name(path.name + ".txt").write_text(self.what)
        return path


class HangError(BaseException):
    """An execution took too long. No `Exception`, so that no reader takes it for damage of its file."""


def input_of(target: Target, seed: int, number: int) -> bytes:
    """Input of that number: the same for the same seed. The first ones are the corpus itself."""
    if number < len(target.corpus):
        return target.corpus[number]
    random = Random(f"{seed} {target.name} {number}")
    data = random.choice(target.corpus)
    head, body = data[: target.kept], data[target.kept :]
    others = [other[target.kept :] for other in target.corpus]
    changed = head + mutated(body, others, random)
    return target.repair(changed) if target.repair is not None and random.random() < 0.7 else changed


def fuzz(target: Target, *, seed: int, seconds: float, executions: int, scratch: Path) -> tuple[int, list[Finding]]:
    """Run a target until the time or the number of executions is over; returns how many there were, and findings.

    Args:
        target: see there.
        seed: of the inputs.
        seconds: after which no further execution starts.
        executions: most of them.
        scratch: folder for what passes between the processes.
    """
    deadline = time.monotonic() + seconds
    state, current = scratch / f"{target.name}.state", scratch / f"{target.name}.input"
    done, findings = 0, []
    while done < executions and time.monotonic() < deadline:
        last = min(executions, done + EXECUTIONS_PER_CHILD)
        state.write_text(json.dumps({"done": done}))
        child = os.fork()
        if not child:
            _child(target, seed, done, last, deadline, state, current)
        status = _waited(child, state)
        reached = json.loads(state.read_text())
        done = int(reached["done"])
        what = reached.get("what")
        if status and what is None:
            what = f"the process ended with {status}\n" + (scratch / f"{target.name}.input.log").read_text()
        if what is not None:
            findings.append(Finding(target.name, what, current.read_bytes()))
            done += 1
    return done, findings


def _child(target: Target, seed: int, first: int, last: int, deadline: float, state: Path, current: Path) -> None:
    """Executions `first` to `last` - 1; never returns."""
    code = 1
    with contextlib.suppress(BaseException), current.with_name(current.name + ".log").open("w") as log:
        os.dup2(log.fileno(), 2)
        faulthandler.enable(log)
        warnings.simplefilter("error")
        code = _run(target, seed, first, last, deadline, state, current)
    os._exit(code)


def _run(target: Target, seed: int, first: int, last: int, deadline: float, state: Path, current: Path) -> int:
    for data in target.corpus[:4]:  # libraries are loaded, threads started
        with contextlib.suppress(CacheError):
            target.run(data)
    before = _address_space("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (before + 2 * MEMORY, resource.RLIM_INFINITY))
    for number in range(first, last):
        if time.monotonic() >= deadline:
            break
        data = input_of(target, seed, number)
        current.write_bytes(data)
        _write(state, {"done": number})
        what = execute(target, data, must_pass=number < len(target.corpus))
        if what is None and _address_space("VmPeak") - before > MEMORY:
            what = f"takes more than {MEMORY} bytes"
        if what is not None:
            _write(state, {"done": number, "what": what})
            return 1
        _write(state, {"done": number + 1})
    return 0


def execute(target: Target, data: bytes, *, must_pass: bool = False) -> str | None:
    """What happened that must not, None where nothing did.

    Args:
        target: what reads.
        data: its input.
        must_pass: whether the input is valid, so that even a `CacheError` is wrong.
    """
    try:
        with _alarm():
            target.run(data)
    except CacheError as error:
        if must_pass:
            return _told(error)
        return _told(error) if any(isinstance(e, MemoryError) for e in _chain(error)) else None
    except BaseException as error:  # whatever it is, it is what is looked for
        return _told(error)
    return None


def _told(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "ditr_" in f.filename] or frames[-1:]
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    return f"{type(error).__name__} at {where}: {str(error)[:200]!r}\n" + "".join(traceback.format_exception(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise HangError(f"longer than {SECONDS} s")

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _waited(child: int, state: Path) -> int:
    """Exit status of a child; it is killed where it stops making progress."""
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        with contextlib.suppress(FileNotFoundError):
            if time.time() - state.stat().st_mtime > KILL_SECONDS:
                os.kill(child, signal.SIGKILL)
                return os.waitpid(child, 0)[1]
        time.sleep(0.01)


def _write(state: Path, value: dict[str, object]) -> None:
    state.write_text(json.dumps(value))


def _address_space(key: str) -> int:
    with Path("/proc/self/status").open() as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(key))
