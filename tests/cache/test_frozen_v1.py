"""A cache of format version 1 as it was written once (`tests/data/make_v1.py`): every later reader must read it."""

from pathlib import Path

import numpy as np
import pytest

from ditr_cache import open_cache
from ditr_cache.info import cache_info
from ditr_cache.schema import LinkSettings
from ditr_cache.verify import verify

DATA = Path(__file__).parents[1] / "data"


def test_it_reads_as_it_did():
    cache = open_cache(DATA / "v1")
    assert cache.samples == ["a ü", "b", "scene0000_00"] and cache.splits == ["train", "val"]
    assert cache.metadata.dataset == "frozen" and cache.metadata.class_names == ("wall", "floor")
    assert cache.metadata.links == LinkSettings(every_nth_frame=2, max_views=8, depth_max=6.5)
    with np.load(DATA / "v1.npz", allow_pickle=False) as expected:
        assert len(expected) == 3 * 9
        for entry in expected:
            sample, name = entry.split("|")
            is_vfm = name in ("half", "eight")
            got = cache.read(sample, name if is_vfm else "half")["feature" if is_vfm else name]
            assert np.array_equal(got, expected[entry]), entry


def test_its_identities_are_what_they_were():
    cache = open_cache(DATA / "v1")
    assert sorted(cache.vfms) == ["eight-f277a80e", "half-b4420869"]
    assert {p: r.digest[:12] for p, r in cache.geometry.items()} == {
        "scene0000_00": "80049d5211be",
        "scans/0": "47f1bfa5af55",
    }


def test_it_verifies():
    report = verify(DATA / "v1")
    assert report.clean and report.ok == report.checked == 2 + 2 * 3
    info = cache_info(open_cache(DATA / "v1"))
    assert (info["samples"], info["points"], info["incomplete"]) == (3, 135, 1)


def test_it_is_small():
    sizes = [p.stat().st_size for p in (*(DATA / "v1").rglob("*"), DATA / "v1.npz") if p.is_file()]
    assert len(sizes) > 10 and sum(sizes) < 100_000


@pytest.mark.parametrize("codec", ["half", "eight"])
def test_a_writer_goes_on_with_it(codec):
    from ditr_cache.store import CacheWriter

    writer = CacheWriter(DATA / "v1")
    spec = open_cache(DATA / "v1").resolve_vfm(codec)
    for partition in ("scene0000_00", "scans/0"):
        geometry, features = writer.geometry(partition), writer.features(spec, partition)
        assert geometry is not None and features is not None and features.geometry_digest == geometry.digest
