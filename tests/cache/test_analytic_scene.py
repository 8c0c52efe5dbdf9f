"""A scene whose features are a known function of position, through the whole path: half a patch is the limit."""

import numpy as np
import pytest


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_every_feature_lies_within_half_a_patch_of_its_point(bed, position_vfm, tmp_path, codec):
    result = bed.run(tmp_path / "cache", position_vfm, bed.right_views(), codec=codec)
    report = bed.check(result.sample)
    assert report.hidden > 500 and report.visible > 3000 and len(report.errors) > 1000
    assert (report.ghosts, report.missing, report.wrong_labels) == (0, 0, 0)
    assert report.errors.max() <= bed.HALF_PATCH + bed.QUANTISATION
    assert report.right
    # The limit is tight: points do lie almost half a patch from the centre of theirs.
    assert report.errors.max() > 0.4 and np.median(report.errors) > 0.2
    assert result.summary.status == "done" and not result.summary.failures and result.summary.images == 3


@pytest.mark.parametrize("fuse", ["mean", "nearest"])
def test_other_ways_to_reduce_views(bed, position_vfm, tmp_path, fuse):
    report = bed.check(bed.run(tmp_path / "cache", position_vfm, bed.right_views(), fuse=fuse).sample, fuse=fuse)
    assert report.right, (report.errors.max(), report)


def test_without_depth_the_zbuffer_decides(bed, position_vfm, tmp_path):
    result = bed.run(tmp_path / "cache", position_vfm, bed.right_views(with_depth=False))
    report = bed.check(result.sample, margin=30)
    assert report.hidden > 200 and len(report.errors) > 300
    assert report.right, (report.errors.max(), report.ghosts, report.missing)


def test_points_come_back_in_an_order_that_leads_to_the_datasets(bed, position_vfm, tmp_path):
    sample = bed.run(tmp_path / "cache", position_vfm, bed.right_views()).sample
    points = bed.make_points()
    assert not np.array_equal(sample.source_index, np.arange(len(points.coord)))
    assert np.array_equal(points.coord[sample.source_index], sample.coord)
    assert np.array_equal(points.segment[sample.source_index], sample.segment)


def test_coverage_counts_views(bed, position_vfm, tmp_path):
    sample = bed.run(tmp_path / "cache", position_vfm, bed.right_views()).sample
    assert np.array_equal(sample.valid, sample.link_count > 0) and sample.link_count.max() == 3
