"""A dask scheduler and its workers as processes of their own, started with the stock commands."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import distributed

STOCK = ("--nthreads", "1", "--resources", "GPU=1")
"""As workers of one GPU are started; a later `--nthreads` overrides."""


class Address:
    """A dask scheduler in a process of its own, to which workers can be added."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "scheduler.json"
        self.processes: list[subprocess.Popen[bytes]] = []
        self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", self.file)
        wait_until(lambda: self.file.exists() or self.processes[-1].poll() is not None)
        self.address: str = json.loads(self.file.read_text())["address"]

    @property
    def scheduler(self) -> subprocess.Popen[bytes]:
        return self.processes[0]

    def add_worker(self, *arguments: object) -> subprocess.Popen[bytes]:
        """Start one more, and wait until it has joined."""
        options = arguments or ("--nthreads", "1")
        with distributed.Client(self.address) as client:
            before = len(client.nthreads())
            self._start("worker", self.address, *options, "--no-dashboard", "--no-nanny")
            client.wait_for_workers(before + 1, timeout=120)
        return self.processes[-1]

    def stop(self) -> None:
        """At once: a worker that is asked to leave waits for what it is at, and for a scheduler that has left."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def _start(self, command: str, *arguments: object) -> None:
        line = [sys.executable, "-m", "dask", command, *map(str, arguments)]
        quiet = subprocess.DEVNULL
        self.processes.append(subprocess.Popen(line, stdout=quiet, stderr=quiet, cwd=self.file.parent))


def wait_until(ready: Callable[[], bool], seconds: float = 120) -> None:
    """Look until it is so."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)
