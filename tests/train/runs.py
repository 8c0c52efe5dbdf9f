"""Small recipes for runs on the caches of `conftest`, and how two runs are compared."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ditr_train.checkpoint import load_checkpoint
from ditr_train.recipe import Recipe, parse_recipe
from ditr_train.tracking import read_metrics
from ditr_train.trainer import Trainer

VALUES: dict[str, Any] = {
    "vfm": "fake",
    "data": {
        "grid_size": 0.1,
        "feat": ["color", "normal"],
        "augment": [{"name": "RandomRotate", "args": {"p": 1.0}}, {"name": "RandomDropout", "args": {"p": 0.5}}],
        "batch_size": 2,
        "mix_prob": 0.3,
        "workers": 0,
    },
    "model": {
        "backbone": {
            "stem_channels": 8, "stem_kernel_size": 3, "channels": [8, 16, 16, 8], "layers": [1, 1, 1, 1],
            "norm_momentum": 0.1,
        },
        "injection": {"feature_drop": 0.2, "missing_embedding": True},
    },
    "optimizer": {"lr": 0.01},
    "training": {"epochs": 3, "log_every": 2},
}  # fmt: skip

# The order of a sum, and so its last bit, depends on the number of threads: as many as in this process.
ONE_THREAD = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")}


DISTILL: dict[str, Any] = {"task": "distill", "model__injection": None}
PLAIN: dict[str, Any] = {"vfm": None, "model__injection": None}


def recipe(path: Path | None, /, **changes: Any) -> Recipe:
    """The recipe above with changes named `section__key`."""
    values = json.loads(json.dumps({**VALUES, "cache": None if path is None else str(path)}))
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (values[section] if section else values)[name] = value
    return parse_recipe(values)


def weights(run: Path, name: str = "last.pt") -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_checkpoint(run / name)["model"]
    return state


def assert_same_run(a: Path, b: Path) -> None:
    first, second = load_checkpoint(a / "last.pt"), load_checkpoint(b / "last.pt")
    assert first["step"] == second["step"]
    assert all(torch.equal(w, second["model"][k]) for k, w in first["model"].items())
    assert (first["ema"] is None) == (second["ema"] is None)
    if first["ema"] is not None:
        assert first["ema"]["updates"] == second["ema"]["updates"] > 0
        assert all(torch.equal(w, second["ema"]["model"][k]) for k, w in first["ema"]["model"].items())
    for one, other in zip(first["optimizer"]["state"].values(), second["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(other[k])) for k, v in one.items())
    timeless = (
        "seconds", "seconds_per_step", "data_wait", "samples_per_second", "points_per_second", "memory_bytes",
    )  # fmt: skip
    kept = [
        [{k: v for k, v in line.items() if k not in timeless} for line in read_metrics(run / "metrics.jsonl")]
        for run in (a, b)
    ]
    vals = [[line for line in lines if line["kind"] == "val"] for lines in kept]
    assert vals[0] == vals[1] and len(vals[0]) == 3
    steps = [[line["step"] for line in lines if line["kind"] == "train"] for lines in kept]
    assert steps[0] == steps[1]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal while it computes a step."""
    original = Trainer._train_step

    def stepping(self: Trainer, batches: Any) -> Any:
        if self.step == step:
            signal.raise_signal(number)
        return original(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", stepping)
