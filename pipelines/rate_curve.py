"""What a codec costs and what it keeps: bytes per point against mIoU, on generated rooms.

    python pipelines/rate_curve.py [--out experiments/rate] [--page BENCHMARKS.md]

The rooms are made and extracted once per layout, as float16. Every other codec is made of that by `ditr-cache copy`,
so that nothing but the codec differs. With each, `demo/inject` is trained from several seeds, the same ones for all:
differences to float16 are taken seed by seed. Beside it stands the linear probe of `ditr-cache compare`, which draws
nothing at random and so tells smaller differences apart.

What is finished is kept in `--out`; the same command goes on.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from benchmarks_page import machine, table_lines, write_section
from commands import VFM, ask, call, console, planned, train_all
from experiments import last, spread
from rate_plot import Measured, Panel, draw
from rich.table import Table

from ditr_cache import open_cache
from ditr_train.files import replace_text

EXACT = "float16"
CODECS = {
    "fused": (
        EXACT, "int8", "fp8", "pca256-int8", "pca64-int8", "pca32-int8", "pca16-int8", "pq64", "pq32", "pq16", "pq8"
    ),
    "views": (EXACT, "int8", "pca64-int8", "pq16"),
}  # fmt: skip
"""Layout -> its codecs, float16 first."""

GOALS = {"int8": 0.2, "pca256-int8": 0.5}
"""Codec -> points of mIoU that it may lose, in the layout fused."""

PROBE_POINTS = 100_000
HEADS = (
    "layout", "codec", "bytes per point", "of float16", "mIoU", "paired difference", "cosine, mean (1 %)",
    "probe mIoU",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured of a codec in a layout.

    Args:
        bytes_per_point: of the features, in files.
        scores: mIoU in percent, one per seed; none where nothing was trained.
        cosine: to float16 in the same layout, `mean` and `p1`; None for float16 itself.
        probe: mIoU in percent of the linear probe.
    """

    bytes_per_point: float
    scores: Sequence[float]
    cosine: Mapping[str, float] | None
    probe: float


Results = Mapping[tuple[str, str], Result]
"""(layout, codec) -> what was measured."""


@click.command()
@click.option("--out", default="experiments/rate", show_default=True, type=click.Path(path_type=Path))
@click.option("--scenes", default=36, show_default=True, help="Rooms; a third of them validates.")
@click.option(
    "--seeds", default=3, show_default=True, type=click.IntRange(min=2), help="Trainings of each codec and layout."
)
@click.option("--steps", default=300, show_default=True, help="Optimiser steps of each training.")
@click.option("--grid-size", default=0.08, show_default=True, help="Metres, edge of a voxel in training and test.")
@click.option("--case", "cases", multiple=True, metavar="LAYOUT/CODEC", help="Train these; repeatable.  [default: all]")
@click.option("--page", default="BENCHMARKS.md", show_default=True, type=click.Path(path_type=Path))
@click.option("--plot", default="docs/rate_curve.png", show_default=True, type=click.Path(path_type=Path))
def rate_curve(
    out: Path,
    scenes: int,
    seeds: int,
    steps: int,
    grid_size: float,
    cases: tuple[str, ...],
    page: Path,
    plot: Path,
) -> None:
    """Train with every codec and layout and write table and plot. Codecs that are not trained with are probed alone."""
    chosen = trained_cases(cases)
    rooms, cache = out / "rooms", out / "cache"
    call("ditr-cache", "synthesize", rooms, "--scenes", scenes, "--seed", 0)
    keys = cached_codecs(rooms, cache)
    settings = {
        "cache": cache, "data.grid_size": grid_size, "data.workers": 0, "training.epochs": "null",
        "training.steps": steps, "training.evaluate_every": 10**6, "training.checkpoint_every": 10**6,
    }  # fmt: skip
    runs = {
        (case, seed): planned(
            f"{'-'.join(case)}-seed={seed}", "demo/inject", {**settings, "vfm": keys[case], "seed": seed}
        )
        for seed in range(seeds)
        for case in chosen
    }
    train_all("demo/inject", list(runs.values()), out / "runs")
    compared = {case: probed(cache, keys[case[0], EXACT], key, out / "compared") for case, key in keys.items()}

    info = ask("ditr-cache", "info", cache, "--json")
    sizes = {vfm["key"]: vfm["bytes"] / info["points"] for vfm in info["vfms"]}
    results = {
        case: Result(
            bytes_per_point=sizes[key],
            scores=[
                100 * last(out / "runs" / runs[case, seed].name)["mIoU"] for seed in range(seeds) if case in chosen
            ],
            cosine=None if case[1] == EXACT else compared[case]["cosine"],
            probe=100 * compared[case]["b"]["mIoU"],
        )
        for case, key in keys.items()
    }
    rows = table_rows(results)
    table = Table(*HEADS)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    draw(panels(results), plot)
    options = f"--scenes {scenes} --seeds {seeds} --steps {steps} --grid-size {grid_size:g}"
    call_line = " ".join(["python pipelines/rate_curve.py", options, *(f"--case {case}" for case in cases)])
    train, val = (len(open_cache(cache).split_ids(split)) for split in ("train", "val"))
    setting = (
        f"Written by `{call_line}`. {train} generated rooms train, {val} validate; {VFM} (112 channels); `demo/inject` "
        f"with voxels of {100 * grid_size:g} cm and {steps} steps, every point, protocol fast, last weights, {seeds} "
        f"seeds; geometry takes {info['geometry_bytes'] / info['points']:.1f} bytes per point beside the features"
    )
    write_section(page, "rate_curve", section(results, rows, info["views_per_point"], setting, plot))


