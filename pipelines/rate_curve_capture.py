"""What a codec costs and what it keeps on real images: bytes per point against cosine and against a linear probe.

    python pipelines/rate_curve_capture.py CAPTURE --other OTHER [--out experiments/rate-capture] [--page BENCHMARKS.md]

CAPTURE (7-Scenes layout) is parted in time: codecs are fitted to the first frames alone. Judged are the points of its
last frames, and those of OTHER (Open3D layout), another camera in another room.

Such captures have no labels. The probe therefore tells where in the room a point lies: in which of the eight parts that
the median planes of the first frames' points make. Depth and poses alone decide these labels, no image does; but both
parts of the capture show one room, so that the probe tells how well places are known again, not what things are.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from benchmarks_page import machine, table_lines, write_section
from commands import VFM, ask, call, console
from distill_capture import part
from numpy.typing import NDArray
from rate_curve import CODECS, EXACT
from rate_plot import Measured, Panel, draw
from rich.table import Table

from ditr_cache import CacheReader, open_cache
from ditr_cache.compare import cosine
from ditr_cache.ridge import NormalEquations

HEADS = (
    "codec", "bytes per point", "of float16", "cosine, later frames: mean (1 %)", "other capture: mean (1 %)",
    "probe accuracy",
)  # fmt: skip
PARTS = 8


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured of a codec.

    Args:
        bytes_per_point: of the features, in files.
        later, other: cosine to float16 of the points of later frames and of the other capture, mean and first
            percentile.
        accuracy: of the probe on later frames, in percent.
    """

    bytes_per_point: float
    later: tuple[float, float]
    other: tuple[float, float]
    accuracy: float


@click.command()
@click.argument("capture", type=click.Path(path_type=Path, exists=True))
@click.option("--other", required=True, type=click.Path(path_type=Path, exists=True), help="Folder of one capture.")
@click.option("--out", default="experiments/rate-capture", show_default=True, type=click.Path(path_type=Path))
@click.option("--held-out", default=0.3, show_default=True, help="Share of CAPTURE's frames that judge, the last ones.")
@click.option("--page", default="BENCHMARKS.md", show_default=True, type=click.Path(path_type=Path))
@click.option("--plot", default="docs/rate_curve_capture.png", show_default=True, type=click.Path(path_type=Path))
def rate_curve_capture(capture: Path, other: Path, out: Path, held_out: float, page: Path, plot: Path) -> None:
    """Compare every codec with float16 on CAPTURE and OTHER and write table and plot."""
    root, cache = out / "captures", out / "cache"
    train_frames, later_frames = part(capture, root / "capture", held_out)
    beside(other, root / "other")
    extraction = ["--dataset", "rgbd", "--root", root, "--out", cache, "--vfm", VFM, "--codec", EXACT]
    call("ditr-cache", "extract", *extraction, "--layout", "fused", "--workers", 0)
    (source,) = (spec.key for spec in open_cache(cache).vfms.values() if spec.codec == EXACT)
    for codec in CODECS["fused"][1:]:
        call("ditr-cache", "copy", cache, cache, "--vfm", source, "--codec", codec)

    reader, info = open_cache(cache), ask("ditr-cache", "info", cache, "--json")
    keys = {spec.codec: spec.key for spec in reader.vfms.values()}
    sizes = {vfm["key"]: vfm["bytes"] / info["points"] for vfm in info["vfms"]}
    train, later, elsewhere = samples(reader)
    results = {
        codec: Result(
            bytes_per_point=sizes[keys[codec]],
            later=cosines(reader, later, source, keys[codec]),
            other=cosines(reader, elsewhere, source, keys[codec]),
            accuracy=probe_accuracy(reader, train, later, keys[codec]),
        )
        for codec in CODECS["fused"]
    }
    rows = [row(codec, result, results[EXACT]) for codec, result in results.items()]
    table = Table(*HEADS)
    for cells in rows:
        table.add_row(*cells)
    console.print(table)
    draw(panels(results), plot)
    parts = np.bincount(part_of_room(reader, train, later), minlength=PARTS)
    (exact,) = (vfm for vfm in info["vfms"] if vfm["key"] == source)
    text = [
        "## Bytes per point on real images",
        "",
        f"Written by `python pipelines/rate_curve_capture.py 7SCENES --other OPEN3D`. {VFM}, layout fused. Codecs were "
        f"fitted to the first {train_frames} frames of a 7-Scenes capture. Cosine to float16 on points of its last "
        f"{later_frames} frames, and on Open3D's sample capture, another camera in another room; mean, and first "
        f"percentile. Bytes are those of compressed files, {exact['rows'] / info['points']:.2f} rows per point: a row "
        f"is {2 * exact['dim']} bytes as float16, but neighbouring points often have the same tokens. "
        "These captures have no labels. The probe (ridge regression, fitted to the first frames, judged on the last) "
        "tells in which of eight parts of the room a point lies, which depth and poses decide; the most frequent part "
        f"has {100 * parts.max() / parts.sum():.1f} %.",
        "",
        f"Machine: {machine()}.",
        "",
        *table_lines(HEADS, rows),
        "",
        f"![cosine and probe accuracy over bytes per point]({plot.as_posix()})",
    ]
    write_section(page, "rate_curve_capture", "\n".join(text))


