from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ditr_cache.errors import DataError, UsageError
from ditr_train.data.sample import PointBatch
from ditr_train.models.backbone import NoTerms
from ditr_train.models.pointnext import PointNeXt
from ditr_train.models.pointnext_config import PointNeXtConfig
from ditr_train.models.row_norm import RowNorm

REFERENCE = Path(__file__).parents[1] / "data" / "reference" / "pointnext.npz"
SMALL = PointNeXtConfig(size="L", width=8, blocks=(1, 2), strides=(4, 3), radius=0.15, num_neighbors=8)
RESIDUAL = PointNeXtConfig(size="S", width=8, blocks=(0, 0), strides=(4, 3), radius=0.15, num_neighbors=8)
both = pytest.mark.parametrize("config", [SMALL, RESIDUAL], ids=["blocks", "residual"])


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


def batch_of(*sizes: int, seed: int = 0, channels: int = 4) -> PointBatch:
    """Samples of random points in a flat box, each of a seed of its own."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(sizes))]
    pairs = list(zip(sizes, generators, strict=True))
    coord = torch.cat([torch.rand(n, 3, generator=g) * torch.tensor([1.0, 1, 0.2]) for n, g in pairs])
    return PointBatch(
        coord=coord,
        grid_coord=(coord / 0.001).int(),
        feat=torch.cat([torch.randn(n, channels, generator=g) for n, g in pairs]),
        offset=torch.tensor(sizes).cumsum(0),
        segment=None,
        features=None,
        names=tuple(f"sample{i}" for i in range(len(sizes))),
    )


def permuted(batch: PointBatch, order: Tensor) -> PointBatch:
    """The points of a batch of one sample in another order."""
    taken = {key: getattr(batch, key)[order] for key in ("coord", "grid_coord", "feat")}
    return PointBatch(**taken, offset=batch.offset, segment=None, features=None, names=batch.names)


def distinct_weights(net: nn.Module) -> None:
    """Weights and statistics that depend on their name and shape alone, at a scale at which every layer matters."""
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if not tensor.is_floating_point():
                continue
            values = np.random.default_rng(zlib.crc32(name.encode())).random(tuple(tensor.shape))
            if "running_var" in name:
                values = 0.5 + values
            elif tensor.ndim == 2:
                values = (2 * values - 1) * np.sqrt(3 / tensor.shape[1])
            elif "norm" in name and name.endswith("weight"):
                values = 0.8 + 0.4 * values
            else:
                values = 0.4 * values - 0.2
            tensor.copy_(torch.from_numpy(values))


def network(config: PointNeXtConfig, *, train: bool = False) -> PointNeXt:
    net = PointNeXt(config, 4).train(train)
    distinct_weights(net)
    return net


def run(net: PointNeXt, batch: PointBatch, terms: Any = None) -> Tensor:
    return net(net.prepare(batch), batch.feat, terms or NoTerms())


# --- against the published network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("size", "blocks"), [("S", (0, 0)), ("L", (2, 1))])
def test_agrees_with_openpoints(size: Any, blocks: tuple[int, ...], train: bool) -> None:
    """Outputs and gradients of openpoints' encoder and decoder with the same weights, in float32 on a CPU.

    Its CUDA operations were stood in for by plain torch, ball query with the nearest points as ours. On whole scenes
    in float64 both agree to 1e-11 in training, too.
    """
    config = PointNeXtConfig(size=size, width=8, blocks=blocks, strides=(4, 4), radius=0.08, num_neighbors=16)
    net = network(config, train=train)
    with np.load(REFERENCE, allow_pickle=False) as stored:
        arrays = {key: torch.from_numpy(stored[key]) for key in stored}
    batch = batch_of(300, 300)
    batch.coord, batch.feat = arrays["coord"], arrays["feat"].requires_grad_()
    out = run(net, batch)
    expected = arrays[f"{size}_{'train' if train else 'eval'}"]
    torch.testing.assert_close(out, expected, rtol=0, atol=3e-4 if train else 2e-6)
    weights = np.random.default_rng(5).random(tuple(out.shape)).astype(np.float32) - 0.5
    (out * torch.from_numpy(weights)).sum().backward()
    expected = arrays[f"{size}_{'train' if train else 'eval'}_grad"]
    torch.testing.assert_close(batch.feat.grad, expected, rtol=0, atol=1e-3 if train else 2e-6)


@pytest.mark.parametrize(("size", "millions"), [("S", 0.792), ("B", 3.828), ("L", 7.125), ("XL", 41.576)])
def test_has_as_many_parameters_as_published(size: Any, millions: float) -> None:
    """The figures published with the configurations, of 4 input channels and a head for S3DIS' 13 classes."""
    with torch.device("meta"):
        net = PointNeXt(PointNeXtConfig(size=size), 4)
    width = net.out_channels
    head = width * width + 2 * width + width * 13 + 13
    parameters = sum(parameter.numel() for parameter in net.parameters())
    assert round((parameters + head) / 1e6, 3) == millions