def trained_cases(named: Sequence[str]) -> list[tuple[str, str]]:
    """(layout, codec) of what is trained, all for none named. Raises `click.UsageError`."""
    every = [(layout, codec) for layout, codecs in CODECS.items() for codec in codecs]
    chosen = [case for case in every if not named or "/".join(case) in named]
    needed = {f"{layout}/{EXACT}" for layout, _ in chosen}
    if named and (len(chosen) != len(set(named)) or not needed < set(named)):
        raise click.UsageError(
            f"--case: expected {EXACT} of each layout and other codecs of {', '.join(map('/'.join, every))}; got "
            f"{', '.join(named)}"
        )
    return chosen


def cached_codecs(rooms: Path, cache: Path) -> dict[tuple[str, str], str]:
    """(layout, codec) -> key of its features, made where they are missing."""

    def present() -> dict[tuple[str, str], str]:
        return {(spec.layout, spec.codec): spec.key for spec in open_cache(cache).vfms.values()}

    for layout in CODECS:
        extraction = ["--dataset", "rooms", "--root", rooms, "--out", cache, "--vfm", VFM, "--codec", EXACT]
        call("ditr-cache", "extract", *extraction, "--layout", layout, "--workers", 0)
    for layout, codecs in CODECS.items():
        source = present()[layout, EXACT]
        for codec in codecs[1:]:
            call("ditr-cache", "copy", cache, cache, "--vfm", source, "--codec", codec)
    keys = present()
    return {(layout, codec): keys[layout, codec] for layout, codecs in CODECS.items() for codec in codecs}


