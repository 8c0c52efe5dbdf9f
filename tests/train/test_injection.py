from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ditr_cache.errors import DataError, MismatchError, UsageError
from ditr_train.data.sample import FeatureRows
from ditr_train.models import injection as injection_module
from ditr_train.models.config import InjectionConfig
from ditr_train.models.grid_hierarchy import GridHierarchy, morton_keys
from ditr_train.models.injection import Injection

DIM = 6
SKIPS = (3, 4, 5, 2)


def make_sites(seed: int = 0, count: int = 120, edge: int = 12) -> list[Tensor]:
    """Sites of four resolutions of two samples, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    finest = torch.randint(0, edge, (2 * count, 4), generator=generator)
    finest[:, 0] = torch.arange(2).repeat_interleave(count)
    finest = finest.unique(dim=0)
    levels = [torch.cat([finest[:, :1], finest[:, 1:] >> level], dim=1).unique(dim=0) for level in range(4)]
    return [sites[torch.randperm(len(sites), generator=generator)].int() for sites in levels]


def make_rows(num_points: int, codec: str = "int8", seed: int = 0, missing: float = 0.6) -> FeatureRows:
    generator = torch.Generator().manual_seed(seed)
    count = 50
    index = torch.randint(0, count, (num_points,), generator=generator)
    index[torch.rand(num_points, generator=generator) < missing] = -1
    if codec == "float16":
        return FeatureRows(table=torch.randn(count, DIM, generator=generator).half(), scale=None, index=index)
    table = torch.randint(-127, 128, (count, DIM), generator=generator, dtype=torch.int8)
    return FeatureRows(table=table, scale=torch.rand(count, generator=generator) * 0.05 + 0.01, index=index)


def make(sites_seed: int = 0, **settings_: object) -> Injection:
    torch.manual_seed(sites_seed)
    injection = Injection(InjectionConfig(**settings_), DIM, SKIPS, (), norm_momentum=0.1)  # type: ignore[arg-type]
    for linear in injection.linears.values():
        torch.nn.init.normal_(linear.weight)
    if injection.missing is not None:
        torch.nn.init.normal_(injection.missing)
    return injection


def inject(injection: Injection, rows: FeatureRows, sites: list[Tensor]) -> list[Tensor]:
    """The terms of the decoder."""
    injected = injection(rows, GridHierarchy(sites[0]))
    return [term for level, at in enumerate(sites) if (term := injected.decoder(level, at)) is not None]


def oracle(injection: Injection, rows: FeatureRows, sites: list[Tensor]) -> list[Tensor]:
    """Site by site: collect its points' features, pool them, then the plain layers."""
    features: dict[tuple[int, ...], Tensor] = {}
    for site, row in zip(sites[0].tolist(), rows.index.tolist(), strict=True):
        if row >= 0:
            value = rows.table[row].float()
            features[tuple(site)] = value if rows.scale is None else value * rows.scale[row]
    terms = []
    for level, level_sites in enumerate(sites):
        inside: dict[tuple[int, ...], list[Tensor]] = {}
        for (sample, *xyz), value in features.items():
            inside.setdefault((sample, *(c >> level for c in xyz)), []).append(value)
        seen = [i for i, site in enumerate(level_sites.tolist()) if tuple(site) in inside]
        stacks = [torch.stack(inside[tuple(level_sites[i].tolist())]) for i in seen]
        reduced = torch.stack([s.mean(dim=0) if injection.config.pool == "mean" else s.amax(dim=0) for s in stacks])
        linear, norm = injection.linears[f"{level}"], injection.norms[f"{level}"]
        if injection.missing is None:
            values = F.gelu(norm(linear(reduced)))
            term = torch.zeros(len(level_sites), values.shape[1]).index_copy(0, torch.tensor(seen), values)
        else:
            everywhere = injection.missing.expand(len(level_sites), -1).index_copy(0, torch.tensor(seen), reduced)
            term = F.gelu(norm(linear(everywhere)))
        terms.append(term)
    return terms


