"""kill -9 at any moment: what was committed stays right, and the same command completes the rest.

Run as a script, this file is the process that forks off runs (see `forked_runs`): it kills run after run and prints
what it saw as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditr_cache import cli
from ditr_cache.synthesize import RoomsSettings, synthesize
from ditr_cache.verify import verify
from forked_runs import check_after_kill, extraction, import_everything, in_child, run_to_the_end, temporaries, wait
from support import assert_same

KILLS = 20
SCENES = 6


# --- the process that forks -----------------------------------------------------------------------------------------


def looked_at(cache: Path, notes: Path, then: Callable[[], None] = lambda: None) -> dict[str, int]:
    """`check_after_kill` in a child, then `then`: the forking process must not start zarr's threads."""

    def look() -> None:
        notes.write_text(json.dumps(check_after_kill(cache)))
        then()

    run_to_the_end(look)
    found: dict[str, int] = json.loads(notes.read_text())
    return found


class Killer:
    """Runs `extract` in children and kills them.

    Args:
        folder: holds the dataset `rooms`; caches are made in it.
        checkpoint: weights of test_vit.
        layout: of the features.
    """

    def __init__(self, folder: Path, checkpoint: Path, layout: str = "fused") -> None:
        self.folder, self.checkpoint, self.layout = folder, checkpoint, layout

    def extract(self, cache: str, scenes: int = SCENES, retry_incomplete: bool = False) -> Callable[[], None]:
        return extraction(
            self.folder / "rooms",
            self.folder / cache,
            self.checkpoint,
            layout=self.layout,
            limit=scenes,
            retry_incomplete=retry_incomplete,
        )

    def at_random_moments(self) -> dict[str, Any]:
        """Kill runs `KILLS` times, each continuing what the one before left; a completed cache is compared."""
        run_to_the_end(self.extract("warm"))
        started = time.perf_counter()
        run_to_the_end(self.extract("clean"))
        duration = time.perf_counter() - started
        rng = np.random.default_rng(0)
        kills, caches, seen = 0, 0, []
        while kills < KILLS:
            cache = f"killed-{caches}"
            pid = in_child(self.extract(cache))
            time.sleep(float(rng.uniform(0.05, 0.6)) * duration)
            os.kill(pid, signal.SIGKILL)
            if wait(pid) == -signal.SIGKILL:
                kills += 1
                seen.append(looked_at(self.folder / cache, self.folder / "notes"))
                if kills < KILLS:
                    continue
            run_to_the_end(self.complete(cache))
            caches += 1
        return {"kills": kills, "caches": caches, "seen": seen, "duration": duration}

    def at_every_step(self, *, retry_incomplete: bool) -> dict[str, Any]:
        """Kill a run of one scene before every single call that makes something durable or visible."""
        if retry_incomplete:  # a finished cache whose one scene lacks a view that is readable again
            image = self.folder / "rooms/scans/scene0000_00/color/0.jpg"
            whole = image.read_bytes()
            image.write_bytes(whole[:200])
            run_to_the_end(self.extract("incomplete", scenes=1))
            image.write_bytes(whole)
        clean = f"clean-1-{self.layout}"
        run_to_the_end(self.extract(clean, scenes=1))
        step = 0
        seen: list[dict[str, int]] = []
        while True:
            cache = f"stepped-{self.layout}-{retry_incomplete}-{step}"
            if retry_incomplete:
                subprocess.run(["cp", "-r", self.folder / "incomplete", self.folder / cache], check=True)
            task = self.extract(cache, scenes=1, retry_incomplete=retry_incomplete)
            code = wait(in_child(lambda task=task, step=step: die_before_step(step, task)))  # type: ignore[misc]
            if code == 0:
                return {"steps": step, "seen": seen}
            if code != -signal.SIGKILL:
                raise RuntimeError(f"step {step}: exit code {code}")
            complete = self.complete(cache, 1, clean, retry_incomplete)
            seen.append(looked_at(self.folder / cache, self.folder / "notes", complete))
            step += 1

    def complete(
        self, cache: str, scenes: int = SCENES, clean: str = "clean", retry_incomplete: bool = False
    ) -> Callable[[], None]:
        """A task: resume a killed run and compare what it made with a run that nobody killed."""
        resume = self.extract(cache, scenes, retry_incomplete)

        def task() -> None:
            resume()
            assert_same(self.folder / cache, self.folder / clean)
            assert verify(self.folder / cache).clean
            assert temporaries(self.folder / cache) == []

        return task