def probed(cache: Path, exact: str, key: str, kept: Path) -> dict[str, Any]:
    """What `ditr-cache compare` says of features beside float16, on the validation rooms; kept below `kept`."""
    file = kept / f"{key}.json"
    if not file.exists():
        answer = ask(
            "ditr-cache", "compare", cache, cache, "--vfm-a", exact, "--vfm-b", key, "--points", PROBE_POINTS, "--json"
        )
        kept.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(answer))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def paired(results: Results, layout: str, codec: str) -> tuple[float, float]:
    """Mean difference to float16 from the same seeds, and its standard error, in points of mIoU."""
    exact = results[layout, EXACT].scores
    differences = [a - b for a, b in zip(results[layout, codec].scores, exact, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
    return statistics.mean(differences), error


def pooled_error(results: Results) -> float:
    """Standard error of a paired difference, over all codecs and layouts together."""
    errors = [
        paired(results, layout, codec)[1] for (layout, codec), r in results.items() if codec != EXACT and r.scores
    ]
    return statistics.mean(error**2 for error in errors) ** 0.5


def table_rows(results: Results) -> list[tuple[str, ...]]:
    """The rows under `HEADS`."""
    rows = []
    for (layout, codec), result in results.items():
        exact = results[layout, EXACT]
        cosine = result.cosine
        difference = "-"
        if codec != EXACT and result.scores:
            difference = "{:+.2f} ± {:.2f}".format(*paired(results, layout, codec))
        rows.append(
            (
                layout,
                codec,
                f"{result.bytes_per_point:.1f}",
                f"{result.bytes_per_point / exact.bytes_per_point:.3f}",
                spread(result.scores) if result.scores else "-",
                difference,
                "1" if cosine is None else f"{cosine['mean']:.5f} ({cosine['p1']:.5f})",
                f"{result.probe:.2f}" + ("" if codec == EXACT else f" ({result.probe - exact.probe:+.2f})"),
            )
        )
    return rows


def panels(results: Results) -> list[Panel]:
    """mIoU of the trained networks with the standard error of the mean, and of the linear probes."""

    def measured(layout: str, codec: str, value: float, error: float = 0.0) -> Measured:
        size = results[layout, codec].bytes_per_point
        return Measured(codec=codec, series=layout, bytes_per_point=size, value=value, error=error)

    trained = [
        measured(*case, statistics.mean(r.scores), statistics.stdev(r.scores) / len(r.scores) ** 0.5)
        for case, r in results.items()
        if r.scores
    ]
    probes = [measured(*case, result.probe) for case, result in results.items()]
    return [
        Panel(title="features injected into SparseUNet", label="mIoU (%), mean ± standard error", points=trained),
        Panel(title="linear probe on the features", label="mIoU (%)", points=probes),
    ]


def section(results: Results, rows: Sequence[tuple[str, ...]], views_per_point: float, setting: str, plot: Path) -> str:
    """The section of BENCHMARKS.md."""
    lines = [
        "## Bytes per point against mIoU",
        "",
        f"{setting}. A point is seen by {views_per_point:.1f} views on "
        "average; layout views stores each of them, draws one at random in training and takes the last in the test. "
        "Rows of every codec were made by `ditr-cache copy --codec` of the same float16 rows; pca and pq were fitted "
        "to the training rooms. Cosine (1 %: first percentile) and probe are those of `ditr-cache compare` on the "
        "validation rooms; mIoU is mean ± standard deviation, paired difference (to float16 of that layout, from the "
        "same seeds) mean ± standard error.",
        "",
        f"Machine: {machine()}.",
        "",
        *table_lines(HEADS, rows),
        "",
        *(f"- {line}" for line in verdicts(results)),
        "",
        f"![mIoU over bytes per point]({plot.as_posix()})",
    ]
    return "\n".join(lines)


def verdicts(results: Results) -> list[str]:
    """What the figures say of the goals, and what they cannot say."""
    lines = []
    for codec, goal in GOALS.items():
        result, exact = results["fused", codec], results["fused", EXACT]
        aim = f"{codec}: goal at most {goal} mIoU below float16" + (" at 0.5 x the bytes" if codec == "int8" else "")
        trained = "not trained"
        if result.scores:
            difference, error = paired(results, "fused", codec)
            judged = "met" if difference >= -goal else "not met"
            sure = abs(difference + goal) > 2 * pooled_error(results)
            trained = f"trained {difference:+.2f} ± {error:.2f}, {judged}" + (
                "" if sure else " by the mean, within noise"
            )
        size = result.bytes_per_point / exact.bytes_per_point
        lines.append(f"{aim}: {trained}; probe {result.probe - exact.probe:+.2f}; {size:.3f} x the bytes.")
    error, seeds = pooled_error(results), len(results["fused", EXACT].scores)
    trained_with = [case for case, result in results.items() if result.scores]
    least = min(trained_with, key=lambda case: results[case].bytes_per_point)
    loss, result, exact = paired(results, *least)[0], results[least], results[least[0], EXACT]
    lines.append(
        f"The least bytes that were trained with are {result.bytes_per_point:.1f} per point, {least[1]} {least[0]}: "
        f"trained {loss:+.2f}, probe {result.probe - exact.probe:+.2f}. The network pools features over voxels and "
        "neighbourhoods, the probe judges each point by its own row."
    )
    return [
        *lines,
        f"Over all codecs together the standard error of a paired difference is {error:.2f} mIoU with {seeds} seeds: "
        f"the trainings tell differences of about {2 * error:.1f} and more apart. Smaller ones show in the probe and "
        "in the cosine alone.",
        "At 112 channels pca256-int8 keeps every axis: it is a rotation before int8 and leaves nothing out. This says "
        "nothing of 256 axes of a ViT's 384 to 1024 channels; pca64 to pca16 show what fewer axes cost.",
    ]


if __name__ == "__main__":
    rate_curve()
