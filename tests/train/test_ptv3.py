from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ditr_cache.errors import DataError, UsageError
from ditr_train.data.sample import PointBatch
from ditr_train.models.backbone import NoTerms
from ditr_train.models.ptv3 import PointTransformerV3
from ditr_train.models.ptv3_config import CURVES, VARIANTS, PTv3Config
from ditr_train.models.row_norm import RowNorm
from pointcept_reference import tensor_of

DATA = Path(__file__).parents[1] / "data/reference"
CASES: dict[str, Any] = json.loads((DATA / "ptv3.json").read_text())["cases"]
SMALL = PTv3Config(
    encoder_depths=(1, 2, 5), encoder_channels=(8, 12, 16), encoder_heads=(1, 2, 4), decoder_depths=(2, 1),
    decoder_channels=(12, 14), decoder_heads=(2, 2), patch_size=32,
)  # fmt: skip
SONATA = {
    "variant": "sonata", "encoder_depths": (3, 3, 3, 12, 3), "encoder_channels": (48, 96, 192, 384, 512),
    "encoder_heads": (3, 6, 12, 24, 32), "decoder_channels": (64, 96, 192, 384), "decoder_heads": (4, 6, 12, 24),
}  # fmt: skip
NO_DECODER: dict[str, Any] = {"decoder_depths": (), "decoder_channels": (), "decoder_heads": ()}


def surface(seed: int, count: int, edge: int) -> np.ndarray:
    """[n, 3] voxels of three walls that cross inside a cube, which reach its last voxel."""
    random = np.random.RandomState(seed)
    grid = random.randint(0, edge, (count, 3))
    wall = random.randint(0, 3, count)
    grid[np.arange(count), wall] = edge // 2 + 3 * (random.randint(0, 2, count))
    grid[0] = edge - 1
    grid = np.unique(np.minimum(grid, edge - 1), axis=0)
    return grid[random.permutation(len(grid))]


def batch_of(samples: Sequence[np.ndarray], in_channels: int = 6) -> PointBatch:
    """A batch of voxels [n, 3] with random input."""
    grid = torch.from_numpy(np.concatenate(samples)).int()
    feat = np.random.RandomState(7).uniform(-1.7, 1.7, (len(grid), in_channels)).astype(np.float32)
    return PointBatch(
        coord=grid * 0.02, grid_coord=grid, feat=torch.from_numpy(feat),
        offset=torch.tensor([len(s) for s in samples]).cumsum(0), segment=None, features=None,
        names=tuple("s" for _ in samples),
    )  # fmt: skip


def network(config: PTv3Config, in_channels: int = 6) -> PointTransformerV3:
    """In evaluation mode, with weights at which every layer matters."""
    net = PointTransformerV3(config, in_channels).eval()
    net.load_state_dict({name: tensor_of(name, tuple(value.shape)) for name, value in net.state_dict().items()})
    return net


def run(net: PointTransformerV3, batch: PointBatch, terms: Any = None) -> Tensor:
    return net(net.prepare(batch), batch.feat, NoTerms() if terms is None else terms)


MIXED = [surface(1, 400, 20), surface(2, 20, 17), surface(3, 90, 23), surface(4, 33, 18)]


# The published networks


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_published_code(case: str) -> None:
    """What Pointcept's and Sonata's code gave on a CPU for the same weights; float32 sums differ in their order."""
    config, in_channels = CASES[case]["config"], CASES[case]["in_channels"]
    batch = batch_of([surface(*sample) for sample in CASES[case]["samples"]], in_channels)
    with torch.no_grad():
        out = run(network(PTv3Config(**config), in_channels), batch)
    with np.load(DATA / "ptv3.npz") as stored:
        expected = torch.from_numpy(stored[case])
    assert expected.std() > 0.1
    rows = torch.linspace(0, len(out) - 1, len(expected)).round().long()
    torch.testing.assert_close(out[rows], expected, rtol=1e-4, atol=1e-4)


