"""SIGKILL at random moments of runs in one process, which continue what the one before left."""

from __future__ import annotations

import json
import os
import pickle
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ditr_cache.files import Paths, read_documents
from ditr_cache.schema import FeatureRecord, GeometryRecord
from ditr_cache.store import open_cache
from ditr_cache.verify import verify
from forked_runs import extraction, in_child, run_to_the_end, temporaries, wait
from table import Row
from traced_work import TRACE, Trace
from verdict import Truth, judge, truth_of

COMBINATIONS = (("int8", "fused"), ("pca16-int8", "fused"), ("int8", "views"), ("pca16-int8", "views"))
"""Codecs and layouts; the codec of 16 components is fitted, and stored, before the first features."""


@dataclass
class Bench:
    """Where runs are made.

    Args:
        folder: holds the dataset `rooms` and the weights `vit.pt`; caches are made in it.
        partitions: of a run.
    """

    folder: Path
    partitions: int

    def run(self, cache: str, combination: tuple[str, str], **how: Any) -> Callable[[], None]:
        """A task that extracts into a cache."""
        codec, layout = combination
        how = {"limit": self.partitions, "codec": codec, "layout": layout, **how}
        where = cache if "://" in cache else self.folder / cache
        return extraction(self.folder / "rooms", where, self.folder / "vit.pt", **how)

    def clean(self, name: str, combination: tuple[str, str], **how: Any) -> float:
        """Make a clean cache and keep what it gives as `name`.truth; returns how many seconds a run takes."""
        self.ask(self.run(f"{name}-warm", combination, **how))
        started = time.perf_counter()
        self.ask(self.run(name, combination, **how))
        seconds = time.perf_counter() - started

        def keep() -> None:
            (self.folder / f"{name}.truth").write_bytes(pickle.dumps(truth_of(self.folder / name)))

        self.ask(keep)
        return seconds

    def truth(self, name: str) -> Truth:
        """What the clean cache of that name gives."""
        truth: Truth = pickle.loads((self.folder / f"{name}.truth").read_bytes())
        return truth

    def ask(self, task: Callable[[], Any]) -> Any:
        """What a task returns, as JSON, that is run in a child."""
        answer = self.folder / "answer.json"

        def run() -> None:
            answer.write_text(json.dumps(task()))

        run_to_the_end(run)
        return json.loads(answer.read_text())


def committed(cache: Path) -> tuple[set[str], set[str]]:
    """Partitions whose geometry, and whose features, are committed."""
    paths = Paths(cache)
    found: list[set[str]] = []
    for cls, folders in ((GeometryRecord, [paths.geometry]), (FeatureRecord, paths.stores)):
        documents = (d for folder in folders for _, d in read_documents(paths.records(folder), cls))  # type: ignore[type-var]
        found.append({d.partition for d in documents if isinstance(d, cls)})
    return found[0], found[1]


def after_kill(cache: Path, clean: Path, truth: Truth | None) -> dict[str, Any]:
    """What there is after a kill: committed partitions, what is wrong with them, whether `verify` found anything.

    Everything that is committed must say and hold what the clean cache's does; with `truth`, it is read, too.
    """
    if not (cache / "cache.json").exists():
        return {"geometry": [], "features": [], "wrong": [], "found": False}
    wrong = []
    reader, of_clean = open_cache(cache), open_cache(clean)
    for partition, record in reader.geometry.items():
        if record.digest != of_clean.geometry[partition].digest:
            wrong.append(f"geometry of {partition}")
        for spec in reader.vfms.values():
            features, expected = (r.feature_record(spec, partition) for r in (reader, of_clean))
            if features is not None and (expected is None or features.arrays != expected.arrays):
                wrong.append(f"features of {partition}")
    report = verify(cache)
    if truth is not None:
        verdict = judge(cache, truth, with_verify=False, keys=sorted(reader.vfms))
        wrong += verdict.silent
    geometry, features_of = committed(cache)
    return {"geometry": [*geometry], "features": [*features_of], "wrong": wrong, "found": not report.clean}


def completed(cache: Path, truth: Truth) -> list[str]:
    """What a completed cache differs in from the clean one; nothing where it is logically identical."""
    verdict = judge(cache, truth)
    differing = verdict.silent + verdict.refused
    if verdict.right != len(truth):
        differing.append(f"{verdict.right} of {len(truth)} reads are right")
    if verdict.found:
        differing.append("verify tells of damage")
    return [*differing, *(f"left over: {path}" for path in temporaries(cache))]


def kill_single(
    bench: Bench, combination: tuple[str, str], kills: int, rng: np.random.Generator, latest: float = 0.9
) -> Row:
    """Kill runs in one process, each going on where the one before ended.

    Moments are spread evenly over the first `latest` of the time that a whole run takes.
    """
    row = Row(f"kill, one process, {combination[0]}, {combination[1]}", redone=0, begun=0)
    clean = f"clean-{combination[0]}-{combination[1]}"
    seconds = bench.clean(clean, combination)
    truth = bench.truth(clean)
    number, left = 0, None
    while row.trials < kills or left:
        cache = left or f"killed-{combination[0]}-{combination[1]}-{number}"
        where, trace = bench.folder / cache, Trace(bench.folder / f"{cache}.trace")
        if row.trials >= kills:
            code = wait(in_child(traced(bench.run(cache, combination), trace.path)))
        else:
            before, started = len(trace.events()), time.monotonic()
            pid = in_child(traced(bench.run(cache, combination), trace.path))
            code = killed_after(pid, float(rng.uniform(0.02, latest)) * seconds)
            if code == 0:  # a machine that has less to do than at first
                seconds = min(seconds, time.monotonic() - started)
        if code == 0:
            finish(bench, row, where, truth)
            number, left = number + 1, None
            continue
        if code != -signal.SIGKILL:
            row.trouble.append(f"{cache}: a run ended with {code}")
            number, left = number + 1, None
            continue
        left = cache
        row.trials += 1
        read = truth if row.trials % 10 == 0 else None
        count_kill(bench, row, where, bench.folder / clean, read, trace, before)
    return row


def killed_after(pid: int, seconds: float) -> int:
    """Kill a child when it has run for so long; its exit code, 0 where it was quicker."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return wait(pid)


def traced(task: Callable[[], None], trace: Path) -> Callable[[], None]:
    """A task whose work is noted in a file."""

    def run() -> None:
        os.environ[TRACE] = str(trace)
        task()

    return run


def count_kill(
    bench: Bench, row: Row, cache: Path, clean: Path, truth: Truth | None, trace: Trace, before: int
) -> None:
    """Look at what a kill left, and count it."""
    found = bench.ask(lambda: after_kill(cache, clean, truth))
    row.found += found["found"]
    row.harmless += not found["found"] and not found["wrong"]
    row.silent += [f"{cache.name}, kill {row.trials}: {text}" for text in found["wrong"]]
    if found["found"]:
        row.trouble.append(f"{cache.name}, kill {row.trials}: verify tells of damage")
    lost, begun = trace.lost(before, set(found["features"]))
    linked, _ = trace.lost(before, set(found["geometry"]), features=False)
    row.cost(max(lost, linked), begun)


def finish(bench: Bench, row: Row, cache: Path, truth: Truth) -> None:
    """Count a completed cache."""
    row.completed += 1
    differing = bench.ask(lambda: completed(cache, truth))
    row.identical += not differing
    row.trouble += [f"{cache.name}: {text}" for text in differing[:2]]
