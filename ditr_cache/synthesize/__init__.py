"""Generated rooms in ScanNet's layout: a dataset that needs no download and whose truth is known exactly.

Furnished rooms of random size, layout and texture are ray-cast along a camera path into colour and depth frames, and
scanned into a labelled mesh. Doors, windows, pictures, whiteboards, cabinets, curtains and floor mats differ in their
image texture and in nothing that 5 cm points show: see `textures` and `layout`.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from ditr_cache.errors import StorageError, UsageError
from ditr_cache.synthesize.settings import RoomsSettings
from ditr_cache.synthesize.writer import build_scene, scene_id, write_scene

__all__ = ["RoomsSettings", "synthesize"]

GENERATOR_VERSION = 1
"""Raised with any change that alters a generated file."""

_MARKER = "rooms.json"
_MAX_SCENES = 10_000  # ScanNet's ids have four digits


def synthesize(
    root: str | Path,
    *,
    scenes: int = 24,
    seed: int = 0,
    settings: RoomsSettings | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `scenes` generated rooms below `root` in the layout of ScanNet v2.

    A room depends on `seed`, its number and `settings` only: a larger series starts with the smaller one, and files are
    the same byte for byte whatever `workers` is. Rooms are written under a temporary name and renamed when complete;
    a second call writes only what is missing.

    Args:
        root: folder to write to; made where it is missing.
        scenes: number of rooms, at least 2.
        seed: of the series, not negative.
        settings: of the rooms.
        workers: processes; 1 runs in this one. Processes are spawned, so a script that passes more needs the usual
            `if __name__ == "__main__"`.
        progress: called with (rooms done, rooms) at the start and after every room.

    Raises:
        UsageError: too few rooms for one in each split, a negative seed, or a folder that holds something else, such
            as rooms of another seed or other settings.
        StorageError: the folder cannot be written.
    """
    settings = settings or RoomsSettings()
    root = Path(root)
    train = [i for i in range(scenes) if not settings.is_val(i)]
    val = [i for i in range(scenes) if settings.is_val(i)]
    if not train or not val or scenes > _MAX_SCENES:
        raise UsageError(
            f"rooms: expected a number of rooms from 2 to {_MAX_SCENES} with at least one for training and one for "
            f"validation, got {scenes} rooms, {len(train)} and {len(val)} of them (val_fraction "
            f"{settings.val_fraction:.3g}); change --scenes"
        )
    if seed < 0:
        raise UsageError(f"rooms: the seed must not be negative, got {seed}; change --seed")
    if workers < 1:
        raise UsageError(f"rooms: expected at least one worker, got {workers}")
    try:
        _claim(root, seed, settings)
        for leftover in (root / "scans").glob(".*.partial"):
            shutil.rmtree(leftover)
        missing = [i for i in range(scenes) if not (root / "scans" / scene_id(i)).is_dir()]
        _write_rooms(root, missing, scenes, seed, settings, workers, progress)
        for split, numbers in (("train", train), ("val", val)):
            _write_text(root / f"scannetv2_{split}.txt", "".join(f"{scene_id(i)}\n" for i in numbers))
    except BrokenProcessPool as error:
        raise StorageError(
            f"rooms: a worker process died while writing to {str(root)!r} ({error}); run again"
        ) from error
    except OSError as error:
        raise StorageError(
            f"rooms: cannot write to {str(root)!r} ({error}); choose a folder with write permission and free space, "
            "then run again: finished rooms are kept"
        ) from error


def _claim(root: Path, seed: int, settings: RoomsSettings) -> None:
    """Make the folder with its marker, or check that it is one of this series."""
    claim = {"generator": "ditr rooms", "version": GENERATOR_VERSION, "seed": seed}
    claim |= {"settings": json.loads(json.dumps(dataclasses.asdict(settings)))}
    if root.exists() and not root.is_dir():
        raise UsageError(f"rooms: {str(root)!r} is a file; expected a folder, or a name that is not taken")
    marker = root / _MARKER
    if marker.exists():
        try:
            found = json.loads(marker.read_text())
        except ValueError as error:
            raise UsageError(f"rooms: {str(marker)!r} is not readable ({error}); choose another folder") from error
        if found != claim:
            theirs = found if isinstance(found, dict) else {}
            differing = [name for name in claim if theirs.get(name) != claim[name]]
            raise UsageError(
                f"rooms: {str(root)!r} holds rooms of another {' and '.join(differing) or 'kind'}: expected "
                f"{ {n: claim[n] for n in differing} }, got { {n: theirs.get(n) for n in differing} }; "
                "choose another folder or remove this one"
            )
    elif root.exists() and any(not path.name.endswith(".partial") for path in root.iterdir()):
        raise UsageError(
            f"rooms: {str(root)!r} holds files that are not generated rooms; choose an empty folder or a new one"
        )
    else:
        root.mkdir(parents=True, exist_ok=True)
        _write_text(marker, json.dumps(claim, indent=1) + "\n")
    (root / "scans").mkdir(exist_ok=True)


def _write_rooms(
    root: Path,
    numbers: list[int],
    scenes: int,
    seed: int,
    settings: RoomsSettings,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    report = progress or (lambda done, total: None)
    done = scenes - len(numbers)
    report(done, scenes)
    if workers == 1 or len(numbers) < 2:
        for number in numbers:
            _write_room(root, number, seed, settings)
            done += 1
            report(done, scenes)
        return
    # Spawned, not forked: a fork of a process with threads may deadlock.
    with ProcessPoolExecutor(min(workers, len(numbers)), mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = [pool.submit(_write_room, root, number, seed, settings) for number in numbers]
        try:
            for future in as_completed(pending):
                future.result()
                done += 1
                report(done, scenes)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _write_room(root: Path, number: int, seed: int, settings: RoomsSettings) -> None:
    name = scene_id(number)
    partial = root / "scans" / f".{name}.{os.getpid()}.partial"
    partial.mkdir()
    try:
        write_scene(partial, name, build_scene(number, seed=seed, settings=settings), settings)
        partial.rename(root / "scans" / name)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_text(path: Path, text: str) -> None:
    """Replace a file in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.write_text(text)
    temporary.replace(path)
