"""Command line of `ditr_train`: thin wrappers over the public API. torch is loaded only when a command needs it."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import ditr_cache
from ditr_cache.errors import CacheError

if TYPE_CHECKING:
    from ditr_train.text_table import Table

DEVICE = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda", help="Where the network computes."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(ditr_cache.__version__, prog_name="ditr-train")
def cli() -> None:
    """Train point-cloud networks on the features of 2D foundation models that ditr-cache has cached."""


@cli.command()
@click.argument("recipe")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a key, say cache=PATH or data.batch_size=4."
)
@click.option("--out", metavar="DIR", help="Run folder.  [default: runs/<recipe>-<vfm or none>-<seed>]")
@click.option("--resume", is_flag=True, help="Go on from the run folder's last checkpoint, if there is one.")
@DEVICE
def run(recipe: str, overrides: tuple[str, ...], out: str | None, resume: bool, device: str) -> None:
    """Train by RECIPE, the name of one that ships (see `ditr-train recipes`) or a YAML file."""
    from ditr_train.recipe_files import load_recipe
    from ditr_train.report import published_line, summary
    from ditr_train.trainer import train

    loaded = load_recipe(recipe, overrides)
    folder = default_out(recipe, loaded.vfm, loaded.seed) if out is None else out
    done = train(loaded, folder, device=device, resume=resume)
    if done["last"] is not None:
        click.echo(f"last  {summary(done['last'])}")
        click.echo(f"best  {summary(done['best'])}  (epoch {done['best']['epoch']})")
    if target := published_line(loaded.published):
        click.echo(target)
    click.echo(f"{done['steps']} steps, data wait {100 * done['data_wait']:.1f} %, run folder {done['run']}")


@cli.command(name="eval")
@click.argument("run_dir")
@click.option("--split", default=None, help="Split of the cache.  [default: the recipe's validation split]")
@click.option(
    "--protocol",
    type=click.Choice(["fast", "full"]),
    default="fast",
    show_default=True,
    help="fast: as training logs. full: the official one, with fragments and test-time augmentation.",
)
@click.option("--tta", default=None, metavar="NAME", help="Test-time augmentation of full.  [default: the recipe's]")
@click.option(
    "--checkpoint",
    type=click.Choice(["best", "last"]),
    default="best",
    show_default=True,
    help="Which weights of the run.",
)
@click.option("--submission", default=None, metavar="DIR", help="Write predictions for the dataset's benchmark server.")
@click.option("--cache", default=None, metavar="CACHE", help="Cache to read, where it was moved since the training.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")
@DEVICE
def evaluate_run(
    run_dir: str,
    split: str | None,
    protocol: str,
    tta: str | None,
    checkpoint: str,
    submission: str | None,
    cache: str | None,
    as_json: bool,
    device: str,
) -> None:
    """Score the network of RUN_DIR on all points of a split; the result is also kept in RUN_DIR/eval."""
    from rich.console import Console

    from ditr_train.evaluate import evaluate
    from ditr_train.report import class_table, summary

    results = evaluate(
        run_dir,
        split,
        protocol=protocol,
        tta=tta,
        submission=submission,
        device=device,
        checkpoint=checkpoint,
        cache=cache,
        quiet=False,
    )
    if as_json:
        click.echo(json.dumps(results))
        return
    if results["labelled"]:
        Console().print(class_table(results))
        click.echo(summary(results))
    if submission is not None:
        click.echo(f"{results['samples']} samples predicted, upload {results['submission']}")


@cli.command()
@click.argument("run_dir")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("-o", "--out", required=True, metavar="DIR", help="Folder of the files that are written.")
@click.option(
    "--checkpoint",
    type=click.Choice(["best", "last"]),
    default="best",
    show_default=True,
    help="Which weights of the run.",
)
@click.option("--softmax", is_flag=True, help="Also write the softmax of every point, as float16.")
@click.option("--tile", default="auto", show_default=True, metavar="METRES|auto", help="Longest edge of a tile.")
@click.option(
    "--overlap", default="auto", show_default=True, metavar="METRES|auto", help="Context that a tile reads around it."
)
@click.option("--cache", default=None, metavar="CACHE", help="Cache of the samples, where it is not the run's.")
@click.option("--estimate-normals", is_flag=True, help="Fit normals to the points of files that have none.")
@click.option(
    "--viewpoint",
    type=(float, float, float),
    default=None,
    metavar="X Y Z",
    help="Estimated normals point there, say to the sensor.  [default: upwards]",
)
@click.option("--tmp", default=None, metavar="DIR", help="Folder of temporary files.  [default: that of --out]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")
@DEVICE
def predict(
    run_dir: str,
    inputs: tuple[str, ...],
    out: str,
    checkpoint: str,
    softmax: bool,
    tile: str,
    overlap: str,
    cache: str | None,
    estimate_normals: bool,
    viewpoint: tuple[float, float, float] | None,
    tmp: str | None,
    as_json: bool,
    device: str,
) -> int:
    """Label every point of INPUT: PLY, LAS, LAZ, PCD or KITTI .bin files, or ids of cached samples.

    Files are cut into overlapping tiles, so that clouds of any size fit. Written are NAME.ply, coloured by class, and
    NAME.labels.npy, in the order of the input's points.
    """
    edge, margin = _metres("--tile", tile), _metres("--overlap", overlap)
    if viewpoint is not None and not estimate_normals:
        raise click.UsageError("--viewpoint is where estimated normals point to; it needs --estimate-normals")
    from ditr_train.inference import Normals
    from ditr_train.predict import predict_inputs
    from ditr_train.report import prediction

    done = predict_inputs(
        run_dir,
        inputs,
        out,
        checkpoint=checkpoint,
        softmax=softmax,
        tile=edge,
        overlap=margin,
        device=device,
        cache=cache,
        normals=Normals(viewpoint=viewpoint) if estimate_normals else None,
        tmp=tmp,
    )
    if as_json:
        click.echo(json.dumps(done))
    else:
        for summary in done["inputs"]:
            click.echo(prediction(summary))
        for failure in done["failed"]:
            click.echo(f"error: {failure['error']}", err=True)
    return 1 if done["failed"] else 0


@cli.command(name="convert")
@click.argument("run_dir")
@click.option("-o", "--out", required=True, metavar="FILE", help="File that is written, say model.pth.")
@click.option(
    "--to", type=click.Choice(["pointcept"]), default="pointcept", show_default=True, help="Whose names it gets."
)
@click.option(
    "--checkpoint",
    type=click.Choice(["best", "last"]),
    default="best",
    show_default=True,
    help="Which weights of the run.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")
def convert_run(run_dir: str, out: str, to: str, checkpoint: str, as_json: bool) -> None:
    """Write the network of RUN_DIR with the names of Pointcept, as its `weight=FILE` loads it.

    For networks that read points only. Printed is the configuration of Pointcept's network, and the input that it
    needs. The other way, `ditr-train run RECIPE --set init=FILE --set init_format=pointcept` starts from such a file.
    """
    from ditr_train.convert import convert

    done = convert(run_dir, out, to=to, checkpoint=checkpoint)
    if as_json:
        click.echo(json.dumps(done))
        return
    head = "with its head" if done["head"] else "without the head, which says VFM features"
    click.echo(f"{done['file']}: step {done['step']}, {done['parameters'] / 1e6:.2f} M parameters, {head}")
    click.echo(f"model = {done['model']}")
    colors = "" if done["colors"] is None else f" (colours {done['colors']})"
    click.echo(f"input: {', '.join(done['feat'])}{colors}, voxels of {done['grid_size']:g} m")
    if done["classes"]:
        click.echo(f"classes: {', '.join(done['classes'])}")


@cli.command(name="probe")
@click.argument("cache")
@click.option("--vfm", default=None, help="Name or key.  [default: the only one of the cache]")
@click.option("--train-split", default="train", show_default=True)
@click.option("--val-split", default="val", show_default=True)
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="CHANNEL[+CHANNEL...]",
    help="Of feature, color, coord, height, normal, strength; may be given several times.  [default: feature; and "
    "height with all others that the cache has but coord]",
)
@click.option(
    "--train-samples", type=click.IntRange(min=1), default=500, show_default=True, help="Drawn from the split, at most."
)
@click.option(
    "--points-per-sample", type=click.IntRange(min=1), default=4000, show_default=True, help="Drawn from each, at most."
)
@click.option("--iterations", type=click.IntRange(min=1), default=100, show_default=True, help="Of L-BFGS, at most.")
@click.option("--l2", type=click.FloatRange(min=0), default=1e-3, show_default=True, help="Weight decay.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the drawn points.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")
def probe_cache(cache: str, vfm: str | None, as_json: bool, **settings: Any) -> None:
    """Judge the features of CACHE by a linear probe, before anything is trained.

    Fits a linear classifier on points of the training split and scores it on every labelled point of the validation
    split: on those that have a feature, and on all (points without a feature are given the most frequent class). Below
    it stand what needs no feature: the most frequent class, and the points' own colour, height and normal.
    """
    from ditr_train.probe import ProbeConfig, probe
    from ditr_train.probe_tables import probe_tables

    results = probe(cache, vfm, ProbeConfig(**settings))
    if as_json:
        click.echo(json.dumps(results))
        return
    print_tables(probe_tables(results))
    if results["missing"]:
        click.echo(f"no training point was drawn of: {', '.join(results['missing'])}; their IoU is 0")
    click.echo(
        f"{results['train_points']} training points of {results['train_samples']} samples, {results['val_points']} "
        f"validation points, {100 * results['coverage']:.1f} % with a feature, {results['seconds']:.1f} s"
    )


@cli.command(name="sweep")
@click.argument("recipe")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE[,VALUE...]",
    help="Values of a key; every combination is trained. Commas in brackets or quotes belong to a value.",
)
@click.option("--seeds", metavar="N|LIST", help="3 for 0, 1, 2; or which, say 0,5,7.  [default: the recipe's]")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at a time.")
@click.option("--out", metavar="DIR", help="Folder of the sweep.  [default: sweeps/<recipe>]")
@click.option("--dry-run", is_flag=True, help="Check and list the runs; write nothing.")
@DEVICE
def sweep_runs(
    recipe: str, overrides: tuple[str, ...], seeds: str | None, jobs: int, out: str | None, dry_run: bool, device: str
) -> int:
    """Train RECIPE with every combination of values, times the seeds, and compare.

    Runs that are done are skipped and runs that were interrupted go on: after Ctrl-C, or a failure that was mended,
    give the same command again. A run that fails does not stop the others.
    """
    from ditr_train.compare import compare
    from ditr_train.compare_tables import tables
    from ditr_train.distributed import choose_device
    from ditr_train.run_folder import RunFolder
    from ditr_train.sweep import SweepRecord, job_environments, lock_folder, log_file, process_starter, sweep
    from ditr_train.sweep_plan import check_caches, plan_sweep
    from ditr_train.sweep_progress import SweepProgress

    plan = plan_sweep(recipe, overrides, seeds)
    folder = Path(out or f"sweeps/{short_name(recipe)}")
    choose_device(device)
    check_caches(plan)
    record = SweepRecord.open(folder, recipe, plan)
    if dry_run:
        for run in plan:
            state = "done" if record.done(run.name) else "started" if RunFolder(folder / run.name).started() else "new"
            click.echo(f"{run.name}  [{state}]  {' '.join(f'{key}={value}' for key, value in run.overrides.items())}")
        click.echo(f"{len(plan)} runs in {folder}, {sum(not record.done(run.name) for run in plan)} to be trained")
        return 0
    with lock_folder(folder) as lock:
        record = SweepRecord.open(folder, recipe, plan)
        waiting = sum(not record.done(run.name) for run in plan)
        with SweepProgress(folder, waiting, jobs) as progress:
            result = sweep(
                plan,
                folder,
                record,
                start=process_starter(device, lock),
                jobs=jobs,
                environments=job_environments(device, jobs),
                watcher=progress,
            )
    if started := [folder / run.name for run in plan if RunFolder(folder / run.name).started()]:
        print_tables(tables(compare(started)))
    click.echo(f"{len(result.done)} done, {len(result.skipped)} done before, {len(result.failed)} failed; in {folder}")
    for name in result.failed:
        click.echo(f"failed: {name}, see {log_file(folder, name)}", err=True)
    return 1 if result.failed else 0


@cli.command(name="compare")
@click.argument("runs", nargs=-1, required=True)
@click.option(
    "-o", "outputs", multiple=True, metavar="FILE", help="Also write FILE, by its ending: .html, .png, .csv or .md."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")
def compare_runs(runs: tuple[str, ...], outputs: tuple[str, ...], as_json: bool) -> None:
    """Compare the RUNS, run folders or folders of them: scores, cost, classes, and where their recipes differ.

    Scores of different protocols stand in columns of their own. Runs that are the same but for the seed are also
    given as mean and standard deviation.
    """
    from ditr_train.compare import compare
    from ditr_train.compare_plot import check_output, write_comparison
    from ditr_train.compare_tables import tables

    for output in outputs:
        check_output(output)
    comparison = compare(runs)
    for output in outputs:
        write_comparison(comparison, output)
    if as_json:
        click.echo(json.dumps(comparison.as_dict()))
    else:
        print_tables(tables(comparison))


@cli.command()
def recipes() -> None:
    """List the recipes that ship, with the mIoU that each was published with (- where none was)."""
    from ditr_train.recipe_files import recipe_summaries
    from ditr_train.report import published_score

    shipped = recipe_summaries()
    width = max(map(len, shipped), default=0)
    scores = {name: published_score(summary.published) for name, summary in shipped.items()}
    score_width = max(map(len, scores.values()), default=0)
    for name, summary in shipped.items():
        click.echo(f"{name:<{width}}  {scores[name]:<{score_width}}  {summary.description}")


def print_tables(tables: Sequence[Table]) -> None:
    """Tables on stdout; whole lines where that is a file or a pipe."""
    from rich.console import Console

    from ditr_train.text_table import as_rich

    console = Console(width=None if sys.stdout.isatty() else 400)
    for table in tables:
        console.print(as_rich(table))


def default_out(recipe: str, vfm: str | None, seed: int) -> str:
    """Run folder of a recipe where the user names none: `runs/<recipe>-<vfm or none>-<seed>`."""
    return f"runs/{short_name(recipe)}-{vfm or 'none'}-{seed}"


def short_name(recipe: str) -> str:
    """A recipe's name, or its file's, as part of a folder's name."""
    return recipe.removesuffix(".yaml").removesuffix(".yml").strip("/.").replace("/", "-")


def _metres(option: str, text: str) -> float | None:
    """The value of an option that takes metres or auto (None)."""
    try:
        return None if text == "auto" else float(text)
    except ValueError as error:
        raise click.UsageError(f"{option}: expected a number of metres or auto, got {text!r}") from error


def main(args: list[str] | None = None) -> None:
    """Entry point: errors of this project become one message and their exit code, never a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    sys.exit(_run(args))


def _run(args: list[str] | None) -> int:
    try:
        code: Any = cli.main(args=args, prog_name="ditr-train", standalone_mode=False)
    except CacheError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("error: stopped", err=True)
        return 1
    return int(code or 0)


if __name__ == "__main__":
    main()
