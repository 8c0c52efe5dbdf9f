import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ditr_cache import open_cache, show
from ditr_cache.errors import StorageError, UnknownNameError
from ditr_cache.info import cache_info
from ditr_cache.schema import BrokenView
from ditr_cache.show import INVISIBLE, PANEL, coverage_colors, label_colors, layers, pca_colors, render
from plain_rows import encode


@pytest.fixture
def cache(writer, make_partition, make_spec):
    specs = make_spec(), make_spec(name="other", dim=3, codec="int8")
    make_partition(writer, "one", [("one", 400)], *specs)
    make_partition(writer, "two", [("two-a", 150), ("two-b", 90)], specs[0])
    return open_cache(writer.paths.root)


# --- info -----------------------------------------------------------------------------------------------------------


def test_info_against_plain_loops(cache):
    found = cache_info(cache)
    assert json.loads(json.dumps(found)) == found
    samples = [cache.read(i, "fake") for i in cache.samples]
    points = sum(len(s.coord) for s in samples)
    assert (found["format_version"], found["dataset"], found["samples"]) == (1, "fake", 3)
    assert found["points"] == points == 640
    assert found["coverage"] == pytest.approx(sum((s.link_count > 0).sum() for s in samples) / points, abs=1e-6)
    assert found["views"] == 6 and found["links"] == sum(s.link_count.sum() for s in samples)
    root = cache.paths.root
    geometry = sum(p.stat().st_size for z in (root / "geometry").glob("*.zarr") for p in z.rglob("*") if p.is_file())
    assert found["geometry_bytes"] == geometry and found["incomplete"] == 0
    assert [v["name"] for v in found["vfms"]] == sorted(v["name"] for v in found["vfms"])
    for vfm in found["vfms"]:
        spec = cache.vfms[vfm["key"]]
        have = [cache.read(i, spec.key) for i in cache.samples_with(spec.key)]
        assert (vfm["name"], vfm["dim"], vfm["codec"], vfm["layout"]) == (spec.name, spec.dim, spec.codec, "fused")
        assert vfm["grid"] == [2, 3] and vfm["image_size"] == [28, 42] and vfm["samples"] == len(have)
        assert vfm["coverage"] == pytest.approx(
            sum(s.valid.sum() for s in have) / sum(len(s.valid) for s in have), abs=1e-6
        )
        folder = cache.paths.features(spec.key)
        assert vfm["bytes"] == sum(p.stat().st_size for z in folder.glob("*.zarr") for p in z.rglob("*") if p.is_file())
        tables = {cache.read_stored(i, spec.key).features.table.tobytes() for i in cache.samples_with(spec.key)}
        assert vfm["rows"] >= len(tables)
    assert {v["name"]: v["samples"] for v in found["vfms"]} == {"fake": 3, "other": 1}


def test_info_of_an_empty_cache(writer):
    found = cache_info(open_cache(writer.paths.root))
    assert (found["samples"], found["points"], found["coverage"], found["vfms"]) == (0, 0, 0, [])


def test_info_counts_incomplete_partitions(writer, make_arrays, make_spec):
    lost = BrokenView(sample="a", view="v7", error="truncated")
    for name, geometry, features in (("a", [lost], []), ("b", [], [lost]), ("c", [], [])):
        infos, arrays = make_arrays([(name, 20)])
        record = writer.commit_geometry(name, infos, arrays, broken_views=geometry)
        index = np.zeros(20, np.int32)
        rows = encode(np.ones((1, 5)), "float16")
        writer.commit_features(make_spec(), record, rows, index, images=1, broken_views=features)
    found = cache_info(open_cache(writer.paths.root))
    assert found["incomplete"] == 1 and found["vfms"][0]["incomplete"] == 1


# --- colours --------------------------------------------------------------------------------------------------------


