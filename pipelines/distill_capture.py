"""Distillation on a real capture: does the network predict the features of frames that it never saw?

The frames of one RGB-D capture (7-Scenes layout) are parted in time: most train, the last ones are held out. Both parts
are fused into clouds and given features of their own, so that nothing of the held-out frames reaches the training.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import click
import numpy as np
from benchmarks_page import write_section
from commands import VFM, call, console
from numpy.typing import NDArray

from ditr_cache import open_cache
from ditr_train.tracking import read_metrics


@click.command()
@click.argument("capture", type=click.Path(path_type=Path, exists=True))
@click.option("--out", default="distill-capture", show_default=True, type=click.Path(path_type=Path))
@click.option("--held-out", default=0.2, show_default=True, help="Share of the frames, the last ones.")
@click.option("--steps", default=300, show_default=True, help="Optimiser steps.")
@click.option("--set", "overrides", multiple=True, help="Passed on to `ditr-train run`.")
@click.option("--page", type=click.Path(path_type=Path), help="Keep the figures in this page.")
def distill_capture(
    capture: Path, out: Path, held_out: float, steps: int, overrides: tuple[str, ...], page: Path | None
) -> None:
    """Distil CAPTURE, a folder with `seq-*/frame-*.color.*` and the camera's intrinsics."""
    parted, cache, run = out / "capture", out / "cache", out / "run"
    train_frames, held_frames = part(capture, parted, held_out)
    call("ditr-cache", "extract", "--dataset", "rgbd", "--root", parted, "--out", cache, "--vfm", VFM, "--workers", 0)
    settings = [
        f"cache={cache}", "splits.val=test", "training.epochs=null", f"training.steps={steps}", "data.loop=20",
        "data.feat=[coord,color]", "data.grid_size=0.05", "training.evaluate_every=1",
        "training.checkpoint_every=1", *overrides,
    ]  # fmt: skip
    sets = [word for setting in settings for word in ("--set", setting)]
    call("ditr-train", "run", "demo/distill", *sets, "--out", run, "--resume")
    curve = [(line["step"], line["cosine"]) for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "val"]
    constant = constant_cosine(cache)
    shown = ", ".join(f"{cosine:.3f} (step {step})" for step, cosine in curve[:: max(1, len(curve) // 5)] + curve[-1:])
    console.print(f"cosine on the points of {held_frames} held-out frames: {shown}")
    console.print(f"the best constant prediction, the mean direction of the training features: {constant:.3f}")
    if page is not None:
        text = (
            "## Distillation on a real capture\n\nWritten by `python pipelines/distill_capture.py CAPTURE "
            f"--steps {steps} --page {page}` on 7-Scenes: "
            f"{train_frames} frames train, the last {held_frames} are held out; {VFM}, the small SparseUNet of "
            f"`demo/distill` on coordinates and colour, 5 cm voxels, {steps} steps. Mean cosine between "
            f"predicted and cached features over the held-out frames' points: {shown}. The best constant "
            f"prediction, the mean direction of the training features, reaches {constant:.3f}.\n"
        )
        write_section(page, "distill_capture", text)


def part(capture: Path, parted: Path, held_out: float) -> tuple[int, int]:
    """Lay out the frames as two sequences, one to train and one to test; returns their numbers of frames."""
    colors = sorted(capture.glob("seq-*/frame-*.color.*"))
    first_held = len(colors) - max(1, round(held_out * len(colors)))
    shutil.rmtree(parted, ignore_errors=True)
    for number, frames in enumerate((colors[:first_held], colors[first_held:]), start=1):
        folder = parted / f"seq-{number:02d}"
        folder.mkdir(parents=True)
        for color in frames:
            for path in color.parent.glob(f"{color.name.split('.')[0]}.*"):
                (folder / path.name).symlink_to(path.resolve())
    for path in capture.glob("*.txt"):
        (parted / path.name).symlink_to(path.resolve())
    (parted / "TrainSplit.txt").write_text("sequence1\n")
    (parted / "TestSplit.txt").write_text("sequence2\n")
    return first_held, len(colors) - first_held


def constant_cosine(cache_path: Path) -> float:
    """Mean cosine on the test points of the one direction that fits the training points best."""
    cache = open_cache(cache_path)

    def directions(split: str) -> NDArray[np.float32]:
        sample = cache.read(cache.split_ids(split)[0])
        assert sample.feature is not None
        rows = sample.feature[sample.valid]
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    mean = directions("train").mean(axis=0)
    return float((directions("test") @ (mean / np.linalg.norm(mean))).mean())


if __name__ == "__main__":
    distill_capture()
