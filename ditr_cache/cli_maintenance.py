"""The commands of `ditr-cache` that look after caches that are there: du, rm, copy, compare."""

from __future__ import annotations

import json
import sys

import click


@click.command()
@click.argument("cache")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
def du(cache: str, as_json: bool) -> None:
    """Say what a cache takes on disk, array by array, and what lies there that no reader sees.

    \b
    ditr-cache du caches/scannet
    ditr-cache du s3://bucket/caches/scannet --json
    """
    from ditr_cache.usage import disk_usage

    found = disk_usage(cache)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
        return
    for line in found.lines():
        click.echo(line)


@click.command()
@click.argument("cache")
@click.option("--vfm", required=True, metavar="KEY", help="Key, or a name that only one VFM of the cache has.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
def rm(cache: str, vfm: str, yes: bool, as_json: bool) -> None:
    """Remove the features of one VFM from a cache. The geometry stays. On a terminal, asks first.

    Stopped half-way, the same command goes on; readers see no half of it.

    \b
    ditr-cache rm caches/scannet --vfm dinov2-small-1a2b3c4d
    """
    from ditr_cache.progress import human_bytes
    from ditr_cache.remove import plan_removal, remove_features

    if not yes and sys.stdin.isatty():
        planned = plan_removal(cache, vfm)
        click.confirm(
            f"Remove {planned.key}, {human_bytes(planned.bytes)} in {planned.partitions} partitions?",
            abort=True,
            err=True,
        )
    removed = remove_features(cache, vfm)
    if as_json:
        click.echo(json.dumps(removed.to_dict()))
    else:
        click.echo(
            f"removed {removed.key}: {removed.partitions} partitions, {removed.files} files, "
            f"{human_bytes(removed.bytes)}"
        )


@click.command()
@click.argument("source")
@click.argument("target")
@click.option("--vfm", "vfms", multiple=True, metavar="KEY", help="Only these features; repeatable.  [default: all]")
@click.option(
    "--codec", metavar="NAME", help="Store rows as float16, int8, fp8, pca<K>-int8 or pq<M>.  [default: as they are]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
def copy(source: str, target: str, vfms: tuple[str, ...], codec: str | None, as_json: bool) -> None:
    """Copy a cache, or add features under another codec to it, without running a VFM.

    Run again, it does only what is missing. Whatever is damaged in SOURCE is left out and reported.

    \b
    ditr-cache copy caches/scannet s3://bucket/caches/scannet
    ditr-cache copy caches/scannet /ssd/scannet --vfm dinov2-large --codec int8
    ditr-cache copy caches/scannet caches/scannet --codec pca256-int8
    """
    from ditr_cache.progress import human_bytes
    from ditr_cache.transcode import CopyRequest
    from ditr_cache.transcode import copy as run

    totals = run(CopyRequest(source=source, target=target, vfms=vfms, codec=codec), quiet=as_json)
    if as_json:
        click.echo(json.dumps(totals.to_dict()))
    else:
        for key, becomes in totals.keys.items():
            click.echo(key if key == becomes else f"{key} -> {becomes}")
        click.echo(
            f"geometry: {totals.geometry['copied']} copied, {totals.geometry['reused']} already there; features: "
            f"{totals.features['copied']} copied, {totals.features['reused']} already there; "
            f"{human_bytes(totals.bytes)} in {totals.seconds:.1f} s"
        )
        if totals.failures:
            click.echo(
                f"{len(totals.failures)} entries were left out (listed above); run `ditr-cache verify {source}`",
                err=True,
            )
    if totals.failures:
        sys.exit(1)


@click.command()
@click.argument("cache_a")
@click.argument("cache_b")
@click.option("--vfm-a", metavar="KEY", help="Key or name; needed where CACHE_A holds several.")
@click.option("--vfm-b", metavar="KEY", help="Key or name; needed where CACHE_B holds several.")
@click.option("--split", help="What is compared, and judges the probes.  [default: val, all where there is none]")
@click.option(
    "--points", type=click.IntRange(min=1), default=500_000, show_default=True, help="Compared, and to fit the probes."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, nothing else.")
def compare(
    cache_a: str,
    cache_b: str,
    vfm_a: str | None,
    vfm_b: str | None,
    split: str | None,
    points: int,
    as_json: bool,
) -> None:
    """Compare features of the same points: cosine, bytes per point, mIoU of a linear probe.

    The caches may be one, with two VFMs or codecs in it.

    \b
    ditr-cache compare caches/scannet caches/scannet-int8
    ditr-cache compare caches/scannet caches/scannet --vfm-a dinov2-large-1a2b3c4d --vfm-b dinov2-large-5e6f7a8b
    """
    from ditr_cache.compare import CompareRequest
    from ditr_cache.compare import compare as run

    request = CompareRequest(cache_a=cache_a, cache_b=cache_b, vfm_a=vfm_a, vfm_b=vfm_b, split=split, points=points)
    found = run(request, quiet=as_json)
    if as_json:
        click.echo(json.dumps(found.to_dict()))
        return
    for line in found.lines():
        click.echo(line)


COMMANDS: tuple[click.Command, ...] = (du, rm, copy, compare)
"""What `cli` adds to its group."""
