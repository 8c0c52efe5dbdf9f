"""Sweeps: every combination of some recipe values and seeds, each trained by `ditr-train run` in a process of its own.

A sweep lies in one folder: `sweep.json` (the plan, and how each run ended), `recipes/` (the resolved recipe of every
run, so that an edit to a file changes no run that still waits), `logs/`, and one run folder per run.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from ditr_cache.errors import CacheError, DataError, MismatchError, StorageError, UsageError
from ditr_train.files import replace_text
from ditr_train.recipe import differing_keys
from ditr_train.run_folder import RunFolder, is_free
from ditr_train.signals import sigterm_as_interrupt
from ditr_train.sweep_plan import SweepRun

LOCK = ".lock"

POLL_SECONDS = 0.2
STOP_SECONDS = 120.0
"""How long runs may take to save when a sweep is stopped; then they are killed."""


class SweepInterruptedError(CacheError, RuntimeError):
    """A sweep that was asked to stop; its runs saved their state."""

    exit_code = 1


class Job(Protocol):
    """A run that was started; what `subprocess.Popen` offers."""

    def poll(self) -> int | None:
        """Its exit code, None while it works."""

    def terminate(self) -> None:
        """Ask it to save and to end."""

    def kill(self) -> None:
        """End it."""


Start = Callable[[SweepRun, Path, Mapping[str, str]], Job]
"""Starts a run of the sweep in a folder, with these additions to the environment."""


# --- the record -----------------------------------------------------------------------------------------------------


@dataclass
class SweepRecord:
    """`sweep.json`: every run that was ever planned here, and how it ended.

    Args:
        path: of the file.
        recipe: name or file that the sweep was started with.
        runs: name -> `overrides`, `exit_code` (None: has not ended) and `seconds`.
    """

    path: Path
    recipe: str
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, recipe: str, plan: Sequence[SweepRun]) -> SweepRecord:
        """The record of a folder, with the plan added to it; nothing is written.

        Raises:
            MismatchError: a run of that name was started with other settings.
            UsageError: the folder holds something else.
            DataError: the file is damaged.
        """
        record = cls(folder / "sweep.json", recipe)
        if record.path.exists():
            try:
                runs = json.loads(record.path.read_text())["runs"]
                record.runs = {str(r["name"]): {k: r[k] for k in ("overrides", "exit_code", "seconds")} for r in runs}
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise DataError(f"{str(record.path)!r} is damaged ({error}); choose another --out") from error
        elif folder.exists() and (not folder.is_dir() or any(p.name != LOCK for p in folder.iterdir())):
            raise UsageError(f"{str(folder)!r} exists and is not the folder of a sweep; choose another --out")
        for run in plan:
            known = record.runs.setdefault(run.name, {"exit_code": None, "seconds": 0.0})
            known["overrides"] = dict(run.overrides)
            run_folder = RunFolder(folder / run.name)
            if not run_folder.started():
                known["exit_code"] = None
                continue
            changed = [key for key in differing_keys(run_folder.open()[0], run.recipe) if not is_free(key)]
            if changed:
                raise MismatchError(
                    f"sweep {str(folder)!r}: run {run.name!r} was started with other settings ({', '.join(changed)} "
                    "differ); repeat the command that started the sweep, or choose another --out"
                )
        return record

    def done(self, name: str) -> bool:
        """Whether the run ended well."""
        return self.runs[name]["exit_code"] == 0

    def ended(self, name: str, exit_code: int | None, seconds: float) -> None:
        """Note how a run ended, and write."""
        self.runs[name]["exit_code"] = exit_code
        self.runs[name]["seconds"] += seconds
        self.write()

    def write(self) -> None:
        """Replace the file. Raises `StorageError`."""
        body = {"recipe": self.recipe, "runs": [{"name": name, **run} for name, run in self.runs.items()]}
        with _writing(self.path):
            replace_text(self.path, json.dumps(body, indent=1) + "\n")


# --- the work -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """How a sweep ended.

    Args:
        done, skipped, failed: names of the runs that were trained now, were trained before, or failed.
    """

    done: tuple[str, ...]
    skipped: tuple[str, ...]
    failed: tuple[str, ...]


class SweepWatcher(Protocol):
    """Is told what happens in a sweep."""

    def started(self, run: SweepRun) -> None:
        """A run was started."""

    def ended(self, run: SweepRun, exit_code: int, seconds: float) -> None:
        """A run ended; 0 is success."""


def sweep(
    plan: Sequence[SweepRun],
    folder: Path,
    record: SweepRecord,
    *,
    start: Start,
    jobs: int = 1,
    environments: Sequence[Mapping[str, str]] = ({},),
    watcher: SweepWatcher | None = None,
    poll_seconds: float = POLL_SECONDS,
) -> SweepResult:
    """Train what is not done yet, `jobs` runs at a time. A run that fails does not stop the others.

    Args:
        plan: the runs.
        folder: of the sweep.
        record: of the folder, as `SweepRecord.open` gives it.
        start: starts one run.
        jobs: runs at a time.
        environments: of the runs that work at the same time, in turn.
        watcher: is told of every start and end.
        poll_seconds: between two looks at the runs.

    Raises:
        SweepInterruptedError: SIGINT or SIGTERM; the runs were asked to save and have ended.
        StorageError: the folder cannot be written.
    """
    waiting = [run for run in plan if not record.done(run.name)]
    skipped = tuple(run.name for run in plan if record.done(run.name))
    with _writing(folder):
        (folder / "recipes").mkdir(parents=True, exist_ok=True)
        (folder / "logs").mkdir(exist_ok=True)
        for run in waiting:
            (folder / "recipes" / f"{run.name}.yaml").write_text(run.recipe.to_yaml())
    record.write()
    working: dict[int, tuple[SweepRun, Job, float]] = {}
    codes: dict[str, int] = {}
    try:
        with sigterm_as_interrupt():
            while waiting or working:
                for slot in range(jobs):
                    if waiting and slot not in working:
                        run = waiting.pop(0)
                        job = start(run, folder, environments[slot % len(environments)])
                        working[slot] = (run, job, time.monotonic())
                        if watcher is not None:
                            watcher.started(run)
                for slot, (run, job, begun) in list(working.items()):
                    if (code := job.poll()) is not None:
                        del working[slot]
                        codes[run.name] = code
                        record.ended(run.name, code, time.monotonic() - begun)
                        if watcher is not None:
                            watcher.ended(run, code, time.monotonic() - begun)
                if working:
                    time.sleep(poll_seconds)
    except KeyboardInterrupt as error:
        raise SweepInterruptedError(
            f"interrupted with {len(codes)} of {len(plan) - len(skipped)} runs ended; the same command goes on"
        ) from error
    finally:
        _stop([job for _, job, _ in working.values()], poll_seconds)
    return SweepResult(
        done=tuple(name for name, code in codes.items() if code == 0),
        skipped=skipped,
        failed=tuple(name for name, code in codes.items() if code != 0),
    )


def process_starter(device: str, lock: IO[str]) -> Start:
    """Starts runs as processes of this very installation; each writes `logs/<name>.log`.

    The processes hold the lock, too: as long as one of them works, even after a kill of the sweep, no other sweep
    touches the folder.
    """

    def start(run: SweepRun, folder: Path, environment: Mapping[str, str]) -> Job:
        command = [
            sys.executable, "-m", "ditr_train.cli", "run", str(folder / "recipes" / f"{run.name}.yaml"),
            "--out", str(folder / run.name), "--resume", "--device", device,
        ]  # fmt: skip
        with _writing(folder), log_file(folder, run.name).open("a") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                process_group=0,  # Ctrl-C reaches the sweep alone, which then asks its runs to save
                pass_fds=(lock.fileno(),),
            )

    return start


def log_file(folder: Path, name: str) -> Path:
    """What a run of the sweep printed."""
    return folder / "logs" / f"{name}.log"


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[IO[str]]:
    """Hold the sweep's folder; made where it is missing.

    Raises:
        UsageError: another sweep, or a run of one, is at work there.
        StorageError: it cannot be written.
    """
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / LOCK).open("w")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                f"another sweep, or a run that it started, is still at work in {str(folder)!r}; wait for it, or choose "
                "another --out"
            ) from error
        yield handle


def job_environments(device: str, jobs: int) -> list[dict[str, str]]:
    """What runs at the same time find in their environment: a GPU each, or their share of the CPU's cores."""
    if ":" in device:  # one GPU for all runs, by the number that it has among all
        return [{}]
    if device != "cpu":
        import torch

        if torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
            return [{"CUDA_VISIBLE_DEVICES": name.strip()} for name in names] if len(names) > 1 else [{}]
    if "OMP_NUM_THREADS" in os.environ:
        return [{}]
    return [{"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // jobs))}]


def _stop(working: Sequence[Job], poll_seconds: float) -> None:
    """Ask runs to save and end, and wait for them; a second Ctrl-C, or too long a time, kills them."""
    for job in working:
        job.terminate()
    try:
        until = time.monotonic() + STOP_SECONDS
        while any(job.poll() is None for job in working) and time.monotonic() < until:
            time.sleep(poll_seconds)
    finally:
        for job in working:
            if job.poll() is None:
                job.kill()
        while any(job.poll() is None for job in working):
            time.sleep(poll_seconds)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {str(path)!r}: {error.strerror or error}; choose another --out") from error