@pytest.mark.parametrize("portion", [None, 4 * DIM], ids=["whole", "portions"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("embedding", [False, True], ids=["zeros", "embedding"])
@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("codec", ["int8", "float16"])
def test_equals_a_loop_over_sites_with_gradients(
    codec: str, pool: str, embedding: bool, train: bool, portion: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if portion is not None:
        monkeypatch.setitem(injection_module._PORTION_ELEMENTS, "cpu", portion)
    sites = make_sites()
    rows = make_rows(len(sites[0]), codec)
    injection = make(pool=pool, missing_embedding=embedding).train(train)
    twin = copy.deepcopy(injection)
    terms, expected = inject(injection, rows, sites), oracle(twin, rows, sites)
    for term, level_sites, channels in zip(terms, sites, SKIPS, strict=True):
        assert term.shape == (len(level_sites), channels) and term.dtype == torch.float32
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(term.shape, generator=generator) for term in terms]
    for ours, theirs in zip(terms, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    sum((t * w).sum() for t, w in zip(terms, weights, strict=True)).backward()
    sum((t * w).sum() for t, w in zip(expected, weights, strict=True)).backward()
    for (name, ours), theirs in zip(injection.named_parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None, name
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(injection.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_unseen_points_neither_clamp_the_maximum_nor_dilute_the_mean() -> None:
    # Two neighbours in one coarse voxel, one of them without a feature; the other's are all negative.
    sites = [torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]]).int(), torch.tensor([[0, 0, 0, 0]]).int()]
    rows = FeatureRows(table=torch.full((1, DIM), -2.0).half(), scale=None, index=torch.tensor([0, -1]))
    for pool in ("mean", "max"):
        injection = Injection(InjectionConfig(pool=pool), DIM, (DIM, DIM), ()).eval()  # type: ignore[arg-type]
        torch.nn.init.eye_(injection.linears["1"].weight)
        expected = F.gelu(torch.full((1, DIM), -2.0) / (1 + 1e-3) ** 0.5)
        torch.testing.assert_close(inject(injection, rows, sites)[1], expected)


def test_sites_without_features_get_nothing_and_change_nothing() -> None:
    sites = make_sites()
    rows = make_rows(len(sites[0]))
    rows.index[sites[0][:, 0] == 1] = -1  # nothing seen in the second sample
    injection = make().train()
    terms = inject(copy.deepcopy(injection), rows, sites)
    for term, level_sites in zip(terms, sites, strict=True):
        assert not term[level_sites[:, 0] == 1].any()
    first = [level_sites[level_sites[:, 0] == 0] for level_sites in sites]
    alone = FeatureRows(table=rows.table, scale=rows.scale, index=rows.index[sites[0][:, 0] == 0])
    for term, level_sites, expected in zip(terms, sites, inject(injection, alone, first), strict=True):
        torch.testing.assert_close(term[level_sites[:, 0] == 0], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("embedding", [True, False])
def test_nothing_seen_at_all(train: bool, embedding: bool) -> None:
    sites = make_sites()
    rows = make_rows(len(sites[0]))
    rows.index.fill_(-1)
    injection = make(missing_embedding=embedding).train(train)
    terms = inject(injection, rows, sites)
    assert all(bool(torch.isfinite(term).all()) for term in terms)
    assert embedding or not any(bool(term.any()) for term in terms)
    sum(term.sum() for term in terms).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in injection.parameters())


def test_an_empty_table() -> None:
    sites = make_sites()
    rows = FeatureRows(
        table=torch.zeros(0, DIM, dtype=torch.int8), scale=torch.zeros(0), index=torch.full((len(sites[0]),), -1)
    )
    assert not any(bool(term.any()) for term in inject(make(), rows, sites))


def test_feature_drop_hides_points_in_training_only() -> None:
    sites = [torch.cartesian_prod(torch.tensor([0]), *[torch.arange(20)] * 3).int()]
    rows = make_rows(len(sites[0]), missing=0.0)
    injection = Injection(InjectionConfig(feature_drop=0.3), DIM, (8,), ())
    torch.manual_seed(0)
    seen = (inject(injection.train(), rows, sites)[0] != 0).any(dim=1)
    assert float(seen.float().mean()) == pytest.approx(0.7, abs=0.02)
    torch.manual_seed(0)
    assert torch.equal(seen, (inject(injection, rows, sites)[0] != 0).any(dim=1))
    assert bool((inject(injection.eval(), rows, sites)[0] != 0).any(dim=1).all())


def test_features_keep_their_precision_under_autocast() -> None:
    sites = make_sites()
    rows = make_rows(len(sites[0]))
    injection = make().eval()
    expected = inject(injection, rows, sites)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = inject(injection, rows, sites)
    assert all(torch.equal(a, b) for a, b in zip(terms, expected, strict=True))


def test_decoding_gives_back_what_was_stored() -> None:
    rows = make_rows(4)
    assert rows.scale is not None
    picked = torch.tensor([3, 0, 3])
    torch.testing.assert_close(rows.decode(picked), rows.table[picked].float() * rows.scale[picked, None])
    half = make_rows(4, "float16")
    assert torch.equal(half.decode(picked), half.table[picked].float())


axis = st.integers(0, 2**16 - 1)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 2**15 - 1), axis, axis, axis), min_size=1, max_size=30, unique=True))
def test_morton_keys_are_unique_and_know_their_parents(sites: list[tuple[int, int, int, int]]) -> None:
    finest = torch.tensor(sites)
    keys = morton_keys(finest)
    assert len(keys.unique()) == len(sites) and int(keys.min()) >= 0
    for level in (1, 4):
        coarse = torch.cat([finest[:, :1], finest[:, 1:] >> level], dim=1)
        assert torch.equal(keys >> (3 * level), morton_keys(coarse, level))


@pytest.mark.parametrize("site", [[0, 0, 65536, 0], [0, -1, 0, 0], [1 << 15, 0, 0, 0]])
def test_coordinates_beyond_the_keys_are_refused(site: list[int]) -> None:
    with pytest.raises(DataError, match="grid size"):
        morton_keys(torch.tensor([site]))


def test_rows_that_do_not_fit_are_refused() -> None:
    sites = make_sites()
    injection = Injection(InjectionConfig(), DIM + 1, SKIPS, ())
    with pytest.raises(MismatchError, match=r"7 channels.*6"):
        injection(make_rows(len(sites[0])), GridHierarchy(sites[0]))
    with pytest.raises(DataError, match="feature indices"):
        make()(make_rows(len(sites[0]) - 1), GridHierarchy(sites[0]))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [({"pool": "median"}, "mean.*max"), ({"feature_drop": 1.0}, "feature_drop"), ({"feature_drop": -0.1}, "drop")],
)
def test_bad_settings_are_refused(settings_: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        InjectionConfig(**settings_)
