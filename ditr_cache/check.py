"""Inspect a download before hours are spent on it: what is there, what is missing, and whether it makes sense."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ditr_cache.blocks import PointBlocks
from ditr_cache.datasets.base import Dataset, OptionValue, open_dataset
from ditr_cache.errors import CacheError, DataError, MissingDataError
from ditr_cache.geometry import morton_order, point_spacing
from ditr_cache.link import Links, check_pose, evenly_spread, link_view, select_views
from ditr_cache.overlay import Overlay
from ditr_cache.sample import Camera, Points, Sample, View
from ditr_cache.schema import IGNORE_INDEX, LinkSettings

LOADED_SAMPLES = 4
"""Samples, evenly spread, whose points and some of whose images are loaded where not all are (`--deep`)."""

LOADED_VIEWS = 3
"""Views of such a sample whose images and depth maps are loaded."""

FIELD_OF_VIEW = (10.0, 175.0)
"""Degrees across an image that a camera may see; a panorama is exempt."""

OFF_CENTRE = 0.3
"""Fraction of the image by which a principal point may lie off its middle."""

EXTENT = (0.2, 2000.0)
"""Metres that a sample may measure along its longest axis: less or more is a wrong unit."""

FARTHEST_CAMERA = 1000.0
"""Metres between a sample's camera and its nearest point: more is a pose of another frame."""

_NUMBERS = re.compile(r"[0-9a-f]{6,}|\d+")
_MISSING = re.compile(r"\bno (such|depth|perspective|images?)\b")  # views that are broken carry a text alone


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Args:
        kind: `missing` (a file), `unreadable` (a file), or `implausible` (values that can hardly be meant).
        sample, view: where; view is empty for a whole sample, both are for more than one.
        text: what, and the remedy.
    """

    kind: str
    sample: str
    view: str
    text: str

    @property
    def shape(self) -> str:
        """The text without the sample's name and without numbers: what thousands of scans have in common."""
        name = rf"(?<!\w){re.escape(self.sample)}(?!\w)" if self.sample else r"(?!)"
        return _NUMBERS.sub("#", re.sub(name, "#", self.text))


@dataclass
class CheckReport:
    """What was found.

    Args:
        dataset, root: which.
        splits: number of samples of each split.
        samples: number of samples that could be described.
        views, posed, used: frames of all samples, those with a pose, those that extraction would use by default.
        loaded_samples, loaded_images: whose content was read.
        points: of the loaded samples.
        labelled: fraction of these points that have a label, in samples that have labels.
        coverage: fraction of these points that a loaded view sees.
        classes: number of classes.
        problems: see there.
        warnings: what the dataset's reader said, say of samples that it leaves out.
    """

    dataset: str
    root: str
    splits: dict[str, int] = field(default_factory=dict)
    samples: int = 0
    views: int = 0
    posed: int = 0
    used: int = 0
    loaded_samples: int = 0
    loaded_images: int = 0
    points: int = 0
    labelled: float = 0.0
    coverage: float = 0.0
    classes: int = 0
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """The object that `--json` prints."""
        return asdict(self)

    def lines(self, shown: int = 20) -> Iterator[str]:
        """For people: problems that differ in numbers and names alone once, at most `shown` of each kind."""
        splits = ", ".join(f"{split} {count}" for split, count in self.splits.items())
        yield f"{self.dataset} at {self.root}: {sum(self.splits.values())} samples ({splits}), {self.classes} classes"
        yield f"{self.views} frames, {self.posed} with a pose, {self.used} used by default"
        yield (
            f"read {self.loaded_samples} samples and {self.loaded_images} images: {self.points} points, "
            f"{self.labelled:.1%} labelled, {self.coverage:.1%} seen by the images that were read"
        )
        for text in self.warnings:
            yield f"warning: {text}"
        alike: dict[str, dict[str, list[Problem]]] = {}
        for problem in self.problems:
            alike.setdefault(problem.kind, {}).setdefault(problem.shape, []).append(problem)
        for kind, groups in alike.items():
            for found in list(groups.values())[:shown]:
                first = found[0]
                where = " view ".join(filter(None, (first.sample, first.view)))
                more = f" (and {len(found) - 1} more like it)" if len(found) > 1 else ""
                yield ": ".join(filter(None, (kind, where, first.text))) + more
            if len(groups) > shown:
                left = sum(len(found) for found in list(groups.values())[shown:])
                yield f"{kind}: and {left} more (all with --json)"
        counts = Counter(p.kind for p in self.problems)
        told = ", ".join(f"{n} {kind}" for kind, n in counts.items()) or "no problems"
        yield f"{told}, {len(self.warnings)} warnings" if self.warnings else told


