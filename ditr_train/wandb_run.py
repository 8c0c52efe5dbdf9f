"""A run of Weights & Biases that follows a training and never ends it."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ditr_cache.errors import UsageError
from ditr_train.recipe_sections import WandbConfig

log = logging.getLogger(__name__)

LOGIN_SECONDS = 30
"""How long W&B may wait at a terminal for someone to log in."""

FINISH_SECONDS = 300
"""How long W&B may take to send what is left at the end; `wandb sync` sends what did not go through."""


def require_wandb() -> Any:
    """The `wandb` package. Raises `UsageError` where it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise _missing() from error
    # A folder `wandb` in the working directory, as W&B itself makes them, passes for an empty package.
    if not hasattr(wandb, "init"):
        raise _missing()
    return wandb


def _missing() -> UsageError:
    return UsageError(
        "tracking.wandb is set but the package wandb is not installed; run `pip install 'ditr[wandb]'`, or train with "
        "--set tracking.wandb=null"
    )


class WandbRun:
    """Sends numbers to one W&B run, the same one after every resume of the run folder.

    Whatever fails in W&B (no network, no login, a full quota) is said once, and the training goes on without it.

    Args:
        folder: the run folder; the run's id is kept in its `wandb.json`, W&B's own files below `wandb/`.
        config: which project, name and so on.
        recipe: the resolved recipe, as W&B's config of the run.

    Raises:
        UsageError: the package is not installed.
    """

    def __init__(self, folder: Path, config: WandbConfig, recipe: Mapping[str, Any]) -> None:
        wandb = require_wandb()
        self._run: Any = None
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                name=config.name or folder.resolve().name,
                group=config.group,
                tags=list(config.tags),
                mode=config.mode,
                config=dict(recipe),
                dir=str(folder),
                id=_run_id(folder / "wandb.json"),
                resume="allow",
                settings=wandb.Settings(
                    console="off",
                    login_timeout=LOGIN_SECONDS,
                    finish_timeout=FINISH_SECONDS,
                    finish_timeout_raises=True,
                ),
            )
        except Exception as error:
            self._give_up(error)

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Send the values of one step, by name."""
        if self._run is not None:
            try:
                self._run.log(dict(values), step=step)
            except Exception as error:
                self._give_up(error)

    def close(self) -> None:
        """Send what is left, and end the run."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        log.warning(
            "Weights & Biases failed (%s: %s); the training goes on without it, metrics.jsonl has everything. Log in "
            "with `wandb login`, or use --set tracking.wandb.mode=offline",
            type(error).__name__,
            str(error).strip() or "no reason given",
        )


def _run_id(path: Path) -> str:
    """The id that the file holds, or a new one that it holds from now on."""
    try:
        return str(json.loads(path.read_text())["id"])
    except (OSError, ValueError, KeyError, TypeError):
        chosen = secrets.token_hex(4)
        path.write_text(json.dumps({"id": chosen}) + "\n")
        return chosen
