"""`ditr-cache`: thin commands over the public functions. Heavy imports wait until a command needs them."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ditr_cache.cli_maintenance import COMMANDS
from ditr_cache.errors import CacheError

F = TypeVar("F", bound=Callable[..., Any])


class _ImageSize(click.ParamType):
    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        try:
            height, width = (int(part) for part in str(value).lower().split("x"))
        except ValueError:
            self.fail(f"{value!r} is not HEIGHTxWIDTH, say 420x560", param, ctx)
        if height < 1 or width < 1:
            self.fail(f"{value!r}: height and width must be positive", param, ctx)
        return height, width


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="ditr")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens.")
def cli(verbose: bool) -> None:
    """Cache the features of a vision foundation model (VFM) on the points of a 3D dataset."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )


def dataset_options(command: F) -> F:
    """The options that name a dataset, for every command that opens one."""
    for option in (
        click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="Of the dataset; repeatable."),
        click.option(
            "--root", required=True, type=click.Path(path_type=Path), help="Folder of the dataset as unpacked."
        ),
        click.option("--dataset", required=True, metavar="NAME", help="See `ditr-cache datasets`."),
    ):
        command = option(command)
    return command


@cli.command()
@dataset_options
@click.option("--out", required=True, metavar="CACHE", help="Folder of the cache; made where it does not exist.")
@click.option("--split", "splits", multiple=True, help="Only this split; may be given several times.")
@click.option("--vfm", default="dinov2-large", show_default=True, help="Short name, or any timm model's name.")
@click.option("--checkpoint", type=click.Path(), help="Weights: .safetensors or a state dict saved by torch.")
@click.option("--image-size", type=_ImageSize(), help="Size the VFM sees.  [default: the dataset's recipe]")
@click.option("--every-nth-frame", type=click.IntRange(min=1), help="Keep every n-th frame.  [default: the dataset's]")
@click.option("--max-views", type=click.IntRange(min=1), help="At most this many views a sample, evenly spread.")
@click.option("--occlusion-tolerance", type=click.FloatRange(min=0), help="Metres.  [default: 0.2]")
@click.option(
    "--occlusion",
    type=click.Choice(["auto", "none"]),
    help="auto: hidden points get no feature; none: no test.  [default: none outdoors, else auto]",
)
@click.option(
    "--depth-min", type=click.FloatRange(min=0), help="Metres; nearer points are not linked.  [default: the dataset's]"
)
@click.option("--depth-max", type=click.FloatRange(min=0), help="Metres; farther points are not linked.")
@click.option(
    "--layout",
    type=click.Choice(["fused", "views"]),
    help="One feature per point, or the tokens of all its views, for the trainer to choose from.  "
    "[default: the dataset's recipe]",
)
@click.option("--fuse", type=click.Choice(["mean", "last", "nearest"]), help="Of a point's views.  [default: mean]")
@click.option(
    "--codec", default="float16", show_default=True, metavar="NAME", help="float16, int8, fp8, pca256-int8 or pq64."
)
@click.option(
    "--fit-split",
    "fit_splits",
    multiple=True,
    help="Whose images pca and pq are fitted to; may be given several times.  [default: train, else all]",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--compile", "compile_", is_flag=True, help="Run the VFM through torch.compile.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Images per forward pass.  [default: 32 on CUDA, else 1]"
)
@click.option(
    "--workers", type=click.IntRange(min=0), help="Processes; 0 runs in this one.  [default: one per GPU, at least one]"
)
@click.option("--scheduler", metavar="ADDR", help="Address of a running dask scheduler, instead of local processes.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N partitions.")
@click.option("--retry-incomplete", is_flag=True, help="Redo partitions that were committed without some views.")
@click.option("--dry-run", is_flag=True, help="Print partitions, images, points, bytes and seconds; write nothing.")
@click.option(
    "--profile",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write a Chrome trace of what the workers did when, for chrome://tracing or Perfetto.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
def extract(
    dataset: str,
    root: Path,
    options: tuple[str, ...],
    out: str,
    splits: tuple[str, ...],
    vfm: str,
    checkpoint: str | None,
    image_size: tuple[int, int] | None,
    device: str,
    compile_: bool,
    layout: str | None,
    fuse: str | None,
    codec: str,
    fit_splits: tuple[str, ...],
    batch_size: int | None,
    workers: int | None,
    scheduler: str | None,
    limit: int | None,
    retry_incomplete: bool,
    dry_run: bool,
    profile: Path | None,
    as_json: bool,
    **links: float | str | None,
) -> None:
    """Run a VFM over a dataset's images and store its features on the points.

    Run again, it does only what is missing; with another --vfm it reuses all geometry.
    """
    _require_torch()
    from ditr_cache.datasets import parse_options
    from ditr_cache.extract import ExtractRequest
    from ditr_cache.extract import extract as run
    from ditr_cache.partition import ExtractSettings
    from ditr_cache.plan import estimate
    from ditr_cache.vfm import VFMRequest

    request = ExtractRequest(
        settings=ExtractSettings(
            dataset=dataset,
            root=str(root.absolute()),
            options=parse_options(dataset, options),
            cache=out if "://" in out else str(Path(out).absolute()),
            vfm=VFMRequest(
                name=vfm,
                checkpoint=str(Path(checkpoint).absolute()) if checkpoint else None,
                image_size=image_size,
                device=device,
                compile=compile_,
            ),
            layout=layout,
            fuse=fuse,
            codec=codec,
            retry_incomplete=retry_incomplete,
            batch_size=batch_size,
        ),
        links={k: v for k, v in links.items() if v is not None},
        splits=splits or None,
        limit=limit,
        workers=workers,
        scheduler=scheduler,
        fit_splits=fit_splits or None,
        profile=profile,
    )
    if dry_run:
        plan = estimate(request)
        click.echo(json.dumps({"estimate": plan.to_dict()}) if as_json else plan.line())
        return
    totals = run(request, quiet=as_json)
    if as_json:
        click.echo(json.dumps(totals.to_dict()))
    else:
        counts, geometry = totals.partitions, totals.geometry
        click.echo(
            f"{counts['done']} done, {counts['reused']} already there, {counts['failed']} failed; geometry: "
            f"{geometry['computed']} computed, {geometry['reused']} reused; coverage {totals.coverage:.1%}; "
            f"{totals.images} images in {totals.seconds:.1f} s"
        )
        if totals.failures:
            click.echo(
                f"{len(totals.failures)} views or samples were left out (listed above); mend them and run again "
                "with --retry-incomplete",
                err=True,
            )
    if totals.failures:
        sys.exit(1)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
def datasets(as_json: bool) -> None:
    """List the datasets that can be extracted, and what each needs on disk."""
    from ditr_cache.datasets.listing import describe_datasets, listing_lines

    found = describe_datasets()
    if as_json:
        click.echo(json.dumps({"datasets": found}))
    else:
        for line in listing_lines(found):
            click.echo(line)


@cli.command()
@dataset_options
@click.option("--deep", is_flag=True, help="Read all points, images and depth maps, not just a few.")
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="PNG file to write: points drawn over an image.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
def check(dataset: str, root: Path, options: tuple[str, ...], deep: bool, out: Path | None, as_json: bool) -> None:
    """Inspect a download before hours are spent on it: counts, missing or unreadable files, poses, intrinsics."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ditr_cache.check import inspect
    from ditr_cache.datasets import parse_options

    values = parse_options(dataset, options)
    columns = (TextColumn("check"), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=as_json or not sys.stderr.isatty()) as bar:
        task = bar.add_task("check", total=None)
        report = inspect(
            dataset,
            root,
            values,
            deep=deep,
            overlay=out,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        click.echo(json.dumps(report.to_dict()))
    else:
        for line in report.lines():
            click.echo(line)
    if report.problems:
        sys.exit(1)


@cli.command()
@click.argument("cache")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
def info(cache: str, as_json: bool) -> None:
    """Say what a cache holds."""
    from ditr_cache.info import cache_info
    from ditr_cache.progress import human_bytes, human_count
    from ditr_cache.store import open_cache

    found = cache_info(open_cache(cache))
    if as_json:
        click.echo(json.dumps(found))
        return
    click.echo(
        f"{found['dataset']}: {found['samples']} samples, {human_count(found['points'])} points, "
        f"{found['views']} views ({found['views_per_point']:.1f} see a linked point), coverage "
        f"{found['coverage']:.1%}, geometry {human_bytes(found['geometry_bytes'])}"
        + (f", {found['incomplete']} incomplete" if found["incomplete"] else "")
    )
    for vfm in found["vfms"]:
        per_point = vfm["bytes"] / max(1, found["points"])
        click.echo(
            f"  {vfm['key']}: {vfm['samples']} samples, {vfm['dim']}-d {vfm['codec']}, {vfm['layout']}"
            + (f" ({vfm['fuse']})" if vfm["layout"] == "fused" else "")
            + f", grid {vfm['grid'][0]}x{vfm['grid'][1]}, coverage {vfm['coverage']:.1%}, "
            f"{human_bytes(vfm['bytes'])} "
            f"({per_point:.0f} bytes per point)"
            + (f", {vfm['incomplete']} incomplete" if vfm["incomplete"] else "")
            + (f", {vfm['mismatched']} partitions to extract again" if vfm["mismatched"] else "")
        )


@cli.command()
@click.argument("cache")
@click.option("--repair", is_flag=True, help="Remove what is bad, so that the next extract rebuilds just that.")
@click.option("--root", help="Where the dataset lies: compare points, labels, cameras and poses with it, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
def verify(cache: str, repair: bool, root: str | None, as_json: bool) -> None:
    """Re-read every byte of a cache and compare it with what was committed.

    With --root also with the dataset as it is now: `extract` opens no sample of a partition that is there already.
    Depth maps are not compared.
    """
    from rich.console import Console

    from ditr_cache.verify import verify as run

    console = Console(stderr=True)
    if console.is_terminal and not as_json:
        with console.status("verify") as status:
            report = run(cache, repair=repair, root=root, progress=lambda entry: status.update(f"verify {entry}"))
    else:
        report = run(cache, repair=repair, root=root)
    if as_json:
        click.echo(json.dumps(report.to_dict()))
    else:
        for entry, reason in report.reasons.items():
            removed = repair and entry not in (report.not_compared or ())
            click.echo(f"{'removed' if removed else 'bad'} {entry}: {reason}")
        click.echo(f"{report.checked} checked, {report.ok} ok")
    if not report.clean:
        sys.exit(1)


@cli.command()
@click.argument("cache")
@click.argument("sample")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="PNG file to write.")
@click.option("--vfm", help="Key or name; needed where the cache holds several.")
def show(cache: str, sample: str, out: Path, vfm: str | None) -> None:
    """Draw one cached sample: colour, labels, PCA of the features, coverage."""
    from ditr_cache.show import show as run
    from ditr_cache.store import open_cache

    run(open_cache(cache), sample, out, vfm)
    click.echo(str(out))


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--scenes", default=24, show_default=True, type=click.IntRange(min=2), help="Rooms; a third validates.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the series of rooms.")
@click.option(
    "--point-spacing", type=float, help="Metres between neighbouring points.  [default: 0.048, too coarse for textures]"
)
def synthesize(folder: Path, scenes: int, seed: int, point_spacing: float | None) -> None:
    """Write procedural rooms in ScanNet's layout, to try everything without a download."""
    import os

    from rich.console import Console
    from rich.progress import Progress

    from ditr_cache.synthesize import RoomsSettings
    from ditr_cache.synthesize import synthesize as run

    settings = RoomsSettings() if point_spacing is None else RoomsSettings(point_spacing=point_spacing)
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("synthesize", total=scenes)
        workers = min(scenes, os.cpu_count() or 1)
        run(
            folder,
            scenes=scenes,
            seed=seed,
            settings=settings,
            workers=workers,
            progress=lambda n, _: bar.update(task, completed=n),
        )
    click.echo(str(folder))


for _command in COMMANDS:
    cli.add_command(_command)


def _require_torch() -> None:
    import importlib.util

    missing = [name for name in ("torch", "timm") if importlib.util.find_spec(name) is None]
    if missing:
        raise CacheError(f"{' and '.join(missing)} not installed; run `pip install 'ditr[vfm]'` to extract features")


def main() -> None:
    """Entry point: errors of ours are one message and an exit code, never a traceback."""
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except click.exceptions.Abort:
        click.echo("stopped; the same command goes on from here", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        click.echo("stopped; the same command goes on from here", err=True)
        sys.exit(1)
    except CacheError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
