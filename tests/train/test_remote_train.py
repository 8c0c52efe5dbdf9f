"""Training from a cache in object storage: forked loader processes, the whole run, and what a run says of its cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ditr_cache.errors import CorruptCacheError
from ditr_cache.store import open_cache
from ditr_train.cli import main
from ditr_train.data.dataset import CachedDataset
from ditr_train.data.loader import BatchLoader, EvalBatches
from ditr_train.recipe_files import load_recipe
from ditr_train.trained import load_run
from object_store import BUCKET, ObjectStore, running, use

server = pytest.fixture(scope="session")(running)

URL = f"s3://{BUCKET}/caches/tiny"

RECIPE = """
description: tiny
vfm: fake
data: {grid_size: 0.1, feat: [color], batch_size: 2, workers: 2}
model:
  backbone: {stem_channels: 8, stem_kernel_size: 3, channels: [8, 8], layers: [1, 1]}
  injection: {}
training: {epochs: 1}
"""


@pytest.fixture
def s3(server: ObjectStore, monkeypatch: pytest.MonkeyPatch, make_cache: Callable[..., Any]) -> ObjectStore:
    """The server, holding a small cache of four training and two validation rooms."""
    use(server, monkeypatch)
    make_cache(URL, points=300)
    server.taken()
    return server


def dataset(url: str | Path) -> CachedDataset:
    return CachedDataset(open_cache(url), "train", grid_size=0.1, feat=("color",), vfm="fake")


def test_forked_loaders_have_connections_of_their_own(
    s3: ObjectStore, tmp_path: Path, make_cache: Callable[..., Any]
) -> None:
    there, here = dataset(URL), dataset(make_cache(tmp_path / "cache", points=300))
    there.cache.read_stored(there.ids[0], "fake")  # this process has connected before the fork
    batches = list(BatchLoader(EvalBatches(there), [0, 1, 2, 3], workers=2))
    for batch, expected in zip(batches, BatchLoader(EvalBatches(here), [0, 1, 2, 3]), strict=True):
        assert batch.names == expected.names
        assert torch.equal(batch.coord, expected.coord)
        assert batch.features is not None and expected.features is not None
        assert torch.equal(batch.features.table, expected.features.table)
    there.cache.read_stored(there.ids[3], "fake")  # and still does


def test_damage_reaches_the_trainer_as_an_error(s3: ObjectStore) -> None:
    training = dataset(URL)
    for key in s3.keys:
        if key.endswith(".zarr.zip"):
            s3.remove(key)
    with pytest.raises(CorruptCacheError, match="committed but missing"):
        list(BatchLoader(EvalBatches(training), [0, 1], workers=2))


def call(*args: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(a) for a in args])
    return int(done.value.code or 0)


def test_a_run(
    s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(RECIPE)
    assert call("run", "tiny.yaml", "--set", f"cache={URL}", "--device", "cpu", "--out", "run") == 0, (
        capsys.readouterr()
    )
    assert json.loads(Path("run/run.json").read_text())["caches"][0]["path"] == URL
    assert load_recipe("run/recipe.yaml").cache == URL
    capsys.readouterr()
    assert call("eval", "run", "--device", "cpu", "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert (results["cache"], results["samples"]) == (URL, 2)
    # Wherever it lies under another name, it is the same cache.
    for key in s3.keys:
        s3.put(key.replace("caches/", "moved/"), s3.content(key))
    assert load_run("run", device="cpu").on_own_cache()
    assert load_run("run", device="cpu", cache=f"s3://{BUCKET}/moved/tiny").on_own_cache()
    assert call("run", "tiny.yaml", "--set", f"cache=s3://{BUCKET}/absent", "--device", "cpu", "--out", "other") == 2
    assert "is not a cache" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "tiny.yaml"]