def inspect(
    name: str,
    root: str | Path,
    options: Mapping[str, OptionValue] | None = None,
    *,
    deep: bool = False,
    overlay: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Open a dataset and `check` it; what its reader warns of is part of the report.

    Raises:
        CacheError: whatever makes it unusable as a whole.
    """
    log, told = logging.getLogger("ditr_cache.datasets"), _Collected()
    propagate, log.propagate = log.propagate, False
    log.addHandler(told)
    try:
        report = check(open_dataset(name, root, options), deep=deep, overlay=overlay, progress=progress)
    finally:
        log.removeHandler(told)
        log.propagate = propagate
    report.warnings = list(dict.fromkeys(told.texts))
    return report


class _Collected(logging.Handler):
    """Keeps warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Called by logging."""
        self.texts.append(record.getMessage())


def check(
    dataset: Dataset,
    *,
    deep: bool = False,
    overlay: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Describe every sample of a dataset, and read the content of some of them, or with `deep` of all.

    Nothing is written but the overlay.

    Args:
        dataset: opened, so its layout was found.
        deep: read all points, and every image and depth map that extraction would read by default.
        overlay: PNG file to write: the points that were found visible, drawn over the image that sees most of them.
        progress: called with the number of samples checked, and of all.

    Raises:
        StorageError: the overlay cannot be written.
    """
    report = CheckReport(dataset=dataset.name, root=str(dataset.root), classes=len(dataset.classes))
    ids = []
    for split in dataset.splits:
        try:
            of_split = dataset.sample_ids(split)
        except (MissingDataError, OSError) as error:  # other splits may be complete
            report.problems.append(_problem(error, ""))
            continue
        report.splits[split] = len(of_split)
        ids += list(of_split)
    loaded = set(ids if deep else evenly_spread(ids, LOADED_SAMPLES))
    content = _Content(dataset, report, every_view=deep)
    for position, sample_id in enumerate(ids):
        try:
            sample = dataset.read(sample_id)
            _describe(report, sample, dataset.defaults.links)
            if sample_id in loaded:
                content.read(sample)
        except (CacheError, OSError) as error:
            report.problems.append(_problem(error, sample_id))
        if progress is not None:
            progress(position + 1, len(ids))
    content.sum_up()
    if overlay is not None:
        if content.overlay is None:
            report.problems.append(Problem("implausible", "", "", "no overlay: no image sees a point"))
        else:
            content.overlay.save(overlay)
    return report


def _problem(error: CacheError | OSError, sample: str, view: str = "") -> Problem:
    """An `OSError` is none of ours: a folder without permission, a disk that fails."""
    text = str(error) if isinstance(error, CacheError) else f"cannot be read ({error}); make it readable"
    return Problem("missing" if isinstance(error, MissingDataError) else "unreadable", sample, view, text)


def _describe(report: CheckReport, sample: Sample, links: LinkSettings) -> None:
    """Count the frames of a sample and judge its poses and intrinsics."""
    report.samples += 1
    report.views += len(sample.views) + sum(bool(view) for view, _ in sample.broken_views)
    report.posed += sum(bool(np.isfinite(v.camera_from_world).all()) for v in sample.views)
    used = select_views(sample, links)
    report.used += len(used)
    for broken, text in sample.broken_views:
        report.problems.append(Problem("missing" if _MISSING.search(text) else "unreadable", sample.id, broken, text))
    if not used and not sample.broken_views:  # which have said why
        report.problems.append(
            Problem("missing", sample.id, "", "no frame with a pose: its points will be kept with coverage 0")
        )
    judged: set[Camera] = set()
    for view in used:
        try:
            check_pose(view)
        except DataError as error:
            report.problems.append(Problem("implausible", sample.id, view.id, str(error)))
        for camera, what in ((view.camera, "image"), (view.depth_camera, "depth map")):
            if camera is not None and camera not in judged:
                judged.add(camera)
                report.problems += [Problem("implausible", sample.id, view.id, t) for t in odd_camera(camera, what)]


def odd_camera(camera: Camera, what: str) -> list[str]:
    """What is hard to believe of intrinsics."""
    if camera.model == "equirectangular":
        return []
    found = []
    across = np.degrees(2 * np.arctan2(camera.width / 2, camera.fx))
    if not FIELD_OF_VIEW[0] <= across <= FIELD_OF_VIEW[1]:
        found.append(
            f"intrinsics of the {what}: fx={camera.fx:g} for {camera.width} pixels is a field of view of {across:.1f} "
            f"degrees, expected {FIELD_OF_VIEW[0]:g} to {FIELD_OF_VIEW[1]:g}; are they of another image size?"
        )
    off = max(abs(camera.cx / camera.width - 0.5), abs(camera.cy / camera.height - 0.5))
    # A crop may move it out of the middle in one direction: Waymo's upper rows are cut off.
    if off > OFF_CENTRE:
        found.append(
            f"intrinsics of the {what}: principal point ({camera.cx:g}, {camera.cy:g}) is {off:.0%} of the image off "
            f"the middle of {camera.width}x{camera.height} pixels; are they of another image size?"
        )
    return found


class _Content:
    """Points, images and depth maps of the samples that are read, and the best overlay among them."""

    def __init__(self, dataset: Dataset, report: CheckReport, *, every_view: bool) -> None:
        self.overlay: Overlay | None = None
        self._settings = dataset.defaults.links
        self._report = report
        self._every_view = every_view
        self._colors = [c.color for c in dataset.classes]
        self._with_labels = self._labelled = self._seen = 0
        self._best = (False, 0)

    def read(self, sample: Sample) -> None:
        """Load a sample. Raises `CacheError` where its points cannot be read; images are recorded one by one."""
        report = self._report
        points = sample.load_points()
        order = morton_order(points.coord)
        coord = points.coord[order]
        report.loaded_samples += 1
        report.points += len(coord)
        if not len(coord):
            report.problems.append(Problem("implausible", sample.id, "", "no points"))
            return
        if points.segment is not None:
            self._with_labels += len(coord)
            self._labelled += int((points.segment != IGNORE_INDEX).sum())
        self._judge_extent(sample, points)
        views = select_views(sample, self._settings)
        if not self._every_view:
            views = evenly_spread(views, LOADED_VIEWS)
        spacing = point_spacing(coord)
        blocks = PointBlocks.of(coord)
        seen = np.zeros(len(coord), dtype=bool)
        usable = 0
        for view in views:
            try:
                links = link_view(blocks, view, self._settings, spacing=spacing, order=order)
                image = view.load_image()
                got, expected = image.shape[1::-1], (view.camera.width, view.camera.height)
                if got != expected:
                    raise DataError(f"image of {got[0]}x{got[1]} pixels, its camera says {expected[0]}x{expected[1]}")
            except (CacheError, OSError) as error:
                report.problems.append(_problem(error, sample.id, view.id))
                continue
            usable += 1
            seen[links.point] = True
            self._keep_best(sample, view, image, points, order, links)
        report.loaded_images += usable
        self._seen += int(seen.sum())
        if usable and not seen.any():
            report.problems.append(
                Problem(
                    "implausible",
                    sample.id,
                    "",
                    f"none of its {len(coord)} points is visible in the {usable} views that were read; are poses, "
                    "depth units and axes right?",
                )
            )

    def sum_up(self) -> None:
        """Fractions over all that was read."""
        if self._with_labels:
            self._report.labelled = round(self._labelled / self._with_labels, 6)
        if self._report.points:
            self._report.coverage = round(self._seen / self._report.points, 6)

    def _judge_extent(self, sample: Sample, points: Points) -> None:
        low, high = points.coord.min(axis=0), points.coord.max(axis=0)
        longest = float((high - low).max())
        problems = self._report.problems
        if not EXTENT[0] <= longest <= EXTENT[1]:
            problems.append(
                Problem(
                    "implausible",
                    sample.id,
                    "",
                    f"its points measure {longest:.4g} m along the longest axis, expected {EXTENT[0]:g} to "
                    f"{EXTENT[1]:g}; are they in metres?",
                )
            )
        for view in sample.views:
            if not np.isfinite(view.camera_from_world).all():
                continue
            camera = -view.camera_from_world[:3, :3].T @ view.camera_from_world[:3, 3]
            away = float(np.maximum(np.maximum(low - camera, camera - high), 0).max())
            if away > FARTHEST_CAMERA:
                problems.append(
                    Problem(
                        "implausible",
                        sample.id,
                        view.id,
                        f"the camera stands {away:.4g} m outside the points' bounds; is its pose in the same frame, "
                        "and in metres?",
                    )
                )
                return

    def _keep_best(
        self,
        sample: Sample,
        view: View,
        image: NDArray[np.uint8],
        points: Points,
        order: NDArray[np.int64],
        links: Links,
    ) -> None:
        found = (points.segment is not None, len(links.point))
        if not len(links.point) or found <= self._best:
            return
        self._best = found
        segment = None if points.segment is None else points.segment[order[links.point]]
        self.overlay = Overlay(
            title=f"{self._report.dataset}  {sample.id}  view {view.id}  {len(links.point)} points",
            image=image,
            uv=links.uv,
            depth=links.depth.astype(np.float32),
            segment=segment,
            colors=self._colors,
        )
