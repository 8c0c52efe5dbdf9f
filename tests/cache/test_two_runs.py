"""Two runs that are started at once on one cache share its partitions, and leave it as one run would."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ditr_cache import open_cache
from ditr_cache.verify import verify
from support import Run, assert_same


def command(root: Path, cache: object, checkpoint: Path, *more: object) -> list[str]:
    arguments = ["extract", "--dataset", "rooms", "--root", root, "--out", cache, "--vfm", "test_vit"]
    arguments += ["--checkpoint", checkpoint, "--image-size", "32x48", "--device", "cpu", "--workers", 0, "--json"]
    return [*map(str, arguments), *map(str, more)]


def started(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from ditr_cache.cli import main; main()", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("same_vfm", [True, False])
def test_two_runs_share_the_work(
    tmp_path: Path, tiny_rooms: Path, make_checkpoint: Callable[..., Path], run: Run, same_vfm: bool
) -> None:
    checkpoints = [make_checkpoint(), make_checkpoint(seed=0 if same_vfm else 1)]
    runs = [started(*command(tiny_rooms, tmp_path / "shared", checkpoint)) for checkpoint in checkpoints]
    found = []
    for process in runs:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        found.append(json.loads(out))
    for checkpoint in checkpoints:
        assert run(*command(tiny_rooms, tmp_path / "alone", checkpoint)).code == 0
    assert_same(tmp_path / "shared", tmp_path / "alone")
    assert verify(tmp_path / "shared").clean
    partitions = len(open_cache(tmp_path / "alone").geometry)
    counts = [f["partitions"] for f in found]
    assert [sum(c.values()) for c in counts] == [partitions, partitions] and not any(c["failed"] for c in counts)
    # Of each partition geometry was made once, and the features of each VFM once.
    assert sum(f["geometry"]["computed"] for f in found) == partitions
    assert sum(c["done"] for c in counts) == (partitions if same_vfm else 2 * partitions)
    claims = tmp_path / "shared" / ".claims"
    assert list(claims.iterdir()) == []
