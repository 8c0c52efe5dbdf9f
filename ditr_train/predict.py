"""`ditr-train predict`: a trained network used on point files and cached samples."""

from __future__ import annotations

import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ditr_cache.errors import (
    CorruptCacheError,
    DataError,
    MismatchError,
    MissingDataError,
    UnknownNameError,
    UsageError,
)
from ditr_cache.pointcloud.cloud import PointCloud
from ditr_cache.pointcloud.readers import READERS, open_cloud
from ditr_cache.store import open_cache
from ditr_train.inference import Normals, Outcome, moving_at_test, predict_cached, predict_cloud
from ditr_train.pointcloud.output import ENDINGS, require_folder
from ditr_train.pointcloud.progress import PredictProgress
from ditr_train.pointcloud.tiles import Tiling
from ditr_train.signals import sigterm_as_interrupt
from ditr_train.trained import TrainedRun, load_run


def predict_inputs(
    run_dir: str | Path,
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    checkpoint: str = "best",
    softmax: bool = False,
    tile: float | None = None,
    overlap: float | None = None,
    device: str = "auto",
    cache: str | None = None,
    normals: Normals | None = None,
    tmp: str | Path | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Labels of all points of files or cached samples, as files in `out`: `.ply`, `.labels.npy`, `.softmax.npy`.

    Args:
        run_dir: of a run of task segment.
        inputs: PLY, LAS, LAZ, PCD or KITTI .bin files, or ids of samples of the run's cache.
        out: folder of the files that are written; made where it is missing.
        checkpoint: best or last.
        softmax: also write the softmax of each point.
        tile: longest edge of a tile in metres; None: `MAX_TILE_VOXELS` decides.
        overlap: context around each tile in metres; None: four sites of the network's coarsest resolution.
        device: auto, cpu or cuda.
        cache: the samples' cache, where it is not the run's.
        normals: estimate normals that the network reads and a file lacks; None refuses such a file.
        tmp: folder of temporary files; None: `out`.
        quiet: show no progress.

    Returns:
        `run`, `checkpoint`, `step`, `inputs` (one summary each, see `_summary`), and `failed`: those of several inputs
        whose content turned out to be unusable, with `input` and `error`.

    Raises:
        UsageError: a run that cannot be used like this, or an option that makes no sense.
        MissingDataError, DataError, UnknownNameError, CorruptCacheError: an input that cannot be used.
        StorageError: no space, or files that cannot be written.
    """
    run = load_run(run_dir, device=device, checkpoint=checkpoint, cache=cache)
    recipe = run.recipe
    tiling = Tiling(
        grid_size=recipe.data.grid_size, stride=2**recipe.model.backbone.num_stages, edge=tile, overlap=overlap
    )
    sources = [_source(run, str(given)) for given in inputs]
    for source in sources:
        if isinstance(source, PointCloud):
            _check_network(run, source, run_dir, normals)
    names = [str(given) for given in inputs]
    stems = _stems(sources)
    folder, temporary = Path(out), Path(out if tmp is None else tmp)
    _keep_inputs(sources, stems, folder)
    for place in {folder, temporary}:
        require_folder(place)

    done: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    with sigterm_as_interrupt(), PredictProgress(enabled=not quiet) as progress:
        for name, source, stem in zip(names, sources, stems, strict=True):
            started = time.perf_counter()
            try:
                if isinstance(source, PointCloud):
                    outcome = predict_cloud(
                        run,
                        source,
                        tiling,
                        folder=folder,
                        stem=stem,
                        tmp=temporary,
                        softmax=softmax,
                        normals=normals,
                        phase=progress.of(name),
                    )
                else:
                    outcome = predict_cached(run, source, folder=folder, stem=stem, softmax=softmax)
            except (DataError, CorruptCacheError) as error:
                if len(sources) == 1:
                    raise
                failed.append({"input": name, "error": str(error)})
                continue
            done.append(_summary(name, outcome, run.info.class_names, time.perf_counter() - started))
    return {"run": str(run_dir), "checkpoint": checkpoint, "step": run.step, "inputs": done, "failed": failed}


def _summary(name: str, outcome: Outcome, classes: Sequence[str], seconds: float) -> dict[str, Any]:
    """`input`, `points`, `unlabelled`, `tiles`, `seconds`, `points_per_second`, `share` per class, `files`."""
    labelled = sum(outcome.per_class)
    return {
        "input": name,
        "points": outcome.points,
        "unlabelled": outcome.points - labelled,
        "tiles": outcome.tiles,
        "seconds": round(seconds, 3),
        "points_per_second": round(outcome.points / seconds, 1),
        "share": {c: n / labelled for c, n in zip(classes, outcome.per_class, strict=True)},
        "files": list(outcome.files),
    }


def _source(run: TrainedRun, given: str) -> PointCloud | str:
    """An open file, or the id of a cached sample that is there."""
    path = Path(given)
    if path.suffix.lower() in READERS or path.is_file():
        return open_cloud(path)
    hint = f"a file would end in {', '.join(READERS)}"
    try:
        cache = open_cache(run.recipe.require_cache())
    except (MissingDataError, UsageError) as error:
        raise MissingDataError(
            f"input {given!r} is no file ({hint}), and there is no cache to look for a sample of that id: {error}; "
            "name the cache with --cache"
        ) from error
    try:
        split = cache.sample_info(given).split
    except UnknownNameError as error:
        raise UnknownNameError(f"input {given!r} is no file ({hint}) and no cached sample: {error}") from error
    run.dataset(split, labelled=False)  # says what does not fit before any work
    return given


def _check_network(run: TrainedRun, cloud: PointCloud, run_dir: str | Path, normals: Normals | None) -> None:
    """Raise where a network cannot be used on a file: it needs images, one centre, or a channel that the file lacks."""
    vfm = run.info.vfm
    if vfm is not None:
        raise UsageError(
            f"{cloud.path}: the network of {str(run_dir)!r} is given features of {vfm['name']!r}, which a point file "
            f"does not have; extract points and images with `ditr-cache extract --vfm {vfm['name']} --out CACHE ...` "
            "and name a sample's id with --cache CACHE, or use a plain, or a distilled and fine-tuned network"
        )
    if run.recipe.data.center and (moving := moving_at_test(run.recipe)):
        raise UsageError(
            f"{cloud.path}: the network of {str(run_dir)!r} reads centred points that {type(moving[0]).__name__} "
            "(data.at_test) moves, and a file is predicted in tiles with centres of their own; extract the dataset "
            "into a cache and name a sample's id with --cache CACHE, or use a network with data.center off"
        )
    lacking = [name for name in run.recipe.data.feat if name not in (*cloud.channels, "height")]
    if normals is not None:
        lacking = [name for name in lacking if name != "normal"]
    if lacking:
        remedy = "use a file that has it, or a network trained without it (data.feat)"
        if lacking == ["normal"]:
            remedy = f"estimate normals from the points with --estimate-normals, {remedy}"
        raise MismatchError(
            f"{cloud.path}: the network reads {', '.join(run.recipe.data.feat)}, the file has no "
            f"{' and no '.join(lacking)}, only {', '.join(cloud.channels)}; {remedy}"
        )


def _stems(sources: Sequence[PointCloud | str]) -> list[str]:
    """Names of the outputs: those of the inputs without extension; of equal ones, later ones get -2, -3, ..."""
    stems: list[str] = []
    taken: set[str] = set()
    for source in sources:
        stem = source.path.stem if isinstance(source, PointCloud) else urllib.parse.quote(source, safe=" +=@,")
        name, number = stem, 1
        while name.lower() in taken:  # some file systems do not tell upper from lower case
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.lower())
        stems.append(name)
    return stems


def _keep_inputs(sources: Sequence[PointCloud | str], stems: Sequence[str], folder: Path) -> None:
    """Raise `UsageError` where an output would replace an input."""
    given = {source.path.resolve() for source in sources if isinstance(source, PointCloud)}
    for stem in stems:
        for ending in ENDINGS.values():
            path = folder / f"{stem}{ending}"
            if path.resolve() in given:
                raise UsageError(f"the prediction would replace the input {str(path)!r}; choose another folder with -o")
