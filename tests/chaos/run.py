"""Inject faults: `python tests/chaos/run.py [--kills 1000] [--seed 0]`, or `--short` for some of each kind.

Runs are killed, in one process and on dask; the disk runs full at every call, and cannot be read at every call; files
of a finished cache, of every kind, are torn, flipped, lost, doubled and exchanged; clocks jump; two runs share a cache,
and two writers a partition. Prints one table. Exit code 1 where a requirement fails: nothing may be silently wrong,
every damage is found by `verify` and never read as data, a kill costs at most one complete partition of a worker, and
what is completed afterwards is logically identical to a cache that nothing happened to.
"""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "cache"), str(HERE.parents[1])]

import numpy as np  # noqa: E402

from damage import Damager  # noqa: E402
from dask_kills import kill_dask, start_forking  # noqa: E402
from disk_faults import (  # noqa: E402
    file_size_limits,
    full_at_every_call,
    tiny_disk,
    unreadable_at_every_call,
    verify_unreadable,
)
from forked_runs import import_everything, in_child, wait  # noqa: E402
from kills import COMBINATIONS, Bench, kill_single  # noqa: E402
from table import Row, print_table  # noqa: E402
from verdict import truth_of  # noqa: E402
from writers import (  # noqa: E402
    OtherWriter,
    clock_jumps,
    leftovers_by_any_clock,
    reader_meets_writer,
    two_runs,
    two_writers,
)

SCENES = 12
ONE_ROOM = ("int8", "fused")


def make_rooms(folder: Path, scenes: int) -> None:
    """Tiny rooms, one denser one for files of many chunks, and weights."""
    import timm
    import torch

    from ditr_cache.synthesize import RoomsSettings, synthesize

    small = {"frames": 2, "color_size": (48, 32), "depth_size": (24, 16)}
    synthesize(folder / "rooms", scenes=scenes, seed=1, settings=RoomsSettings(point_spacing=0.4, **small))
    dense = RoomsSettings(point_spacing=0.2, **{**small, "frames": 6})
    synthesize(folder / "dense/rooms", scenes=2, seed=2, settings=dense)
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, num_classes=0)
    for path in (folder / "vit.pt", folder / "dense/vit.pt"):
        torch.save(model.state_dict(), path)


def damage(folder: Path, label: str, trials: int, swaps: int, seed: int, *, packed: bool) -> list[Row]:
    """Rows for a finished cache of two VFMs, one with a fitted codec, whose arrays have many chunks and shards."""
    from ditr_cache import arrays

    arrays.CHUNK_BYTES, arrays.SHARD_BYTES = 1 << 9, 1 << 11
    bench, cache = Bench(folder / "dense", 2), folder / "dense" / f"damaged-{packed}"
    for combination in (("int8", "fused"), ("pca16-int8", "views")):
        if packed:
            # As in object storage: written there, and read from a copy of it.
            bench.run("memory://damaged", combination)()
        else:
            bench.run(cache.name, combination)()
    if packed:
        unpack_memory("memory://damaged", cache)
    # Of a run on another host that was killed.
    for left in (cache / ".claims/features%2Fvfm%2Froom", cache / "geometry/.elsewhere+1+abc.tmp"):
        left.parent.mkdir(exist_ok=True)
        left.write_text('{"run": "a", "host": "elsewhere", "pid": 1, "beat": 3}')
    damager = Damager(cache, truth_of(cache), np.random.default_rng(seed))
    rows = [*damager.changed(label, trials), *damager.swapped(label, swaps)]
    if not packed:
        rows.append(damager.folders_swapped(label, swaps))
    return [*rows, damager.doubled(label, swaps)]


def unpack_memory(url: str, folder: Path) -> None:
    """Copy what lies in the memory of this process to a folder, as it is."""
    from ditr_cache.files import location, tree

    root = location(url)
    for name in tree(root):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        found = root
        for part in name.split("/"):
            found = found / part
        path.write_bytes(found.read_bytes())


