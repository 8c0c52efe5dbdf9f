"""The two commands as a user would call them, and many trainings side by side; for the demo and the experiments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ditr_cache.errors import CacheError
from ditr_train.recipe_files import load_recipe
from ditr_train.sweep import SweepRecord, job_environments, lock_folder, log_file, process_starter, sweep
from ditr_train.sweep_plan import SweepRun
from ditr_train.sweep_progress import SweepProgress

VFM = "efficientnet-lite0"
"""The VFM whose pretrained weights come as a package."""

console = Console(width=110)


def command(program: str, *args: object) -> list[str]:
    """The command of this very environment, whatever PATH says."""
    return [str(Path(sys.executable).parent / program), *(str(a) for a in args)]


def call(program: str, *args: object) -> None:
    """Run a command; end the program with its exit code where it fails."""
    line = command(program, *args)
    console.print("$ " + " ".join([program, *line[1:]]), highlight=False, markup=False, soft_wrap=True)
    done = subprocess.run(line)
    if done.returncode:
        sys.exit(done.returncode)


def ask(program: str, *args: object) -> dict[str, Any]:
    """Run a command that prints one JSON object."""
    done = subprocess.run(command(program, *args), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def planned(name: str, recipe: str, settings: Mapping[str, object]) -> SweepRun:
    """One run: the name of its folder, its recipe and what is set in it."""
    overrides = {key: str(value) for key, value in settings.items()}
    resolved = load_recipe(recipe, [f"{key}={value}" for key, value in overrides.items()])
    return SweepRun(name=name, overrides=overrides, recipe=resolved)


def train_all(title: str, runs: Sequence[SweepRun], folder: Path) -> None:
    """Train them below `folder`, as many at a time as there are processors; finished ones of an earlier call are kept.

    Ends the program with exit code 1 where one fails.
    """
    jobs = min(os.cpu_count() or 1, len(runs))
    for run in runs:
        recipe = folder / "recipes" / f"{run.name}.yaml"
        console.print(
            f"$ ditr-train run {recipe} --out {folder / run.name}", highlight=False, markup=False, soft_wrap=True
        )
    try:
        with lock_folder(folder) as lock:
            record = SweepRecord.open(folder, title, runs)
            missing = sum(not record.done(run.name) for run in runs)
            with SweepProgress(folder, missing, jobs, console=console) as progress:
                done = sweep(
                    runs,
                    folder,
                    record,
                    start=process_starter("auto", lock),
                    jobs=jobs,
                    environments=job_environments("auto", jobs),
                    watcher=progress,
                )
    except CacheError as error:
        console.print(f"error: {error}", markup=False)
        sys.exit(error.exit_code)
    for name in done.failed:
        console.print(log_file(folder, name).read_text(), markup=False)
    if done.failed:
        sys.exit(1)