def beside(capture: Path, folder: Path) -> None:
    """Lay out a capture, and the intrinsics next to it, as one sequence that nothing is fitted to."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "seq-01").mkdir(parents=True)
    for path in capture.iterdir():
        (folder / "seq-01" / path.name).symlink_to(path.resolve())
    for path in (*capture.parent.glob("*.json"), *capture.parent.glob("*.txt")):
        (folder / path.name).symlink_to(path.resolve())
    (folder / "TestSplit.txt").write_text("sequence1\n")


def samples(reader: CacheReader) -> tuple[str, str, str]:
    """Ids of the first frames, of the last ones, and of the other capture."""
    (train,) = reader.split_ids("train")
    other, later = sorted(reader.split_ids("test"), key=lambda sample: "other" not in sample)
    return train, later, other


def cosines(reader: CacheReader, sample: str, exact: str, key: str) -> tuple[float, float]:
    """Mean and first percentile over the points of a sample."""
    a, b = reader.read(sample, exact), reader.read(sample, key)
    assert a.feature is not None and b.feature is not None
    found = cosine(a.feature[a.valid], b.feature[a.valid]).astype(np.float64)
    return float(found.mean()), float(np.percentile(found, 1))


def part_of_room(reader: CacheReader, train: str, sample: str) -> NDArray[np.int64]:
    """[N] in which of the eight parts, that the median planes of the points of `train` make, each of `sample` lies."""
    beyond = reader.read_stored(sample, None).coord > np.median(reader.read_stored(train, None).coord, axis=0)
    return np.asarray(beyond @ np.array([1, 2, 4]), dtype=np.int64)


def probe_accuracy(reader: CacheReader, train: str, test: str, key: str) -> float:
    """Percent of the points of `test` that a probe fitted to `train` puts into the right part of the room."""

    def labelled(sample: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        points = reader.read(sample, key)
        assert points.feature is not None
        return points.feature[points.valid], part_of_room(reader, train, sample)[points.valid]

    rows, labels = labelled(train)
    sums = NormalEquations(rows.shape[1], np.bincount(labels, minlength=PARTS), balance=0.0)
    sums.add(rows, labels)
    rows, labels = labelled(test)
    return 100 * float((sums.solve().predict(rows) == labels).mean())


def row(codec: str, result: Result, exact: Result) -> tuple[str, ...]:
    """One line of the table."""
    return (
        codec,
        f"{result.bytes_per_point:.1f}",
        f"{result.bytes_per_point / exact.bytes_per_point:.3f}",
        f"{result.later[0]:.5f} ({result.later[1]:.5f})",
        f"{result.other[0]:.5f} ({result.other[1]:.5f})",
        f"{result.accuracy:.2f}" + ("" if codec == EXACT else f" ({result.accuracy - exact.accuracy:+.2f})"),
    )


def panels(results: dict[str, Result]) -> list[Panel]:
    """What cosine lacks to 1 on either capture, and the probe."""

    def measured(codec: str, series: str, value: float) -> Measured:
        size = results[codec].bytes_per_point
        return Measured(codec=codec, series=series, bytes_per_point=size, value=value)

    coded = {codec: result for codec, result in results.items() if codec != EXACT}
    lost = [
        *(measured(codec, "later frames", 1 - result.later[0]) for codec, result in coded.items()),
        *(measured(codec, "other capture", 1 - result.other[0]) for codec, result in coded.items()),
    ]
    told = [measured(codec, "later frames", result.accuracy) for codec, result in results.items()]
    return [
        Panel(title="distance to float16", label="1 - mean cosine", points=lost, logarithmic=True),
        Panel(title="linear probe: where in the room", label="accuracy on later frames (%)", points=told),
    ]


if __name__ == "__main__":
    rate_curve_capture()
