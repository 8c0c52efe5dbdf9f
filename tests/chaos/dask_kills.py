"""SIGKILL of dask workers in mid-partition, and of the client with and without its workers."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np

import traced_work
from forked_runs import in_child, wait
from kills import Bench, committed, count_kill, finish, killed_after, traced
from table import Row
from traced_work import TRACE, Trace

WORKERS = 2
MOST_SECONDS = 120.0
"""A run that takes longer hangs."""


def start_forking() -> None:
    """Start the process that forks off all workers of all runs. It imports for itself, this process does not."""
    folders = [str(Path(module).parent) for module in (__file__, str(in_child.__code__.co_filename))]
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    forkserver.set_forkserver_preload(["preloaded"])
    forkserver.ensure_running()


def on_dask(task: Callable[[], None], trace: Path) -> Callable[[], None]:
    """A task that runs on a local cluster, whose workers are forked and traced."""

    def run() -> None:
        import dask

        # The process that forks is the parent's: it is asked, not looked after, from here.
        forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]
        config: dict[str, Any] = {
            "distributed.worker.multiprocessing-method": "forkserver",
            "distributed.worker.preload": [traced_work.__file__],
            "distributed.nanny.environ": {TRACE: str(trace)},
            "distributed.scheduler.allowed-failures": 10**6,  # here no partition is to blame
        }
        with dask.config.set(config):
            task()

    return traced(run, trace)


def kill_dask(bench: Bench, combination: tuple[str, str], kills: int, rng: np.random.Generator) -> list[Row]:
    """Kill workers at random moments of runs, and every fourth run's client with or without them."""
    workers = Row(f"kill, dask worker, {combination[0]}, {combination[1]}", redone=0, begun=0)
    client = Row(f"kill, dask client, {combination[0]}, {combination[1]}", redone=0, begun=0)
    clean = f"clean-dask-{combination[0]}-{combination[1]}"
    bench.clean(clean, combination)
    truth = bench.truth(clean)
    number = 0
    while workers.trials + client.trials < kills:
        cache = f"dask-{combination[0]}-{combination[1]}-{number}"
        where, trace = bench.folder / cache, Trace(bench.folder / f"{cache}.trace")
        pid = in_child(on_dask(bench.run(cache, combination, workers=WORKERS), trace.path))
        client_dies = number % 4 != 3
        budget = int(rng.integers(2, 7))
        code = _kill_workers(pid, trace, where, workers, min(budget, kills - workers.trials - client.trials), rng)
        if code is None and client_dies:
            alive = _alive(trace)
            os.kill(pid, signal.SIGKILL)
            if number % 2:
                for worker in alive:
                    _kill(worker)
            code = wait(pid)
            client.trials += code == -signal.SIGKILL
        if code is None:
            code = _patiently(pid)
        if code not in (0, -signal.SIGKILL):
            workers.trouble.append(f"{cache}: the run ended with {code}")
        # Orphans may still write when the next run begins, in one process.
        row = client if code == -signal.SIGKILL else workers
        if code == -signal.SIGKILL:
            while _alive(trace):
                time.sleep(0.05)
            count_kill(bench, client, where, bench.folder / clean, truth, trace, 0)
        after = wait(in_child(bench.run(cache, combination)))
        if after:
            row.trouble.append(f"{cache}: the run after it ended with {after}")
        finish(bench, row, where, truth)
        number += 1
    return [workers, client]


def _kill_workers(pid: int, trace: Trace, cache: Path, row: Row, budget: int, rng: np.random.Generator) -> int | None:
    """Kill so many workers of a run; its exit code where it ends before."""
    started = time.monotonic()
    while budget > 0:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - started > MOST_SECONDS:
            os.kill(pid, signal.SIGKILL)
            row.trouble.append(f"{cache.name}: a run hangs")
            return wait(pid)
        alive = _alive(trace)
        if not alive:
            time.sleep(0.02)
            continue
        time.sleep(float(rng.uniform(0, 0.5)))
        victim = alive[int(rng.integers(len(alive)))]
        if _kill(victim):
            budget -= 1
            row.trials += 1
            present = committed(cache)[1]
            own = {(e, p) for e, p, n in trace.events() if n == victim and p not in present}
            row.cost(*(sum(event == kind for event, _ in own) for kind in ("embedded", "begun")))
            row.harmless += 1
    return None


def _patiently(pid: int) -> int:
    """Exit code of a run that nobody kills, 99 of one that hangs."""
    code = killed_after(pid, MOST_SECONDS)
    return 99 if code == -signal.SIGKILL else code


def _alive(trace: Trace) -> list[int]:
    """Workers that have begun a partition and still live."""
    return [n for n in {n for _, _, n in trace.events()} if _lives(n)]


def _lives(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _kill(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False
