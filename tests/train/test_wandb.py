from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from ditr_cache.errors import UsageError
from ditr_train.recipe import differing_keys, parse_recipe
from ditr_train.recipe_sections import TrackingConfig, WandbConfig
from ditr_train.run_folder import is_free
from ditr_train.tracking import Tracker, read_metrics
from ditr_train.wandb_run import require_wandb

CONFIG = TrackingConfig(tensorboard=False, wandb=WandbConfig(project="p", tags=("t",), group="g", mode="offline"))


class FakeWandb(types.ModuleType):
    """The part of the package that is used; `failing` names what raises."""

    def __init__(self, *failing: str) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.failing, self.inits, self.logged, self.finished = set(failing), [], [], 0

    def Settings(self, **settings: Any) -> dict[str, Any]:  # noqa: N802 - the package's own name
        return settings

    def init(self, **settings: Any) -> FakeWandb:
        self.inits.append(settings)
        self._may_fail("init")
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self._may_fail("log")
        self.logged.append((step, values))

    def finish(self) -> None:
        self._may_fail("finish")
        self.finished += 1

    def _may_fail(self, what: str) -> None:
        if what in self.failing:
            raise RuntimeError(f"no network for {what}")


@pytest.fixture
def wandb(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb(*getattr(request, "param", ()))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def follow(folder: Path, step: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    tracker = Tracker(folder, step, CONFIG, {"seed": 3})
    tracker.write("train", step=step + 1, loss=0.5)
    tracker.write("val", step=step + 1, mIoU=0.25, mAcc=None, IoU={"wall": 0.5, "sink": None}, protocol="fast")
    tracker.close()


def test_numbers_arrive_and_a_resume_continues_the_same_run(wandb: FakeWandb, tmp_path: Path) -> None:
    follow(tmp_path / "run")
    follow(tmp_path / "run", step=1)
    follow(tmp_path / "other")
    first, second, third = wandb.inits
    assert first["id"] == second["id"] != third["id"] and first["resume"] == "allow"
    assert json.loads((tmp_path / "run" / "wandb.json").read_text()) == {"id": first["id"]}
    assert (first["project"], first["name"], first["group"], first["tags"]) == ("p", "run", "g", ["t"])
    assert first["mode"] == "offline" and first["config"] == {"seed": 3} and first["dir"] == str(tmp_path / "run")
    assert wandb.logged[:2] == [(1, {"train/loss": 0.5}), (1, {"val/mIoU": 0.25, "val/IoU/wall": 0.5})]
    assert wandb.logged[2][0] == 2 and wandb.finished == 3


@pytest.mark.parametrize("wandb", [("init",), ("log",), ("finish",)], indirect=True)
def test_a_failure_is_said_once_and_ends_nothing(
    wandb: FakeWandb, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    follow(tmp_path)
    assert caplog.text.count("Weights & Biases failed (RuntimeError: no network") == 1
    assert "goes on without it" in caplog.text and len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_a_damaged_id_is_replaced(wandb: FakeWandb, tmp_path: Path) -> None:
    (tmp_path / "wandb.json").write_text("[")
    follow(tmp_path)
    assert json.loads((tmp_path / "wandb.json").read_text())["id"] == wandb.inits[0]["id"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"ditr\[wandb\]"):
        Tracker(tmp_path, 0, CONFIG)
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))  # a folder of that name, not the package
    with pytest.raises(UsageError, match=r"ditr\[wandb\]"):
        require_wandb()


def test_nothing_is_asked_of_wandb_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = Tracker(tmp_path, 0, TrackingConfig(tensorboard=False))
    tracker.write("train", step=1, loss=0.5)
    tracker.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_tracking_may_differ_on_resume_and_is_checked() -> None:
    values: dict[str, Any] = {"data": {"grid_size": 0.1, "feat": ["color"], "batch_size": 1}, "training": {"epochs": 1}}
    plain = parse_recipe(values)
    tracked = parse_recipe({**values, "tracking": {"tensorboard": False, "wandb": {"project": "p"}}})
    keys = differing_keys(plain, tracked)
    assert keys and all(is_free(key) for key in keys)
    assert not is_free("training.epochs") and not is_free("trackings") and is_free("data.workers")
    with pytest.raises(UsageError, match=r"tracking\.wandb\.mode"):
        parse_recipe({**values, "tracking": {"wandb": {"mode": "maybe"}}})