# --- geometry -------------------------------------------------------------------------------------------------------


def test_geometry_agrees_with_its_definitions() -> None:
    batch = batch_of(60, 7, 35)
    prepared = PointNeXt(SMALL, 4).prepare(batch)
    finer_samples = batch.batch_index()
    assert [len(coord) for coord in prepared.coords] == [102, 15 + 1 + 8, 5 + 1 + 2]
    for level, stage in enumerate(prepared.stages):
        finer, coord = (c.double() for c in prepared.coords[level : level + 2])
        samples = finer_samples[stage.kept]
        assert torch.equal(prepared.coords[level + 1], prepared.coords[level][stage.kept])
        between = torch.cdist(coord, finer).masked_fill(samples[:, None] != finer_samples, torch.inf)
        among = torch.cdist(coord, coord).masked_fill(samples[:, None] != samples, torch.inf)
        assert stage.around is not None
        for found, distances, support, radius in (
            (stage.down, between, finer, SMALL.radii[level]),
            (stage.around, among, coord, SMALL.radii[level + 1]),
        ):
            nearest, rows = distances.sort(dim=1)
            for i in range(len(coord)):
                inside = rows[i, :8][nearest[i, :8] < radius]
                assert set(found.index[i].tolist()) == set(inside.tolist())
                assert found.index[i, 0] == inside[0]
                offset = (support[found.index[i]] - coord[i]) / radius
                torch.testing.assert_close(found.offset[i].double(), offset, rtol=0, atol=1e-5)
        for i, distances in enumerate(between.T):
            weights = torch.zeros(len(coord), dtype=torch.float64)
            for row in distances.argsort()[:3].tolist():
                weights[row] = 1 / (distances[row] + 1e-8)
            found = torch.zeros_like(weights).index_add(0, stage.up_index[i], stage.up_weight[i].double())
            torch.testing.assert_close(found, weights / weights.sum(), rtol=0, atol=1e-5)
            assert stage.up_index[i, 0] == distances.argmin()
        finer_samples = samples


def test_every_point_belongs_to_the_nearest_point_kept() -> None:
    batch = batch_of(60, 35)
    prepared = PointNeXt(SMALL, 4).prepare(batch)
    seen = torch.zeros(95, dtype=torch.bool)
    seen[::7] = True
    occupied = prepared.hierarchy.occupied(seen, 3)
    at = {row: row for row in seen.nonzero().flatten().tolist()}
    samples = batch.batch_index()
    for level in range(2):
        coord, finer = prepared.coords[level + 1], prepared.coords[level]
        coarser_samples = samples[prepared.stages[level].kept]
        for point, site in at.items():
            distances = (coord - finer[site]).norm(dim=1).masked_fill(coarser_samples != samples[site], torch.inf)
            at[point] = int(distances.argmin())
        samples = coarser_samples
        assert occupied.places(level + 1, coord).tolist() == sorted(set(at.values()))


def test_refuses_points_that_are_nowhere() -> None:
    batch = batch_of(5, 4)
    batch.coord[3, 1] = torch.nan
    with pytest.raises(DataError, match="sample0, sample1"):
        PointNeXt(SMALL, 4).prepare(batch)


# --- the network ----------------------------------------------------------------------------------------------------


