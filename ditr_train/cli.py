"""Command line of `ditr_train`: thin wrappers over the public API. torch is loaded only when a command needs it."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import click

import ditr_cache
from ditr_cache.errors import CacheError

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
    from ditr_train.recipe import load_recipe
    from ditr_train.report import summary
    from ditr_train.trainer import train

    loaded = load_recipe(recipe, overrides)
    folder = default_out(recipe, loaded.vfm, loaded.seed) if out is None else out
    done = train(loaded, folder, device=device, resume=resume)
    if done["last"] is not None:
        click.echo(f"last  {summary(done['last'])}")
        click.echo(f"best  {summary(done['best'])}  (epoch {done['best']['epoch']})")
    click.echo(f"{done['steps']} steps, data wait {100 * done['data_wait']:.1f} %, run folder {done['run']}")


@cli.command(name="eval")
@click.argument("run_dir")
@click.option("--split", default=None, help="Split of the cache.  [default: the recipe's validation split]")
@click.option("--checkpoint", type=click.Choice(["best", "last"]), default="best", show_default=True)
@click.option("--cache", default=None, metavar="CACHE", help="Cache to read, where it was moved since the training.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else on stdout.")
@DEVICE
def evaluate_run(
    run_dir: str, split: str | None, checkpoint: str, cache: str | None, as_json: bool, device: str
) -> None:
    """Score the network of RUN_DIR on all points of a split."""
    from rich.console import Console

    from ditr_train.evaluate import evaluate
    from ditr_train.report import class_table, summary

    results = evaluate(run_dir, split, device=device, checkpoint=checkpoint, cache=cache)
    if as_json:
        click.echo(json.dumps(results))
        return
    Console().print(class_table(results))
    click.echo(summary(results))


@cli.command()
def recipes() -> None:
    """List the recipes that ship."""
    from ditr_train.recipe import list_recipes

    shipped = list_recipes()
    width = max(map(len, shipped), default=0)
    for name, description in shipped.items():
        click.echo(f"{name:<{width}}  {description}")


def default_out(recipe: str, vfm: str | None, seed: int) -> str:
    """Run folder of a recipe where the user names none: `runs/<recipe>-<vfm or none>-<seed>`."""
    name = recipe.removesuffix(".yaml").removesuffix(".yml").strip("/.").replace("/", "-")
    return f"runs/{name}-{vfm or 'none'}-{seed}"


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