def test_parameters_of_the_published_base_network() -> None:
    net = PointTransformerV3(PTv3Config(), in_channels=6)
    assert sum(p.numel() for p in net.parameters()) == 46_166_272
    rates = [m.drop_rate for name, m in net.named_modules() if name.startswith("encoder") and hasattr(m, "drop_rate")]
    np.testing.assert_allclose(rates, np.linspace(0, 0.3, 14), atol=1e-7)
    rates = [net.decoder[str(level)].get_submodule(f"block{i}").drop_rate for level in range(4) for i in (1, 0)]
    np.testing.assert_allclose(rates, np.linspace(0, 0.3, 8), atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "channels"),
    [
        ({}, 64),  # ScanNet, ScanNet200, ScanNet++, S3DIS, nuScenes, Waymo, Matterport3D
        ({"patch_size": 128, "rpe": True}, 64),  # S3DIS with relative positions
        ({**SONATA, **NO_DECODER}, 1232),  # Sonata's linear probe
        (SONATA, 64),  # Sonata, Concerto base: decoder probe, fine-tuning, from scratch
        ({**SONATA, "decoder_depths": (3, 3, 3, 3)}, 64),  # Sonata with PPT
    ],
)  # fmt: skip
def test_published_tables(settings: dict[str, Any], channels: int) -> None:
    config = PTv3Config(**settings)
    assert config.out_channels == channels
    assert config.num_stages == 4
    assert config.encoder_terms == config.encoder_channels
    assert PTv3Config(**json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "ptv2"}, "backbone.variant"),
        ({"encoder_depths": (2,)}, "backbone.encoder_depths must list at least two"),
        ({"encoder_channels": (32, 64)}, "backbone.encoder_channels must have 5 entries"),
        ({"encoder_heads": (3, 4, 8, 16, 32)}, "backbone.encoder_channels must be multiples"),
        ({"decoder_depths": (2, 2, 2)}, "backbone.decoder_depths must have 4 entries"),
        ({"decoder_depths": ()}, "backbone.decoder_channels must have 0 entries"),
        ({"decoder_depths": (2, 2, 0, 2)}, "backbone.decoder_depths must be positive"),
        ({"patch_size": 0}, "backbone.patch_size"),
        ({"mlp_ratio": 0.0}, "backbone.mlp_ratio"),
        ({"drop_path": 1.0}, "backbone.drop_path"),
        ({"orders": ("peano",)}, "backbone.orders"),
        ({"orders": ()}, "backbone.orders"),
        ({"norm_eps": 0.0}, "backbone.norm_eps"),
        ({"norm_momentum": 0.0}, "backbone.norm_momentum"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        PTv3Config(**settings)


# Geometry


def test_sites_and_parents_are_the_voxels_of_each_resolution() -> None:
    batch = batch_of(MIXED)
    prepared = network(SMALL).prepare(batch)
    sites = torch.cat([batch.batch_index()[:, None], batch.grid_coord], dim=1)
    assert torch.equal(prepared.resolutions[0].sites.long(), sites)
    for level, (finer, coarser) in enumerate(zip(prepared.resolutions, prepared.resolutions[1:], strict=False)):
        wanted = torch.cat([sites[:, :1], sites[:, 1:] >> (level + 1)], dim=1).unique(dim=0)
        assert torch.equal(coarser.sites.unique(dim=0).long(), wanted) and len(coarser.sites) == len(wanted)
        around = torch.cat([finer.sites[:, :1], finer.sites[:, 1:] >> 1], dim=1)
        assert torch.equal(coarser.sites[finer.parent], around)
    assert prepared.resolutions[-1].parent is None
    occupied = prepared.hierarchy.occupied(torch.ones(len(sites), dtype=torch.bool), 3)
    assert occupied.sizes == [len(resolution.sites) for resolution in prepared.resolutions]
    for level, resolution in enumerate(prepared.resolutions[1:], start=1):
        assert sorted(occupied.places(level, resolution.sites).tolist()) == list(range(len(resolution.sites)))


def test_points_beyond_the_curves_are_refused() -> None:
    with pytest.raises(DataError, match="voxel coordinates must be below 65536, got 65536"):
        network(SMALL).prepare(batch_of([np.array([[0, 0, 0], [0, 0, 1 << 16]])]))


# Samples and points


@pytest.mark.parametrize("settings", [{}, {"rpe": True}, {"variant": "sonata"}, {"variant": "ptv3-v1.5.1"}], ids=str)
@torch.no_grad()
def test_a_sample_gets_the_same_in_every_batch(settings: dict[str, Any]) -> None:
    net = network(replace(SMALL, **settings))
    samples = [*MIXED, np.array([[5, 0, 9]]), surface(5, 60, 40)]
    batch = batch_of(samples)
    together = run(net, batch).split([len(s) for s in samples])
    for sample, feat, out in zip(samples, batch.feat.split([len(s) for s in samples]), together, strict=True):
        alone = replace(batch_of([sample]), feat=feat)
        torch.testing.assert_close(run(net, alone), out, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_the_order_of_points_is_of_no_effect() -> None:
    net, batch = network(SMALL), batch_of([MIXED[0]])
    order = torch.randperm(len(batch.feat), generator=torch.Generator().manual_seed(0))
    shuffled = replace(batch, grid_coord=batch.grid_coord[order], feat=batch.feat[order])
    torch.testing.assert_close(run(net, shuffled), run(net, batch)[order], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_single_point_trains(variant: str) -> None:
    torch.manual_seed(0)
    net = PointTransformerV3(replace(SMALL, variant=variant), 6).train()
    out = run(net, batch_of([np.array([[0, 0, 0]])]))
    out.sum().backward()
    assert out.shape == (1, 12) and out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


# Training


def parts(prepared: Any) -> Iterator[list[int]]:
    for resolution in prepared.resolutions:
        for patches in resolution.patches:
            yield patches.rows.tolist()


def test_orders_are_shuffled_in_training_only() -> None:
    net, batch = network(SMALL), batch_of([MIXED[0]])
    state = torch.get_rng_state()
    evaluated = list(parts(net.prepare(batch)))
    assert list(parts(net.prepare(batch))) == evaluated
    assert torch.equal(torch.get_rng_state(), state), "evaluation draws no numbers"
    fixed = PointTransformerV3(replace(SMALL, shuffle_orders=False), 6).train()
    assert list(parts(fixed.prepare(batch))) == evaluated

    net.train()
    torch.manual_seed(0)
    draws = [list(parts(net.prepare(batch))) for _ in range(24)]
    torch.manual_seed(0)
    assert list(parts(net.prepare(batch))) == draws[0]
    finest = {tuple(draw[0]) for draw in draws}
    assert len(finest) == len(CURVES), "every curve comes first now and then"
    coarsest = {tuple(map(tuple, draw[-len(CURVES) :])) for draw in draws}
    assert len(coarsest) > len(CURVES), "the resolutions are shuffled each on its own"


def test_drop_path_leaves_out_rows() -> None:
    block = PointTransformerV3(replace(SMALL, drop_path=0.4), 6).train().get_submodule("encoder.2.block4")
    torch.manual_seed(0)
    dropped = block._drop(torch.ones(20_000, 3))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.6])
    assert torch.equal(dropped.amin(dim=1), dropped.amax(dim=1))
    assert dropped.mean() == pytest.approx(1, abs=0.03)
    assert torch.equal(block.eval()._drop(torch.ones(5, 3)), torch.ones(5, 3))


def test_names_and_initial_weights() -> None:
    torch.manual_seed(0)
    published, sonata = (PointTransformerV3(replace(SMALL, variant=v), 6) for v in ("ptv3", "sonata"))
    inner = ("cpe", "norm1", "attention", "norm2", "mlp")
    for name, _ in published.named_parameters():
        assert ("block" in name) == (re.search(r"^(en|de)coder\.\d\.block\d\.(\w+)", name) is not None)
        assert "block" not in name or name.split(".")[3] in inner
    weight = published.get_parameter("encoder.2.block0.mlp.fc2.weight")
    assert weight.abs().max() <= weight.shape[1] ** -0.5, "torch's own"
    assert isinstance(published.embedding.norm, RowNorm)
    assert (published.embedding.norm.eps, published.embedding.norm.momentum) == (1e-3, 0.01)
    assert not any(isinstance(m, RowNorm) for m in sonata.modules())
    for name, value in sonata.named_parameters():
        if value.ndim > 1:
            assert value.std().item() == pytest.approx(0.02, rel=0.3), name
        elif name.endswith("bias"):
            assert not value.any(), name


# Injection


class Record:
    """Terms that are random numbers, and what was asked."""

    def __init__(self, config: PTv3Config, only: str | None = None) -> None:
        self.channels = {"encoder": config.encoder_terms, "decoder": config.decoder_terms}
        self.only = only
        self.asked: list[str] = []
        self.sites: dict[str, Tensor] = {}
        self.given: dict[str, Tensor] = {}

    def encoder(self, level: int, sites: Tensor) -> Tensor | None:
        return self._answer("encoder", level, sites)

    def decoder(self, level: int, sites: Tensor) -> Tensor | None:
        return self._answer("decoder", level, sites)

    def _answer(self, branch: str, level: int, sites: Tensor) -> Tensor | None:
        place = f"{branch}.{level}"
        self.asked.append(place)
        self.sites[place] = sites
        if self.only not in (None, place):
            return None
        generator = torch.Generator().manual_seed(level)
        term = torch.randn(len(sites), self.channels[branch][level], generator=generator)
        self.given[place] = term.requires_grad_()
        return self.given[place]


PLACES = ("encoder.0", "encoder.1", "encoder.2", "decoder.1", "decoder.0")


def test_terms_are_asked_once_for_the_sites_of_each_resolution() -> None:
    net, batch = network(SMALL), batch_of(MIXED)
    prepared, terms = net.prepare(batch), Record(SMALL)
    net(prepared, batch.feat, terms)
    assert tuple(terms.asked) == PLACES
    for place, sites in terms.sites.items():
        assert torch.equal(sites, prepared.resolutions[int(place[-1])].sites)


@pytest.mark.parametrize("variant", ["ptv3", "sonata"])
@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_a_term_is_added_before_the_blocks_of_its_stage(place: str, variant: str) -> None:
    net, batch = network(replace(SMALL, variant=variant)), batch_of(MIXED)
    seen: list[tuple[Tensor, Tensor]] = []
    stage = net.get_submodule(place)
    stage.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0], inputs[2])))
    plain = run(net, batch)
    terms = Record(SMALL, only=place)
    injected = run(net, batch, terms)
    (without, conv_without), (with_term, conv_with) = seen
    torch.testing.assert_close(with_term, without + terms.given[place])
    # As published, the first convolution of ptv3's decoder sees the skip alone.
    unseen = place.startswith("decoder") and variant == "ptv3"
    torch.testing.assert_close(conv_with, conv_without if unseen else with_term)
    assert (injected - plain).abs().max() > 1e-3


