"""Runs of `extract` in forked children, to be killed: a process that has imported everything forks them off.

So a run takes the time of its work alone. The forking process must never start zarr's threads, nor torch's: whatever
reads a cache is done in a child, too.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ditr_cache import open_cache
from ditr_cache.verify import verify


def import_everything() -> None:
    """What children need, so that they need not import it."""
    import torch

    torch.set_num_threads(1)
    from ditr_cache.torchvision_compat import declare_missing_operators

    declare_missing_operators()
    import timm

    import ditr_cache.datasets.scannet.dataset
    import ditr_cache.extract  # noqa: F401

    timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)


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
    """Run `task` in a child, and raise where it does not end well."""
    code = wait(in_child(task))
    if code:
        raise RuntimeError(f"a child ended with {code}")


def extraction(
    root: Path,
    cache: Path | str,
    checkpoint: Path,
    *,
    layout: str = "fused",
    codec: str = "float16",
    limit: int | None = None,
    retry_incomplete: bool = False,
    workers: int = 0,
) -> Callable[[], None]:
    """A task that extracts the dataset `rooms` at `root` with test_vit, and raises where a partition fails."""
    from ditr_cache.extract import ExtractRequest, extract
    from ditr_cache.partition import ExtractSettings
    from ditr_cache.vfm import VFMRequest

    def task() -> None:
        settings = ExtractSettings(
            dataset="rooms",
            root=str(root),
            cache=str(cache),
            vfm=VFMRequest(name="test_vit", checkpoint=str(checkpoint), image_size=(32, 48), device="cpu"),
            layout=layout,
            codec=codec,
            retry_incomplete=retry_incomplete,
        )
        totals = extract(ExtractRequest(settings=settings, workers=workers, limit=limit), quiet=True)
        if totals.partitions["failed"]:
            raise RuntimeError(f"failures: {totals.failures}")

    return task


def temporaries(cache: Path) -> list[str]:
    """Temporary files and folders of a cache."""
    return [str(p) for p in cache.rglob("*") if p.name != ".claims" and (p.name[0] == "." or p.suffix == ".tmp")]


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