@both
def test_samples_of_a_batch_do_not_see_each_other(config: PointNeXtConfig) -> None:
    net, sizes = network(config), (80, 1, 0, 5, 60)
    together = run(net, batch_of(*sizes)).split(sizes)
    for i, size in enumerate(sizes):
        if size:
            torch.testing.assert_close(together[i], run(net, batch_of(size, seed=i)), rtol=0, atol=1e-5)


@both
def test_the_order_of_points_matters_by_the_first_alone(config: PointNeXtConfig) -> None:
    net, batch = network(config), batch_of(90)
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(89)])
    torch.testing.assert_close(run(net, permuted(batch, order)), run(net, batch)[order], rtol=0, atol=1e-5)
    moved = torch.arange(90).roll(1)
    assert not torch.allclose(run(net, permuted(batch, moved)), run(net, batch)[moved], rtol=0, atol=1e-5)


@both
def test_places_enter_relative_to_one_another(config: PointNeXtConfig) -> None:
    net, batch = network(config), batch_of(90)
    out = run(net, batch)
    batch.coord = batch.coord + torch.tensor([1.0, -2.0, 3.0])
    torch.testing.assert_close(run(net, batch), out, rtol=0, atol=1e-3)


@both
@pytest.mark.parametrize("sizes", [(1,), (1, 1), (3,), (2, 1, 5)])
def test_tiny_samples(config: PointNeXtConfig, sizes: tuple[int, ...]) -> None:
    net, batch = network(config, train=True), batch_of(*sizes)
    out = run(net, batch)
    out.sum().backward()
    assert out.shape == (sum(sizes), 8) and out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@both
def test_every_weight_learns_and_every_point_is_heard(config: PointNeXtConfig) -> None:
    net, batch = network(config, train=True), batch_of(200, 150)
    batch.feat.requires_grad_()
    out = run(net, batch)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not silent
    assert (batch.feat.grad.abs().amax(dim=1) > 0).all()


class Recorder:
    """Terms of given values that note what they are asked."""

    def __init__(self, encoder: dict[int, Tensor] | None = None, decoder: dict[int, Tensor] | None = None) -> None:
        self.values = {"encoder": encoder or {}, "decoder": decoder or {}}
        self.asked: list[tuple[str, int, Tensor]] = []

    def encoder(self, level: int, sites: Tensor) -> Tensor | None:
        self.asked.append(("encoder", level, sites))
        return self.values["encoder"].get(level)

    def decoder(self, level: int, sites: Tensor) -> Tensor | None:
        self.asked.append(("decoder", level, sites))
        return self.values["decoder"].get(level)


def captured(module: nn.Module, where: str) -> list[Any]:
    """The inputs (before) or the output (after) of a module, in the next forward pass."""
    seen: list[Any] = []
    if where == "after":
        module.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    else:
        module.register_forward_hook(lambda _module, inputs, _out: seen.extend(inputs))
    return seen


def test_terms_are_asked_once_for_every_resolution() -> None:
    net, batch = network(SMALL), batch_of(60, 35)
    prepared, terms = net.prepare(batch), Recorder()
    net(prepared, batch.feat, terms)
    assert [ask[:2] for ask in terms.asked] == [("encoder", level) for level in (0, 1, 2)] + [
        ("decoder", level) for level in (1, 0)
    ]
    assert all(torch.equal(sites, prepared.coords[level]) for _, level, sites in terms.asked)


def test_terms_of_the_encoder_enter_before_the_blocks() -> None:
    net, batch = network(SMALL), batch_of(60, 35)
    prepared = net.prepare(batch)
    counts = [len(coord) for coord in prepared.coords]
    values = {level: torch.randn(counts[level], SMALL.encoder_terms[level]) for level in range(3)}
    stem, first = captured(net.stem, "after"), captured(net.abstractions[0], "before")
    abstracted = [captured(abstraction, "after") for abstraction in net.abstractions]
    blocks = [captured(stage[0], "before") for stage in net.blocks]
    net(prepared, batch.feat, Recorder(encoder=values))
    torch.testing.assert_close(first[0], stem[0] + values[0])
    for stage in range(2):
        torch.testing.assert_close(blocks[stage][0], abstracted[stage][0] + values[stage + 1])