def test_gradients_reach_all_terms_and_weights() -> None:
    torch.manual_seed(0)
    net, batch, terms = network(SMALL).train(), batch_of(MIXED), Record(SMALL)
    run(net, batch, terms).square().sum().backward()
    for place in PLACES:
        grad = terms.given[place].grad
        assert grad is not None and grad.abs().sum() > 0, place
    # A bias before a batch norm has a gradient of rounding errors; so it is enough that there is one.
    assert all(p.grad is not None for p in net.parameters())


@torch.no_grad()
def test_without_a_decoder_the_output_is_all_resolutions() -> None:
    config = replace(SMALL, variant="sonata", **NO_DECODER)
    net, batch = network(config), batch_of(MIXED)
    terms, outputs = Record(config), []
    for stage in net.encoder.values():
        stage.register_forward_hook(lambda _, __, out: outputs.append(out))
    out = run(net, batch, terms)
    assert terms.asked == ["encoder.0", "encoder.1", "encoder.2"]
    assert out.shape[1] == config.out_channels == 8 + 12 + 16 and config.decoder_terms == ()
    finest, middle, coarsest = net.prepare(batch).resolutions
    assert torch.equal(out[:, :8], outputs[0])
    assert torch.equal(out[:, 8:20], outputs[1][finest.parent])
    assert torch.equal(out[:, 20:], outputs[2][middle.parent][finest.parent])
    assert coarsest.parent is None


# GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("variant", VARIANTS)
def test_gpu_agrees_with_cpu(variant: str) -> None:
    net, batch = network(replace(SMALL, variant=variant)), batch_of(MIXED)
    with torch.no_grad():
        expected = run(net, batch)
        net, batch = net.cuda(), batch.to("cuda")
        torch.testing.assert_close(run(net, batch).cpu(), expected, rtol=1e-3, atol=1e-3)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype):
            out = run(net.train(), batch, None)
        out.float().square().mean().backward()
        assert out.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
