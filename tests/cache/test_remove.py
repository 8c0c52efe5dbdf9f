"""`ditr-cache rm`: one VFM's features go, all of them and nothing else, however often it is stopped."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ditr_cache import open_cache, remove
from ditr_cache.claims import Claims, features_claim
from ditr_cache.errors import MissingDataError, UnknownNameError, UsageError
from ditr_cache.files import temporary_prefix
from ditr_cache.remove import plan_removal, remove_features
from ditr_cache.schema import VFMSpec
from ditr_cache.store import CacheWriter
from ditr_cache.transcode import CopyRequest, copy
from ditr_cache.verify import verify
from small_caches import Interrupter, everything, in_memory, interrupted_runs, rooms_and_scans
from support import Run


@pytest.fixture(scope="module")
def specs(make_spec: Callable[..., VFMSpec]) -> tuple[VFMSpec, VFMSpec]:
    return make_spec(), make_spec(name="other", dim=7, codec="int8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, make_metadata, make_arrays, specs) -> Path:
    path = tmp_path_factory.mktemp("made") / "cache"
    rooms_and_scans(CacheWriter.create(path, make_metadata()), make_arrays, *specs)
    copy(CopyRequest(source=str(path), target=str(path), vfms=(specs[0].key,), codec="pca2-int8"), quiet=True)
    return path


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "cache")


@pytest.fixture
def memory(made: Path) -> Iterator[str]:
    """The same cache in object storage."""
    with in_memory(made) as url:
        yield url


def fitted_key(cache: object) -> str:
    return next(key for key, spec in open_cache(cache).vfms.items() if spec.codec == "pca2-int8")


def names(cache: Path) -> set[str]:
    return {p.relative_to(cache).as_posix() for p in cache.rglob("*") if ".claims" not in p.parts}


@pytest.mark.parametrize("where", ["cache", "memory"])
def test_one_store_goes_and_nothing_else(where: str, specs, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(where)
    before, key = everything(url), fitted_key(url)
    planned = plan_removal(url, key)
    removed = remove_features(url, key)
    assert removed == planned and removed.partitions == 4 and removed.bytes > 0 and removed.files > 8
    after = everything(url)
    assert after.keys() == {name for name in before if not name.startswith(key)}
    assert all(after[name].tobytes() == before[name].tobytes() for name in after)
    assert sorted(open_cache(url).vfms) == sorted(s.key for s in specs) and verify(url).clean
    with pytest.raises(UnknownNameError):
        remove_features(url, key)


def test_nothing_is_left_on_disk(cache: Path) -> None:
    before, key = names(cache), fitted_key(cache)
    leftover = cache / "features" / key / ".elsewhere+1+x.tmp"
    leftover.mkdir()
    os.utime(leftover, (0, 0))
    remove_features(cache, key)
    assert names(cache) == {name for name in before if not name.startswith(f"features/{key}")}


def test_by_a_name_that_is_only_one_s(cache: Path, specs) -> None:
    assert remove_features(cache, "other").key == specs[1].key
    with pytest.raises(UsageError, match=r"several VFMs named 'fake'.*" + specs[0].key):
        remove_features(cache, "fake")
    with pytest.raises(UnknownNameError, match=f"did you mean '{specs[0].key}'"):
        remove_features(cache, specs[0].key[:-1])
    for wrong in ("geometry", "../geometry", ".", ""):
        with pytest.raises(UnknownNameError):
            remove_features(cache, wrong)
    with pytest.raises(MissingDataError, match="not a cache"):
        remove_features(cache / "geometry", "fake")


def test_what_cannot_be_read_any_more_goes_by_its_folder(cache: Path, specs) -> None:
    (cache / "features" / specs[1].key / "vfm.json").write_text("{}")
    assert remove_features(cache, specs[1].key).partitions == 4
    assert not (cache / "features" / specs[1].key).exists()


@pytest.mark.parametrize("where", ["cache", "memory"])
def test_stopped_at_any_step_the_same_command_goes_on(
    where: str, made: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, key = request.getfixturevalue(where), fitted_key(made)
    expected = {name for name in everything(made) if not name.startswith(key)}
    places = [(remove, name) for name in ("_unlink", "remove_group", "remove_many")]
    interrupter = Interrupter(monkeypatch, places)
    stops = 0
    for _ in interrupted_runs(interrupter, lambda: remove_features(url, key)):
        reader = open_cache(url)
        for sample in reader.samples_with(key) if key in reader.vfms else []:
            assert reader.read(sample, key).feature is not None  # what a record names is whole
        remove_features(url, key)
        assert everything(url).keys() == expected and verify(url).clean
        if where == "cache":
            shutil.rmtree(url)
            shutil.copytree(made, url)
        else:
            copy(CopyRequest(source=str(made), target=url), quiet=True)
        stops += 1
    assert stops >= (4 if where == "memory" else 10)


def test_refused_while_another_run_writes(cache: Path, specs) -> None:
    before = names(cache)
    folder = cache / "features" / specs[0].key
    mine = folder / f"{temporary_prefix()}x.tmp"
    mine.mkdir()
    with pytest.raises(UsageError, match="being written by process"):
        remove_features(cache, specs[0].key)
    mine.rmdir()
    other = Claims(CacheWriter(cache).paths, "another run")
    assert other.take(features_claim(specs[0].key, "room-0"))
    with pytest.raises(UsageError, match=r"another run.*\.claims"):
        remove_features(cache, specs[0].key)
    remove_features(cache, specs[1].key)  # nobody writes there
    other.release(features_claim(specs[0].key, "room-0"))
    assert {name for name in before if specs[1].key not in name} == names(cache)
    remove_features(cache, specs[0].key)


def test_the_command_asks_on_a_terminal(run: Run, cache: Path, specs, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    before = names(cache)
    for answer in ("n\n", "\n"):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        outcome = run("rm", cache, "--vfm", "other")
        assert outcome.code == 1 and f"Remove {specs[1].key}" in outcome.err and outcome.out == ""
        assert names(cache) == before
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    outcome = run("rm", cache, "--vfm", "other", "--json")
    assert outcome.code == 0 and outcome.json["key"] == specs[1].key and outcome.json["partitions"] == 4
    monkeypatch.setattr(sys, "stdin", Terminal(""))
    outcome = run("rm", cache, "--vfm", specs[0].key, "--yes")
    assert outcome.code == 0 and f"removed {specs[0].key}" in outcome.out
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert run("rm", cache, "--vfm", fitted_key(cache)).code == 0
    assert open_cache(cache).vfms == {} and verify(cache).clean


def test_wrong_use_of_the_command(run: Run, cache: Path) -> None:
    assert run("rm", cache).code == 2
    outcome = run("rm", cache, "--vfm", "othr", "--yes")
    assert outcome.code == 2 and "did you mean 'other'" in outcome.err
