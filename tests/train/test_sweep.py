from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ditr_cache.errors import DataError, MismatchError, MissingDataError, UnknownNameError, UsageError
from ditr_train import sweep as sweep_module
from ditr_train.cli import main
from ditr_train.run_folder import CacheInfo, RunFolder, RunInfo
from ditr_train.sweep import SweepInterruptedError, SweepRecord, job_environments, lock_folder, sweep
from ditr_train.sweep_plan import SweepRun, check_caches, parse_seeds, plan_sweep, split_values
from ditr_train.sweep_progress import SweepProgress

RECIPE = """
vfm: fake
cache: c
data: {grid_size: 0.1, feat: [color], batch_size: 2, workers: 0}
model:
  backbone: {stem_channels: 8, stem_kernel_size: 3, channels: [8, 8], layers: [1, 1]}
  injection: {}
training: {steps: 2}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return str(tmp_path / "tiny.yaml")


@dataclass
class FakeJob:
    """Ends with `code` after some looks at it; where it was asked to save, at once."""

    code: int = 0
    looks: int = 1
    asked: list[str] = field(default_factory=list)

    def poll(self) -> int | None:
        self.looks -= 1
        return -15 if self.asked else None if self.looks >= 0 else self.code

    def terminate(self) -> None:
        self.asked.append("terminate")

    def kill(self) -> None:
        self.asked.append("kill")


class FakeStart:
    """Starts fake jobs, and makes the run folder as a real run does."""

    def __init__(self, **codes: int) -> None:
        self.codes, self.started, self.environments, self.jobs = codes, [], [], []

    def __call__(self, run: SweepRun, folder: Path, environment: Mapping[str, str]) -> FakeJob:
        assert sum(job.looks >= 0 for job in self.jobs) < 2
        if not RunFolder(folder / run.name).started():
            make_run(folder / run.name, run)
        self.started.append(run.name)
        self.environments.append(dict(environment))
        self.jobs.append(FakeJob(self.codes.get(run.name.replace("=", ""), 0), looks=len(self.jobs) % 3))
        return self.jobs[-1]


def make_run(path: Path, run: SweepRun) -> None:
    info = RunInfo(
        caches=(CacheInfo(path="/c", dataset="rooms", vfm_key=None, samples=1, identity="i"),), class_names=("a",),
        class_colors=((0, 0, 0),), in_channels=3, vfm=None, init=None, versions={}, device="cpu", command="",
        git_commit=None,
    )  # fmt: skip
    RunFolder(path).create(run.recipe, info)


def go(plan: list[SweepRun], folder: Path, start: Any, **options: Any) -> Any:
    return sweep(plan, folder, SweepRecord.open(folder, "tiny", plan), start=start, poll_seconds=0, **options)


# --- the plan -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1", ["1"]),
        ("1,2, 3", ["1", "2", "3"]),
        ("[0,1],[2]", ["[0,1]", "[2]"]),
        ("{a: 1, b: [2,3]},null", ["{a: 1, b: [2,3]}", "null"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ('["a],",b],c', ['["a],",b]', "c"]),
        ("it's,fine", ["it's", "fine"]),
        ("/data/a b,/data/c", ["/data/a b", "/data/c"]),
        ("", [""]),
    ],
)
def test_values_are_split_outside_of_brackets_and_quotes(text: str, values: list[str]) -> None:
    assert split_values(text) == values


def test_seeds() -> None:
    assert parse_seeds("3") == [0, 1, 2] and parse_seeds("0,5, 7") == [0, 5, 7] and parse_seeds("5,") == [5]
    for wrong in ("0", "", ",", "a", "1,1", "-1", "1.5", "1,,2"):
        with pytest.raises(UsageError, match="--seeds"):
            parse_seeds(wrong)


def test_every_combination_is_planned_with_a_readable_name(recipe: str) -> None:
    plan = plan_sweep(recipe, ["optimizer.lr=0.1,0.01", "data.feat=[color],[color,normal]", "data.loop=3"], "2")
    assert [run.name for run in plan] == [
        f"lr={lr}_feat={feat}_seed={seed}"
        for lr in ("0.1", "0.01")
        for feat in ("color", "color-normal")
        for seed in (0, 1)
    ]
    last = plan[-1].recipe
    assert (last.optimizer.lr, last.data.feat, last.seed, last.data.loop) == (0.01, ("color", "normal"), 1, 3)
    assert plan[0].overrides["seed"] == "0" and plan[0].overrides["data.loop"] == "3"
    assert [run.name for run in plan_sweep(recipe)] == ["seed=0"]
    assert plan_sweep(recipe, ["model.injection.pool=mean,max"])[1].recipe.model.injection.pool == "max"


def test_names_are_safe_and_unique(recipe: str) -> None:
    plan = plan_sweep(recipe, ["cache=/data/a b/../c,/data/a;b/../c,x/" + "y" * 99, "description=A,a"])
    names = [run.name for run in plan]
    assert len({name.lower() for name in names}) == len(names) == 6
    assert all(name == Path(name).name and not set(name) & set(" ;:*'\"$") and len(name) < 99 for name in names)
    twins = plan_sweep(recipe, ["optimizer.name=adamw,sgd", "schedule.name=onecycle,poly"])
    assert twins[0].name == "optimizer.name=adamw_schedule.name=onecycle_seed=0"


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["seed=1,2"], UsageError, "--seeds"),
        (["data.loop"], UsageError, "key=value"),
        (["data.loop=1", "data.loop=2"], UsageError, "given twice"),
        (["data.loop=1,,2"], UsageError, "empty value"),
        (["data.loop=1,1"], UsageError, "listed twice"),
        (["data.loop=1,0"], UsageError, "data.loop"),
        (["data.lop=1,2"], UnknownNameError, "did you mean 'loop'"),
    ],
)
def test_every_recipe_is_valid_before_anything_starts(
    recipe: str, overrides: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plan_sweep(recipe, overrides)


def test_caches_are_looked_at_before_anything_starts(recipe: str, tiny_cache: Path) -> None:
    check_caches(plan_sweep(recipe, [f"cache={tiny_cache}"], "2"))
    with pytest.raises(MissingDataError, match="is not a cache"):
        check_caches(plan_sweep(recipe, [f"cache={tiny_cache},/no/where"]))
    with pytest.raises(UnknownNameError, match="fake"):
        check_caches(plan_sweep(recipe, [f"cache={tiny_cache}", "vfm=fake,fakes"]))
    with pytest.raises(UsageError, match="--set cache=PATH"):
        check_caches(plan_sweep(recipe, ["cache=null"]))


# --- the work -------------------------------------------------------------------------------------------------------


def test_failures_stop_nothing_and_the_next_call_does_what_is_left(recipe: str, tmp_path: Path) -> None:
    plan, folder = plan_sweep(recipe, [], "4"), tmp_path / "s"
    output = io.StringIO()
    start = FakeStart(seed1=1)
    environments = [{"X": "0"}, {"X": "1"}]
    progress = SweepProgress(folder, 4, 2, console=Console(file=output))
    with progress:
        result = go(plan, folder, start, jobs=2, environments=environments, watcher=progress)
    assert set(result.done) == {"seed=0", "seed=2", "seed=3"} and result.failed == ("seed=1",)
    assert {e["X"] for e in start.environments} == {"0", "1"}
    lines = output.getvalue().splitlines()
    assert lines[0].startswith("started seed=0") and len(lines) == 8 and "3 done, 1 failed" in lines[-1]
    assert any(line.startswith("failed  seed=1 (exit code 1), see ") for line in lines)
    recorded = {run["name"]: run["exit_code"] for run in json.loads((folder / "sweep.json").read_text())["runs"]}
    assert recorded == {"seed=0": 0, "seed=1": 1, "seed=2": 0, "seed=3": 0}
    assert (folder / "recipes" / "seed=3.yaml").read_text() == plan[3].recipe.to_yaml()

    again = FakeStart()
    result = go(plan_sweep(recipe, [], "5"), folder, again)
    assert again.started == ["seed=1", "seed=4"] and result.skipped == ("seed=0", "seed=2", "seed=3")


def test_a_removed_run_is_trained_again(recipe: str, tmp_path: Path) -> None:
    plan, folder = plan_sweep(recipe, [], "2"), tmp_path / "s"
    go(plan, folder, FakeStart())
    for path in (folder / "seed=0").iterdir():
        path.unlink()
    again = FakeStart()
    go(plan, folder, again)
    assert again.started == ["seed=0"]


def test_an_interrupt_asks_the_runs_to_save(recipe: str, tmp_path: Path) -> None:
    plan, folder = plan_sweep(recipe, [], "3"), tmp_path / "s"

    class CtrlC:
        def started(self, run: SweepRun) -> None:
            if run.name == "seed=2":
                raise KeyboardInterrupt

        def ended(self, run: SweepRun, exit_code: int, seconds: float) -> None:
            pass

    start = FakeStart()
    with pytest.raises(SweepInterruptedError, match="1 of 3 runs ended; the same command goes on"):
        go(plan, folder, start, jobs=2, watcher=CtrlC())
    assert [job.asked for job in start.jobs] == [[], ["terminate"], ["terminate"]]
    recorded = [run["exit_code"] for run in json.loads((folder / "sweep.json").read_text())["runs"]]
    assert recorded == [0, None, None]


def test_a_run_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stubborn(FakeJob):
        def poll(self) -> int | None:
            return -9 if "kill" in self.asked else None

    monkeypatch.setattr(sweep_module, "STOP_SECONDS", 0.0)
    job = Stubborn()
    sweep_module._stop([job], 0)
    assert job.asked == ["terminate", "kill"]


def test_runs_of_another_recipe_are_not_touched(recipe: str, tmp_path: Path) -> None:
    plan, folder = plan_sweep(recipe, [], "2"), tmp_path / "s"
    go(plan, folder, FakeStart())
    with pytest.raises(MismatchError, match=r"seed=0.*optimizer\.lr differ"):
        SweepRecord.open(folder, "tiny", plan_sweep(recipe, ["optimizer.lr=0.5"], "2"))
    SweepRecord.open(folder, "tiny", plan_sweep(recipe, ["data.workers=2"], "2"))
    (folder / "sweep.json").write_text('{"runs": [{}]}')
    with pytest.raises(DataError, match="damaged"):
        SweepRecord.open(folder, "tiny", plan)
    with pytest.raises(UsageError, match="not the folder of a sweep"):
        SweepRecord.open(tmp_path, "tiny", plan)


def test_one_sweep_at_a_time(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "s"), pytest.raises(UsageError, match="still at work"), lock_folder(tmp_path / "s"):
        pass
    with lock_folder(tmp_path / "s"):
        pass


def test_what_runs_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert job_environments("cpu", 3) == [{"OMP_NUM_THREADS": "2"}]
    assert job_environments("cpu", 20) == [{"OMP_NUM_THREADS": "1"}]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert job_environments("cpu", 3) == [{}]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert job_environments("auto", 3) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert job_environments("cuda", 2) == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    assert job_environments("cuda:1", 2) == [{}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert job_environments("cuda", 2) == [{}]


def test_command(recipe: str, tiny_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two real runs, one of which fails; then everything that is done is skipped."""
    out = str(tmp_path / "s")

    def call(*more: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main(["sweep", recipe, "--set", f"cache={tiny_cache}", "--out", out, "--device", "cpu", *more])
        return int(done.value.code or 0), *capsys.readouterr()

    grid = ("--set", "classes=null,[a,b]")
    code, shown, _ = call(*grid, "--dry-run")
    assert code == 0 and "classes=a-b_seed=0  [new]" in shown and "2 to be trained" in shown
    assert not Path(out).exists()

    code, shown, errors = call(*grid, "--jobs", "2")
    assert code == 1 and "1 done, 0 done before, 1 failed" in shown and "mIoU (fast, last)" in shown
    log = Path(out) / "logs" / "classes=a-b_seed=0.log"
    assert f"failed: classes=a-b_seed=0, see {log}" in errors and "error: " in log.read_text()
    assert (Path(out) / "classes=null_seed=0" / "last.pt").exists()

    code, shown, _ = call(*grid, "--dry-run")
    assert code == 0 and "classes=null_seed=0  [done]" in shown and "1 to be trained" in shown
    code, _, errors = call("--set", "optimizer.lr=0.1,nought")
    assert code == 2 and "optimizer.lr" in errors and "Traceback" not in errors


def test_help_needs_no_torch() -> None:
    script = (
        "import sys; from ditr_train.cli import main\n"
        "try: main(['sweep', '--help'])\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False" and "--seeds" in done.stdout
