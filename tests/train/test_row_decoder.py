"""Rows decoded on the device: what the trainer makes of a stored row is what the codec says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ditr_cache.codecs import CODECS
from ditr_cache.schema import VFMSpec
from ditr_cache.store import CacheReader, open_cache
from ditr_cache.transcode import CopyRequest
from ditr_cache.transcode import copy as copy_cache
from ditr_train.data.dataset import CachedDataset
from ditr_train.data.loader import BatchLoader, TrainBatches, TrainPlan
from ditr_train.data.sample import FeatureRows, PointBatch
from ditr_train.models.config import InjectionConfig
from ditr_train.models.grid_hierarchy import GridHierarchy
from ditr_train.models.injection import Injection

DIM = 10
EXTREMES = ("pca3-int8", "pq3", "pq16")  # few axes; subspaces filled up with zeros; more subspaces than channels


@pytest.fixture(scope="module")
def cache(
    make_cache: Callable[..., Path], make_spec: Callable[..., VFMSpec], tmp_path_factory: pytest.TempPathFactory
) -> CacheReader:
    """The same rows under every codec."""
    root = tmp_path_factory.mktemp("codecs") / "cache"
    make_cache(root, train=3, val=1, points=600, specs=[make_spec(dim=DIM, codec="float16")])
    (source,) = open_cache(root).vfms
    for codec in {*CODECS, *EXTREMES} - {"float16"}:
        assert not copy_cache(CopyRequest(source=str(root), target=str(root), vfms=(source,), codec=codec)).failures
    return open_cache(root)


def train_batch(cache: CacheReader, codec: str) -> PointBatch:
    """Three rooms, two of them mixed, as the loader gives them."""
    (vfm,) = (spec.key for spec in cache.vfms.values() if spec.codec == codec)
    data = CachedDataset(cache, "train", grid_size=0.1, feat=("color",), vfm=vfm)
    plan = TrainPlan(sizes=(len(data),), batch_size=3, seed=0)
    (batch,) = BatchLoader(TrainBatches(data, seed=0, mix_prob=1.0), plan.batches(0, 1))
    assert batch.features is not None
    return batch


def expected_rows(cache: CacheReader, codec: str, features: FeatureRows) -> Tensor:
    (spec,) = (spec for spec in cache.vfms.values() if spec.codec == codec)
    scale = None if features.scale is None else features.scale.numpy()
    return torch.from_numpy(cache.codec(spec).decode(features.table.numpy(), scale))


@pytest.mark.parametrize("codec", [*CODECS, *EXTREMES])
def test_a_batch_decodes_as_the_codec_does(cache: CacheReader, codec: str) -> None:
    features = train_batch(cache, codec).features
    assert features is not None and features.dim == DIM
    expected = expected_rows(cache, codec, features)
    assert len(expected) > 100 and expected.std(dim=0).min() > 0.01
    everything = torch.arange(len(expected))
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(features.decode(everything), expected, **close)
    picked = torch.randperm(len(expected), generator=torch.Generator().manual_seed(0))[:50]
    buffer = torch.full((60, DIM), torch.nan)
    torch.testing.assert_close(features.decode(picked, buffer), expected[picked], **close)
    torch.testing.assert_close(features.decode(picked[:0], buffer), expected[:0], **close)


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("codec", [*CODECS, *EXTREMES])
def test_injection_learns_from_stored_rows_as_from_decoded_ones(cache: CacheReader, codec: str, pool: str) -> None:
    batch = train_batch(cache, codec)
    stored = batch.features
    assert stored is not None
    decoded = FeatureRows(table=expected_rows(cache, codec, stored), scale=None, index=stored.index)
    sites = torch.cat([batch.batch_index()[:, None].int(), batch.grid_coord], dim=1)
    torch.manual_seed(0)
    injection = Injection(InjectionConfig(pool=pool), DIM, (3, 4), (), norm_momentum=0.1)  # type: ignore[arg-type]
    for linear in injection.linears.values():
        torch.nn.init.normal_(linear.get_parameter("weight"))
    twin = copy.deepcopy(injection)
    coarse = torch.cat([sites[:, :1], sites[:, 1:] >> 1], dim=1).unique(dim=0)
    for module, features in ((injection, stored), (twin, decoded)):
        terms = module(features, GridHierarchy(sites))
        weight = torch.linspace(-1, 1, len(sites))[:, None]
        (terms.decoder(0, sites) * weight).sum().backward(retain_graph=True)
        terms.decoder(1, coarse).square().sum().backward()
    for (name, ours), theirs in zip(injection.named_parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and ours.grad.abs().max() > 0, name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3 * float(theirs.grad.abs().max()))


@pytest.mark.parametrize("codec", CODECS)
def test_a_batch_takes_along_what_its_rows_mean(cache: CacheReader, codec: str) -> None:
    features = train_batch(cache, codec).to("meta").features
    assert features is not None
    arrays = features.decoder.arrays
    assert bool(arrays) == codec.startswith("p") and all(array.is_meta for array in arrays.values())
    assert features.dim == DIM and features.decode(torch.arange(3, device="meta")).shape == (3, DIM)