def of_one_process(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """Rows of faults that need no killing: of a process of its own, as zarr's threads must not be forked."""
    short = arguments.short
    rows = [leftovers_by_any_clock(folder)]
    other = OtherWriter()
    for what in ("features",) if short else ("geometry", "features"):
        rows += [
            two_writers(folder, other, what, 3 if short else 1, alike=alike)
            for alike in ((False,) if short else (True, False))
        ]
    rows.append(reader_meets_writer(folder, other, 7 if short else 1))
    other.stop()
    cache = folder / f"clean-{ONE_ROOM[0]}-{ONE_ROOM[1]}"
    truth = pickle.loads(cache.with_name(f"{cache.name}.truth").read_bytes())
    step = 29 if short else 1
    rows += [unreadable_at_every_call(cache, truth, step, short=few) for few in (False, True)]
    return [*rows, verify_unreadable(cache, step)]


def in_own_process(folder: Path, task: object, *arguments: object, **named: object) -> list[Row]:
    """Rows that a child makes."""
    kept = folder / "rows.pickle"
    code = wait(in_child(lambda: kept.write_bytes(pickle.dumps(task(*arguments, **named))) and None))  # type: ignore[operator]
    if code:
        return [Row(getattr(task, "__name__", "task"), trouble=[f"ended with {code}"])]
    rows: list[Row] = pickle.loads(kept.read_bytes())
    return rows


class Suite:
    """All kinds of faults.

    Args:
        folder: for everything that is made.
        arguments: of the command.
    """

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.folder, self.arguments, self.short = folder, arguments, arguments.short
        self.rng = np.random.default_rng(arguments.seed)
        in_own_process(folder, make_rooms, folder, 6 if self.short else SCENES)
        self.one = Bench(folder / "one", 1)
        self.one.folder.mkdir()
        (self.one.folder / "rooms").symlink_to(folder / "rooms")
        shutil.copy(folder / "vit.pt", self.one.folder / "vit.pt")
        self.one.clean(f"clean-{ONE_ROOM[0]}-{ONE_ROOM[1]}", ONE_ROOM)

    @property
    def on_dask(self) -> int:
        """Kills on dask, a tenth of all: its workers take longer to be there again than a run in one process."""
        return 0 if self.short else max(4, self.arguments.kills // 10)

    def kills(self) -> Iterator[list[Row]]:
        """In one process."""
        combinations = COMBINATIONS[1:2] if self.short else COMBINATIONS
        for i, combination in enumerate(combinations):
            share = (self.arguments.kills - self.on_dask + i) // len(combinations)
            bench, latest = Bench(self.folder, 2 if self.short else 4), 0.5 if self.short else 0.9
            yield [kill_single(bench, combination, share, self.rng, latest)]

    def dask(self) -> Iterator[list[Row]]:
        """Of workers and clients."""
        if self.on_dask:
            start_forking()
            for combination in (("int8", "fused"), ("pca16-int8", "views")):
                yield kill_dask(Bench(self.folder, SCENES), combination, self.on_dask // 2, self.rng)

    def disk(self) -> Iterator[list[Row]]:
        """Full at every call."""
        yield [full_at_every_call(self.one, ONE_ROOM, 110 if self.short else 3, onwards=True)]
        if not self.short:
            yield [full_at_every_call(self.one, ONE_ROOM, 1, onwards=False)]
            yield [file_size_limits(self.one, ONE_ROOM, [0, 64, 256, 512, 700, 1000, 1500, 2000, 3000, 5000, 10_000])]
            row = tiny_disk(self.one, ONE_ROOM, range(16, 400, 24))
            yield [row or Row("tmpfs: may not be mounted here")]

    def writers(self) -> Iterator[list[Row]]:
        """Clocks, two runs, two writers, and disks that cannot be read."""
        if not self.short:
            bench = Bench(self.folder, 4)
            bench.clean("clean-int8-fused", ONE_ROOM)
            yield [clock_jumps(bench, ONE_ROOM), two_runs(bench, ONE_ROOM, 20, self.rng)]
        yield in_own_process(self.folder, of_one_process, self.one.folder, self.arguments)

    def damage(self) -> Iterator[list[Row]]:
        """Of files."""
        for packed in (False,) if self.short else (False, True):
            label, (trials, swaps) = "packed: " if packed else "", (2, 1) if self.short else (100, 100)
            yield in_own_process(
                self.folder, damage, self.folder, label, trials, swaps, self.arguments.seed, packed=packed
            )


GROUPS = {
    "kills": Suite.kills, "dask": Suite.dask, "disk": Suite.disk, "writers": Suite.writers, "damage": Suite.damage
}  # fmt: skip


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a few of each kind, none on dask")
    parser.add_argument("--only", action="append", choices=GROUPS, help="some groups of faults; all without it")
    arguments = parser.parse_args()
    started = time.monotonic()
    import_everything()
    import traced_work  # noqa: F401

    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        suite = Suite(Path(name), arguments)
        for group in arguments.only or GROUPS:
            for some in GROUPS[group](suite):
                rows += some
                print(f"{time.monotonic() - started:6.0f} s  {some[-1].fault}", file=sys.stderr, flush=True)
    ok = print_table(rows)
    kills = sum(row.trials for row in rows if row.fault.startswith("kill"))
    silent = sum(len(row.silent) for row in rows)
    print(f"{sum(row.trials for row in rows)} trials, {kills} of them kills; {silent} silent corruptions")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