def die_before_step(step: int, task: Callable[[], None]) -> None:
    """Run `task`; end this process by SIGKILL before call number `step` of those that change what a reader sees.

    Calls inside temporary folders are not counted: no reader looks there.
    """
    left = step

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(path: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if Path(path).is_absolute() and ".tmp/" not in os.fspath(path):
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
            return call(path, *args, **kwargs)

        return wrapper

    for name in ("rename", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    task()


def main(folder: Path, checkpoint: Path, mode: str) -> None:
    import_everything()
    killer = Killer(folder, checkpoint, "views" if mode == "views" else "fused")
    if mode == "random":
        print(json.dumps(killer.at_random_moments()))
    else:
        print(json.dumps(killer.at_every_step(retry_incomplete=mode == "retry")))


# --- tests ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the dataset `rooms`, in which caches can be made."""
    folder = tmp_path_factory.mktemp("kill")
    settings = RoomsSettings(frames=2, color_size=(48, 32), depth_size=(24, 16), point_spacing=0.4)
    synthesize(folder / "rooms", scenes=SCENES, seed=1, settings=settings)
    return folder


def kill(folder: Path, checkpoint: Path, mode: str) -> dict[str, Any]:
    command = [sys.executable, __file__, str(folder), str(checkpoint), mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_killed_at_random_moments(rooms: Path, make_checkpoint: Callable[..., Path]) -> None:
    result = kill(rooms, make_checkpoint(), "random")
    assert result["kills"] == KILLS
    # The kills fell into the work, not before or after it: caches were found at several stages.
    assert len({found["partitions"] for found in result["seen"]}) >= 3, result
    assert any(found["temporaries"] for found in result["seen"]), result


@pytest.mark.parametrize("mode", ["first", "retry", "views"])
def test_killed_at_every_step_of_a_commit(rooms: Path, make_checkpoint: Callable[..., Path], mode: str) -> None:
    result = kill(rooms, make_checkpoint(), mode)
    # cache.json, vfm.json, and of each store its arrays and its record; a retry also takes commits back.
    assert result["steps"] >= 6, result
    assert {found["partitions"] for found in result["seen"]} == {0, 1}, result
    assert any(found["temporaries"] for found in result["seen"]), result


SLOW = """
import time
import ditr_cache.groups as groups

if not hasattr(groups, "at_full_speed"):  # dask may load this twice
    groups.at_full_speed = groups.write_arrays

def slow(*arguments):
    time.sleep(0.25)
    return groups.at_full_speed(*arguments)

groups.write_arrays = slow
"""


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_local_cluster_is_killed(
    rooms: Path, make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client, nannies and workers die at once, in the middle; a run in one process completes their cache."""
    (tmp_path / "slow.py").write_text(SLOW)
    named = ["--dataset", "rooms", "--root", rooms / "rooms", "--vfm", "test_vit", "--checkpoint", make_checkpoint()]
    named += ["--image-size", "32x48", "--json"]
    command = [Path(sys.executable).with_name("ditr-cache"), "extract", *named, "--workers", 2]
    process = subprocess.Popen(
        [str(a) for a in [*command, "--out", tmp_path / "cache"]],
        env={**os.environ, "DASK_DISTRIBUTED__WORKER__PRELOAD": str(tmp_path / "slow.py")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "cache/features").glob("*/scene*.json")):
            assert process.poll() is None and time.monotonic() < deadline, process.returncode
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    assert code == -signal.SIGKILL
    while group_is_alive(process.pid):  # the workers' files are leftovers once they are gone
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert 1 <= check_after_kill(tmp_path / "cache")["partitions"] < SCENES
    for out in ("cache", "clean"):
        arguments = [*command[1:], "--out", tmp_path / out, "--workers", 0]
        monkeypatch.setattr(sys, "argv", ["ditr-cache", *map(str, arguments)])
        cli.main()
    assert_same(tmp_path / "cache", tmp_path / "clean")
    assert verify(tmp_path / "cache").clean
    assert temporaries(tmp_path / "cache") == []


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
