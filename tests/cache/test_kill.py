"""kill -9 at any moment: what was committed stays right, and the same command completes the rest.

The runs are forked off a process that has imported everything, so that a run takes the time of its work alone. Run as
a script, this file is that process: it kills run after run and prints what it saw as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditr_cache import cli, open_cache
from ditr_cache.synthesize import RoomsSettings, synthesize
from ditr_cache.verify import verify
from support import assert_same

KILLS = 20
SCENES = 6


# --- one cache, looked at -------------------------------------------------------------------------------------------


def temporaries(cache: Path) -> list[str]:
    return [str(p) for p in cache.rglob("*") if p.name.startswith(".") or p.suffix == ".tmp"]


def check_after_kill(cache: Path) -> dict[str, int]:
    """Every partition that a reader sees is whole and right. Returns what there is."""
    if not (cache / "cache.json").exists():
        return {"partitions": 0, "temporaries": len(temporaries(cache))}
    reader = open_cache(cache)
    for key in reader.vfms:
        for sample in reader.samples_with(key):
            read = reader.read(sample, vfm=key)
            assert read.feature is not None and np.isfinite(read.feature).all()
    # Features whose geometry is being made again wait for it unseen; everything that is seen is right.
    seen = [f"geometry/{p}" for p in reader.geometry]
    seen += [f"features/{k}/{p}" for k in reader.vfms for p in reader.geometry]
    report = verify(cache)
    waiting = {e for e in report.missing if e not in seen and e.startswith("features/") and not e.endswith("vfm.json")}
    assert report.reasons.keys() == waiting, report.reasons
    return {"partitions": len(reader.geometry), "temporaries": len(temporaries(cache))}


# --- the process that forks -----------------------------------------------------------------------------------------


def in_child(task: Callable[[], None]) -> int:
    """Fork; the process id of the child, which runs `task` and exits 0, or 3 with a traceback where it raises."""
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        task()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """Exit code of a child, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_to_the_end(task: Callable[[], None]) -> None:
    code = wait(in_child(task))
    if code:
        raise RuntimeError(f"a child ended with {code}")


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
        from ditr_cache.extract import ExtractRequest, extract
        from ditr_cache.partition import ExtractSettings
        from ditr_cache.vfm import VFMRequest

        vfm = VFMRequest(name="test_vit", checkpoint=str(self.checkpoint), image_size=(32, 48), device="cpu")
        settings = ExtractSettings(
            dataset="rooms",
            root=str(self.folder / "rooms"),
            cache=str(self.folder / cache),
            vfm=vfm,
            layout=self.layout,
            retry_incomplete=retry_incomplete,
        )
        request = ExtractRequest(settings=settings, workers=0, limit=scenes)

        def task() -> None:
            totals = extract(request, quiet=True)
            if totals.partitions["failed"]:
                raise RuntimeError(f"failures: {totals.failures}")

        return task

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
    import torch

    torch.set_num_threads(1)
    from ditr_cache.torchvision_compat import declare_missing_operators

    declare_missing_operators()
    import timm

    import ditr_cache.datasets.scannet.dataset
    import ditr_cache.extract  # noqa: F401  so that children need not

    timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)
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
import ditr_cache.store as store

if not hasattr(store, "at_full_speed"):  # dask may load this twice
    store.at_full_speed = store._write_arrays

def slow(*arguments):
    time.sleep(0.25)
    return store.at_full_speed(*arguments)

store._write_arrays = slow
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