def two_objects(count: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Features of two clearly different things, and which is which."""
    rng = np.random.default_rng(0)
    second = np.arange(count) % 2 == 1
    centers = rng.normal(size=(2, 32))
    return (centers[second.astype(int)] + 0.1 * rng.normal(size=(count, 32))).astype(np.float32), second


def separation(colors: np.ndarray, second: np.ndarray) -> float:
    a, b = colors[second].astype(float), colors[~second].astype(float)
    return float(np.linalg.norm(a.mean(0) - b.mean(0)) / (a.std(0).max() + b.std(0).max()))


@pytest.mark.parametrize("outliers", [0, 4])
def test_pca_colours_tell_objects_apart_in_spite_of_outliers(outliers):
    feature, second = two_objects()
    rng = np.random.default_rng(1)
    feature[:outliers] = 1000 * rng.normal(size=(outliers, 32))  # artefact tokens of ViTs without registers
    colors = pca_colors(feature, np.ones(len(feature), bool))
    assert colors.dtype == np.uint8 and colors.shape == (len(feature), 3)
    assert separation(colors[outliers:], second[outliers:]) > 1.5
    assert np.ptp(colors[outliers:].astype(int), axis=0).max() > 150  # the range is used, not left to the outliers


def test_invisible_points_are_grey():
    feature, _ = two_objects()
    valid = np.random.default_rng(0).random(len(feature)) < 0.7
    colors = pca_colors(np.where(valid[:, None], feature, 0), valid)
    assert (colors[~valid] == INVISIBLE).all() and len(np.unique(colors[valid], axis=0)) > 100
    assert np.array_equal(colors[valid], pca_colors(feature[valid], np.ones(valid.sum(), bool)))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_points_for_a_pca(count):
    assert (pca_colors(np.ones((5, 8), np.float32), np.arange(5) < count) == INVISIBLE).all()


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_few_channels_and_constant_features(dim):
    rng = np.random.default_rng(0)
    every = np.ones(50, bool)
    assert pca_colors(rng.normal(size=(50, dim)).astype(np.float32), every).shape == (50, 3)
    assert pca_colors(np.ones((50, dim), np.float32), every).shape == (50, 3)


def test_label_and_coverage_colours():
    table = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    colors = label_colors(np.array([0, 1, -1, 7, -5], np.int16), table, -1)
    assert colors.tolist() == [[1, 2, 3], [4, 5, 6], [*INVISIBLE], [*INVISIBLE], [*INVISIBLE]]
    colors = coverage_colors(np.array([0, 1, 2, 30, 30], np.int32)).astype(int)
    assert colors[0].tolist() == [*INVISIBLE] and (np.diff(colors[1:4, 0]) > 0).all()
    assert (coverage_colors(np.zeros(4, np.int32)) == INVISIBLE).all()


def test_render_puts_points_where_they_are():
    corner = np.array([[0, 0, 0], [4, 0, 0], [0, 4, 0], [4, 4, 0.1]], np.float32)
    coord = np.repeat(corner, 50, axis=0)
    colors = np.repeat(np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]], np.uint8), 50, axis=0)
    picture = np.asarray(render(coord, colors, axes=(0, 1, 2), size=100))
    assert picture.shape == (100, 100, 3)

    def center(color):
        rows, columns = np.nonzero((picture == color).all(axis=-1))
        return rows.mean(), columns.mean()

    red, green, blue = (center(c) for c in ([255, 0, 0], [0, 255, 0], [0, 0, 255]))
    assert red[0] > 80 and red[1] < 20 and green[1] > 80 and green[0] > 80 and blue[0] < 20 and blue[1] < 20


def test_render_paints_what_is_nearer_over_what_is_behind():
    coord = np.array([[0, 0, 0]] * 60 + [[0, 0, 1]] * 40 + [[1, 1, 0]] * 100, np.float32)
    colors = np.array([[255, 0, 0]] * 60 + [[0, 255, 0]] * 40 + [[0, 0, 255]] * 100, np.uint8)
    picture = np.asarray(render(coord, colors, axes=(0, 1, 2), size=60)).reshape(-1, 3).tolist()
    assert [255, 0, 0] not in picture or [0, 255, 0] not in picture


def test_render_of_one_point():
    assert render(np.zeros((1, 3), np.float32), np.zeros((1, 3), np.uint8), axes=(0, 2, 1), size=50).size == (50, 50)


# --- the picture ----------------------------------------------------------------------------------------------------


def test_layers_are_what_the_sample_has_data_for(cache):
    sample = cache.read("one", "fake")
    titles = list(layers(cache, sample))
    assert [t.split()[0] for t in titles] == ["RGB", "labels", "features", "views"]
    assert f"{sample.valid.mean():.1%}" in titles[2] and f"{(sample.link_count > 0).mean():.1%}" in titles[3]
    bare = replace(sample, color=None, segment=None, feature=None, valid=np.zeros(400, bool))
    assert [t.split()[0] for t in layers(cache, bare)] == ["views"]


def test_show_writes_one_png(cache, tmp_path):
    path = tmp_path / "deep" / "one.png"
    show.show(cache, "one", path, "fake")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.size == (4 * PANEL, 44 + 3 * (PANEL + 18) + 22)
        pixels = np.asarray(picture)
    for column in range(4):
        for row in range(3):
            panel = pixels[44 + row * (PANEL + 18) + 18 :, column * PANEL :][:PANEL, :PANEL]
            assert 0.001 < (panel != 255).any(axis=-1).mean() < 0.9
    features = pixels[62 : 62 + PANEL, 2 * PANEL : 3 * PANEL].reshape(-1, 3)
    assert (features == INVISIBLE).all(axis=1).any()


def test_show_names_what_is_wrong(cache, tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'one'"):
        show.show(cache, "on", tmp_path / "x.png", "fake")
    with pytest.raises(UnknownNameError, match="VFM"):
        show.show(cache, "one", tmp_path / "x.png", "nothing like it")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        show.show(cache, "one", tmp_path / "file" / "x.png", "fake")
    assert not (tmp_path / "x.png").exists()
