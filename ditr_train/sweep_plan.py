"""The plan of a sweep: every combination of some recipe values and seeds, resolved and named."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ditr_cache.errors import UsageError
from ditr_cache.store import open_cache
from ditr_train.recipe import Recipe
from ditr_train.recipe_files import load_recipe

NAME_LENGTH = 48
"""Characters of one value in the name of a run."""


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One run of a sweep.

    Args:
        name: of its folder.
        overrides: recipe key -> value as YAML text, the seed included.
        recipe: resolved.
    """

    name: str
    overrides: Mapping[str, str]
    recipe: Recipe


def plan_sweep(
    recipe: str, overrides: Sequence[str] = (), seeds: str | None = None, *, folders: Sequence[Path] | None = None
) -> list[SweepRun]:
    """Every combination of the values, times the seeds; all recipes are resolved and valid.

    Args:
        recipe: name or YAML file, as of `load_recipe`.
        overrides: `key=a,b,c`: three values of a key. Commas in brackets, braces and quotes belong to a value.
        seeds: `3` stands for 0, 1, 2, and a list such as `0,5,7` (or `5,` for one) for itself; None: the recipe's.
        folders: where names are looked up, as of `load_recipe`.

    Raises:
        UsageError: a value that is empty or given twice, a key given twice, or one that the recipe cannot have.
        CacheError: as `load_recipe`.
    """
    grid: dict[str, list[str]] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"--set: expected key=value,value (say optimizer.lr=0.01,0.003), got {override!r}")
        if key == "seed":
            raise UsageError("--set seed: name seeds with --seeds, say --seeds 3 or --seeds 0,5,7")
        if key in grid:
            raise UsageError(f"--set {key} is given twice; list its values in one, say --set {key}=a,b")
        grid[key] = split_values(text)
        if "" in grid[key] and len(grid[key]) > 1:
            raise UsageError(f"--set {override}: an empty value; remove a comma, or write null or ''")
        if len(set(grid[key])) < len(grid[key]):
            raise UsageError(f"--set {override}: a value is listed twice")
    varied = [key for key, values in grid.items() if len(values) > 1]
    runs = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        for seed in [None] if seeds is None else parse_seeds(seeds):
            settings = chosen if seed is None else {**chosen, "seed": str(seed)}
            resolved = load_recipe(recipe, [f"{k}={v}" for k, v in settings.items()], folders)
            name = _run_name({key: chosen[key] for key in varied}, resolved.seed)
            runs.append(SweepRun(name=name, overrides=settings, recipe=resolved))
    return _unique(runs)


def split_values(text: str) -> list[str]:
    """Split at commas outside of brackets, braces and quotes: `[0,1],'a,b'` -> `[0,1]` and `'a,b'`."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if character == "," and not depth and not quote:
            parts.append("")
            continue
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and (depth or not parts[-1].strip()):  # within a bare word it is an apostrophe
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in ")}]":
            depth = max(0, depth - 1)
        parts[-1] += character
    return [part.strip() for part in parts]


def parse_seeds(text: str) -> list[int]:
    """`3` -> 0, 1, 2; `0,5,7` and `5,` -> as listed. Raises `UsageError`."""
    parts = [part.strip() for part in text.split(",")]
    listed = parts[:-1] if parts[-1] == "" else parts
    if not listed or not all(part.isdecimal() for part in listed):
        raise UsageError(f"--seeds: expected how many (3) or which (0,5,7), got {text!r}")
    seeds = [int(part) for part in listed]
    if len(parts) == 1:
        seeds = list(range(seeds[0]))
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds: expected at least one, and none twice, got {text!r}")
    return seeds


def _run_name(varied: Mapping[str, str], seed: int) -> str:
    """Say `lr=0.01_pool=max_seed=0`: last parts of the keys, or whole keys where two end alike."""
    last = {key: key.rpartition(".")[2] for key in varied}
    if len(set(last.values())) < len(last):
        last = {key: key for key in varied}
    return "_".join([*(f"{last[key]}={_safe(value)}" for key, value in varied.items()), f"seed={seed}"])


def _safe(value: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", value, flags=re.ASCII).strip("-.")[-NAME_LENGTH:] or "empty"


def _unique(runs: Sequence[SweepRun]) -> list[SweepRun]:
    """The runs, with a number in the names of those that would share a folder."""
    found: dict[str, int] = {}
    result = []
    for run in runs:
        key = run.name.lower()  # some file systems know no case
        found[key] = found.get(key, 0) + 1
        name = run.name if found[key] == 1 else f"{run.name}_{found[key]}"
        result.append(replace(run, name=name))
    return result


def check_caches(runs: Sequence[SweepRun]) -> None:
    """Raise where a run's cache cannot be opened or lacks its VFM; every cache is opened once."""
    wanted: set[tuple[str, str | None]] = set()
    for run in runs:
        wanted.update((source.cache, source.vfm) for source in run.recipe.all_sources())
    for path, found in itertools.groupby(sorted(wanted, key=str), key=lambda pair: pair[0]):
        cache = open_cache(path)
        for _, vfm in found:
            if vfm is not None:
                cache.resolve_vfm(vfm)