def test_terms_of_the_decoder_enter_with_the_skips() -> None:
    net, batch = network(SMALL), batch_of(60, 35)
    prepared = net.prepare(batch)
    counts = [len(coord) for coord in prepared.coords]
    values = {level: torch.randn(counts[level], SMALL.decoder_terms[level]) for level in range(2)}
    stem, block = captured(net.stem, "after"), captured(net.blocks[0][-1], "after")
    read = [captured(propagation, "before") for propagation in net.propagations]
    below = captured(net.abstractions[1], "before")
    net(prepared, batch.feat, Recorder(decoder=values))
    torch.testing.assert_close(read[0][0], stem[0] + values[0])
    torch.testing.assert_close(read[1][0], block[0] + values[1])
    assert torch.equal(below[0], block[0])  # the encoder itself goes on without them


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_terms_keep_the_precision_of_autocast(dtype: torch.dtype) -> None:
    net, batch = network(SMALL, train=True), batch_of(60, 35)
    prepared = net.prepare(batch)
    values = {0: torch.randn(95, 8, requires_grad=True)}
    read = captured(net.propagations[0], "before")
    with torch.autocast("cpu", dtype):
        out = net(prepared, batch.feat, Recorder(values, values))
    assert read[0].dtype == read[1].dtype == dtype
    torch.testing.assert_close(out.float(), net(prepared, batch.feat, Recorder(values, values)), rtol=0, atol=0.5)
    out.float().sum().backward()
    assert values[0].grad is not None and values[0].grad.isfinite().all()


def test_names_and_norms() -> None:
    """Recipes tell blocks by their name; weights begin as torch's own."""
    net = PointNeXt(PointNeXtConfig(size="B", width=8, norm_eps=1e-4, norm_momentum=0.2), 4)
    assert {name.split(".")[0] for name, _ in net.named_parameters() if "block" in name} == {"blocks"}
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm1d)]
    assert all(isinstance(norm, RowNorm) and (norm.eps, norm.momentum) == (1e-4, 0.2) for norm in norms)
    weight = net.propagations[0].linear1.weight
    assert weight.abs().max() <= weight.shape[1] ** -0.5 and weight.std() > 0.5 * weight.shape[1] ** -0.5


# --- settings -------------------------------------------------------------------------------------------------------


def test_a_size_gives_the_settings_that_are_not_given() -> None:
    config = PointNeXtConfig(size="XL")
    assert config.channels == config.encoder_terms == (64, 128, 256, 512, 1024)
    assert config.decoder_terms == (64, 128, 256, 512) and config.out_channels == 64
    assert config.stage_blocks == (3, 6, 3, 3) and config.num_stages == 4
    assert (config.layers_of_abstraction, config.residual_of_abstraction) == (1, False)
    assert config.radii == (0.1, 0.2, 0.4, 0.8, 1.6)
    small = PointNeXtConfig(size="S")
    assert (small.layers_of_abstraction, small.residual_of_abstraction) == (2, True)
    for_scannet = PointNeXtConfig(size="S", abstraction_layers=3, abstraction_residual=False, radius=0.05)
    assert (for_scannet.layers_of_abstraction, for_scannet.residual_of_abstraction) == (3, False)
    assert PointNeXtConfig(blocks=[1, 0], strides=[2, 2], width=6).stage_blocks == (1, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"size": "M"}, "size"),
        ({"strides": ()}, "strides"),
        ({"strides": (4, 1, 4, 4)}, "strides"),
        ({"strides": (4, 4)}, "blocks"),
        ({"blocks": (1, 1, -1, 1)}, "blocks"),
        ({"width": 0}, "width"),
        ({"abstraction_layers": 0}, "abstraction_layers"),
        ({"num_neighbors": 0}, "num_neighbors"),
        ({"expansion": 0}, "expansion"),
        ({"radius": 0.0}, "radius"),
        ({"radius_scaling": -1.0}, "radius_scaling"),
        ({"norm_eps": 0.0}, "norm_eps"),
        ({"norm_momentum": 1.5}, "norm_momentum"),
    ],
)
def test_refuses_settings_out_of_range(setting: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=rf"backbone\.{named} "):
        PointNeXtConfig(**setting)
