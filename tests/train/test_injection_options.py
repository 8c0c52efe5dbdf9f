from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ditr_cache.errors import UsageError
from ditr_train.data.sample import FeatureRows, PointBatch
from ditr_train.models import injection as injection_module
from ditr_train.models.build import build_segmentor
from ditr_train.models.config import InjectionConfig, ModelConfig
from ditr_train.models.grid_hierarchy import GridHierarchy
from ditr_train.models.injection import InjectedTerms, Injection
from ditr_train.models.segmentor import Segmentor
from ditr_train.models.sparse_unet_config import SparseUNetConfig
from ditr_train.recipe_files import load_recipe, read_recipe

DIM = 5
DECODER, ENCODER = (3, 4, 5, 2), (3, 4, 5, 2, 6)
BACKBONE = SparseUNetConfig(
    stem_channels=4, channels=(4, 6, 8, 8, 8, 6, 6, 5), layers=(1,) * 8, norm_momentum=0.1, stem_kernel_size=3
)
EVERYWHERE = {"decoder": (0, 2, 3), "encoder": (0, 1, 4), "input": True, "input_channels": 7}


def random_sites(seed: int, count: int = 90, edge: int = 20) -> list[Tensor]:
    """Sites of five resolutions of two samples, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    finest = torch.randint(0, edge, (2 * count, 4), generator=generator)
    finest[:, 0] = torch.arange(2).repeat_interleave(count)
    finest = finest.unique(dim=0)
    levels = [torch.cat([finest[:, :1], finest[:, 1:] >> level], dim=1).unique(dim=0) for level in range(5)]
    return [sites[torch.randperm(len(sites), generator=generator)].int() for sites in levels]


def random_rows(num_points: int, seed: int = 0, coverage: float = 0.4) -> FeatureRows:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 30, (num_points,), generator=generator)
    index[torch.rand(num_points, generator=generator) >= coverage] = -1
    table = torch.randint(-127, 128, (30, DIM), generator=generator, dtype=torch.int8)
    return FeatureRows(table=table, scale=torch.rand(30, generator=generator) * 0.05 + 0.01, index=index)


def make(**options: object) -> Injection:
    torch.manual_seed(0)
    injection = Injection(InjectionConfig(**options), DIM, DECODER, ENCODER, norm_momentum=0.1)  # type: ignore[arg-type]
    for parameter in injection.parameters():
        torch.nn.init.normal_(parameter)
    return injection


def inject(injection: Injection, rows: FeatureRows, sites: list[Tensor]) -> dict[str, Tensor]:
    """Every term, in the order in which a U-Net asks."""
    injected: InjectedTerms = injection(rows, GridHierarchy(sites[0]))
    appended = injected.input(torch.zeros(len(sites[0]), 1, device=rows.table.device))[:, 1:]
    terms = {"input": appended} if appended.shape[1] else {}
    for level, at in enumerate(sites):
        if (term := injected.encoder(level, at)) is not None:
            terms[f"encoder{level}"] = term
    for level, at in reversed(list(enumerate(sites[:-1]))):
        if (term := injected.decoder(level, at)) is not None:
            terms[f"{level}"] = term
    return terms


def pooled_by_loops(pool: str, rows: FeatureRows, finest: Tensor, sites: Tensor, level: int) -> list[tuple]:
    """For every site, in order: its pooled feature (None without any) and the share of its points that has one."""
    pooled = []
    for sample, *corner in sites.tolist():
        inside = [
            row
            for (b, *xyz), row in zip(finest.tolist(), rows.index.tolist(), strict=True)
            if b == sample and [c // 2**level for c in xyz] == corner
        ]
        seen = [rows.table[r].float() * rows.scale[r] for r in inside if r >= 0]  # type: ignore[index]
        share = len(seen) / len(inside)
        if pool == "zero_max":
            everything = seen + [torch.zeros(DIM)] * (len(inside) - len(seen))
            pooled.append((torch.stack(everything).amax(dim=0), share))
        elif not seen:
            pooled.append((None, share))
        else:
            stack = torch.stack(seen)
            pooled.append((stack.sum(dim=0) / len(seen) if pool == "mean" else stack.amax(dim=0), share))
    return pooled


def term_by_loops(injection: Injection, place: str, pooled: list[tuple]) -> Tensor:
    config = injection.config
    inputs, kept = [], []
    for i, (feature, share) in enumerate(pooled):
        if feature is None and injection.missing is not None:
            feature = injection.missing
        elif feature is None and config.visibility_flag:
            feature = torch.zeros(DIM)
        if feature is not None:
            inputs.append(torch.cat([feature, torch.tensor([share])]) if config.visibility_flag else feature)
            kept.append(i)
    norm = injection.norms[place]
    out = torch.zeros(len(pooled), norm.num_features)
    if kept:
        out[kept] = F.gelu(norm(torch.stack(inputs) @ injection.linears[place].weight.T))
    return out


POOLS = {
    f"{pool}{'-missing' * missing}{'-flag' * flag}": {
        "pool": pool, "missing_embedding": missing, "visibility_flag": flag
    }
    for pool in ("mean", "max", "zero_max") for missing in (False, True) for flag in (False, True)
    if not (pool == "zero_max" and missing)
}  # fmt: skip
each_pool = pytest.mark.parametrize("options", POOLS.values(), ids=POOLS)


@each_pool
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("portion", [None, 3 * DIM], ids=["whole", "portions"])
def test_every_place_equals_a_loop_over_sites_with_gradients(
    options: dict, train: bool, portion: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if portion is not None:
        monkeypatch.setitem(injection_module._PORTION_ELEMENTS, "cpu", portion)
    sites = random_sites(1)
    rows = random_rows(len(sites[0]))
    injection = make(**EVERYWHERE, **options).train(train)
    twin = copy.deepcopy(injection)
    terms = inject(injection, rows, sites)
    assert set(terms) == {"input", "encoder0", "encoder1", "encoder4", "0", "2", "3"}
    pooled = [pooled_by_loops(injection.config.pool, rows, sites[0], at, level) for level, at in enumerate(sites)]
    expected = {place: term_by_loops(twin, place, pooled[injection.levels[place]]) for place in terms}
    generator = torch.Generator().manual_seed(3)
    ours, theirs = torch.zeros(()), torch.zeros(())
    for place, term in terms.items():
        torch.testing.assert_close(term, expected[place], atol=3e-5, rtol=3e-5)
        weights = torch.randn(term.shape, generator=generator)
        ours, theirs = ours + (term * weights).sum(), theirs + (expected[place] * weights).sum()
    ours.backward()
    theirs.backward()
    for (name, a), b in zip(injection.named_parameters(), twin.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None, name
        torch.testing.assert_close(a.grad, b.grad, atol=2e-4, rtol=2e-4)
    for a, b in zip(injection.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 999), coverage=st.floats(0, 1), count=st.integers(1, 40), edge=st.integers(1, 9),
    options=st.sampled_from(list(POOLS.values())),
)  # fmt: skip
def test_pooling_equals_a_loop_for_any_coverage(
    seed: int, coverage: float, count: int, edge: int, options: dict
) -> None:
    sites = random_sites(seed, count, edge)
    rows = random_rows(len(sites[0]), seed, coverage)
    injection = make(decoder=(1, 3), encoder=(2,), **options).eval()
    for place, term in inject(injection, rows, sites).items():
        level = injection.levels[place]
        pooled = pooled_by_loops(injection.config.pool, rows, sites[0], sites[level], level)
        torch.testing.assert_close(term, term_by_loops(injection, place, pooled), atol=1e-5, rtol=1e-5)


@each_pool
def test_gradients_are_those_of_finite_differences(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        decode = FeatureRows.decode
        monkeypatch.setattr(FeatureRows, "decode", lambda f, r, _: decode(f, r).double())
        monkeypatch.setitem(injection_module._PORTION_ELEMENTS, "cpu", 3 * DIM)
        sites = random_sites(2, count=8, edge=5)
        rows = random_rows(len(sites[0]))
        injection = make(decoder=(0, 1), encoder=(0, 2), input=True, input_channels=2, **options)
        names = [name for name, _ in injection.named_parameters()]

        class Terms(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.injection = injection

            def forward(self) -> Tensor:
                return torch.cat([term.flatten() for term in inject(self.injection, rows, sites).values()])

        def values(*parameters: Tensor) -> Tensor:
            named = {f"injection.{name}": p for name, p in zip(names, parameters, strict=True)}
            return torch.func.functional_call(Terms(), named, ())

        assert torch.autograd.gradcheck(values, tuple(injection.parameters()), fast_mode=True)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_pool
def test_a_gpu_gives_the_same_terms_and_gradients(options: dict) -> None:
    sites = random_sites(1)
    rows = random_rows(len(sites[0]))
    host = make(**EVERYWHERE, **options)
    device = copy.deepcopy(host).cuda()
    expected = inject(host, rows, sites)
    terms = inject(device, rows.map(Tensor.cuda), [at.cuda() for at in sites])
    for place, term in terms.items():
        torch.testing.assert_close(term.cpu(), expected[place], atol=1e-3, rtol=1e-3)
    for term in (*terms.values(), *expected.values()):
        term.square().mean().backward(retain_graph=True)
    for ours, theirs in zip(device.parameters(), host.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad, atol=1e-2, rtol=1e-2)


def test_zero_max_clamps_mixed_clusters_and_normalises_unseen_ones() -> None:
    # Three voxels of resolution 1: seen alone (-2), seen (-2) beside an unseen point, and unseen alone.
    sites = [
        torch.tensor([[0, 0, 0, 0], [0, 2, 0, 0], [0, 3, 0, 0], [0, 4, 0, 0]]).int(),
        torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [0, 2, 0, 0]]).int(),
    ]
    rows = FeatureRows(table=torch.full((1, DIM), -2.0).half(), scale=None, index=torch.tensor([0, 0, -1, -1]))

    def terms(**options: object) -> list[Tensor]:
        injection = Injection(InjectionConfig(decoder=(0, 1), **options), DIM, (DIM, DIM), ())  # type: ignore[arg-type]
        for linear in injection.linears.values():
            torch.nn.init.eye_(linear.weight)
        injected = injection.train()(rows, GridHierarchy(sites[0]))
        return [injected.decoder(level, at)[:, 0] for level, at in enumerate(sites)]

    def normalised(values: list[float]) -> Tensor:
        return F.gelu(F.batch_norm(torch.tensor(values)[:, None], None, None, training=True, eps=1e-3))[:, 0]

    finest, coarse = terms(pool="zero_max")
    torch.testing.assert_close(finest, normalised([-2.0, -2.0, 0.0, 0.0]))
    torch.testing.assert_close(coarse, normalised([-2.0, 0.0, 0.0]))
    finest, coarse = terms(pool="max")
    torch.testing.assert_close(finest, torch.tensor([*normalised([-2.0, -2.0]), 0.0, 0.0]))
    torch.testing.assert_close(coarse, torch.tensor([*normalised([-2.0, -2.0]), 0.0]))


def test_zero_max_is_the_maximum_where_everything_is_seen() -> None:
    sites = random_sites(0)
    rows = random_rows(len(sites[0]), coverage=1.0)
    published, masked = inject(make(pool="zero_max"), rows, sites), inject(make(pool="max"), rows, sites)
    for place, term in published.items():
        torch.testing.assert_close(term, masked[place])


@pytest.mark.parametrize("pool", ["mean", "max", "zero_max"])
def test_visibility_flag_adds_one_column_and_nothing_else(pool: str) -> None:
    sites = random_sites(0)
    rows = random_rows(len(sites[0]), coverage=1.0)
    plain, flagged = make(pool=pool).eval(), make(pool=pool, visibility_flag=True).eval()
    with torch.no_grad():
        for place, linear in plain.linears.items():
            flagged.linears[place].weight.copy_(F.pad(linear.weight, (0, 1)))  # type: ignore[arg-type, operator]
    flagged.norms.load_state_dict(plain.norms.state_dict())
    expected = inject(plain, rows, sites)
    for place, term in inject(flagged, rows, sites).items():
        torch.testing.assert_close(term, expected[place])


def test_dropped_points_are_dropped_everywhere_alike() -> None:
    sites = random_sites(0)
    rows = random_rows(len(sites[0]), coverage=1.0)
    injection = make(decoder=(0,), encoder=(0,), input=True, feature_drop=0.5).train()
    terms = inject(injection, rows, sites)
    dropped = {place: (term == 0).all(dim=1) for place, term in terms.items()}
    assert 0.3 < dropped["0"].float().mean() < 0.7
    assert torch.equal(dropped["0"], dropped["encoder0"]) and torch.equal(dropped["0"], dropped["input"])


def test_a_subset_of_places_gives_the_terms_that_all_places_give() -> None:
    sites = random_sites(0)
    rows = random_rows(len(sites[0]))
    everywhere = make(decoder="all", encoder=(0, 1, 2, 3, 4), input=True).eval()
    expected = inject(everywhere, rows, sites)
    assert len(expected) == 10
    for options in ({"decoder": (1,)}, {"decoder": (), "encoder": (3, 0)}, {"decoder": (), "input": True}, EVERYWHERE):
        part = make(**{**options, "input_channels": 32}).eval()
        part.load_state_dict({k: v for k, v in everywhere.state_dict().items() if k in part.state_dict()})
        terms = inject(part, rows, sites)
        assert set(terms) == set(part.levels) == set(part.linears) == set(part.norms)
        for place, term in terms.items():
            torch.testing.assert_close(term, expected[place])


@pytest.mark.parametrize(
    ("options", "sums", "projections"),
    [
        ({"decoder": (0,)}, 0, 1),
        ({"decoder": (), "input": True}, 0, 1),
        ({"decoder": (0, 1)}, 2, 2),
        ({"decoder": (), "encoder": (2,)}, 4, 1),
        ({"decoder": "all"}, 6, 4),
    ],
)
def test_levels_without_injection_cost_nothing(
    options: dict, sums: int, projections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sums`: one of features and one of counts per resolution up to the coarsest injected."""
    calls = []

    def counted(function: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: (calls.append(name), function(*args, **kwargs))[1]

    sites = random_sites(0)
    rows = random_rows(len(sites[0]))
    injection = make(**options)
    monkeypatch.setattr(Injection, "_projects_first", lambda *_: False)
    monkeypatch.setattr(injection_module, "segment_sum", counted(injection_module.segment_sum, "sum"))
    monkeypatch.setattr(torch, "mm", counted(torch.mm, "projection"))
    monkeypatch.setattr(F, "linear", counted(F.linear, "projection"))
    inject(injection, rows, sites)
    assert (calls.count("sum"), calls.count("projection")) == (sums, projections)


def test_rows_become_float_in_portions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(injection_module._PORTION_ELEMENTS, "cpu", 10 * DIM)
    sizes = []

    decode = FeatureRows.decode

    def measured(features: FeatureRows, rows: Tensor, buffer: Tensor) -> Tensor:
        sizes.append(len(rows))
        assert len(buffer) <= 10 + 8
        return decode(features, rows, buffer)

    monkeypatch.setattr(FeatureRows, "decode", measured)
    monkeypatch.setattr(Injection, "_projects_first", lambda *_: False)
    sites = random_sites(0)
    rows = random_rows(len(sites[0]))
    sum(term.sum() for term in inject(make(**EVERYWHERE), rows, sites).values()).backward()  # type: ignore[union-attr]
    # Once forward and once backward, whatever the number of places; a portion ends where a voxel of eight does.
    assert sum(sizes) == 2 * int((rows.index >= 0).sum()) and max(sizes) <= 10 + 8


@pytest.mark.parametrize("options", [{}, EVERYWHERE, {"missing_embedding": True}, {"decoder": (), "encoder": (3,)}])
@pytest.mark.parametrize("coverage", [0.0, 0.6])
def test_rows_may_be_projected_before_or_after_they_are_pooled(
    options: dict, coverage: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = random_sites(0)
    rows = random_rows(len(sites[0]), coverage=coverage)
    found = []
    for first in (True, False):
        monkeypatch.setattr(Injection, "_projects_first", lambda *_, first=first: first)
        injection = make(**options).train()
        terms = inject(injection, rows, sites)
        sum((i + 1) * term.square().sum() for i, term in enumerate(terms.values())).backward()  # type: ignore[union-attr]
        found.append([*terms.values(), *(p.grad for p in injection.parameters()), *injection.buffers()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


def test_rows_are_projected_first_where_many_points_share_them() -> None:
    injection = Injection(InjectionConfig(), DIM, (32, 64), ())
    assert injection._projects_first(10, 1000) and not injection._projects_first(1000, 1000)
    assert not make(decoder=(0, 1), pool="max")._projects_first(10, 1000)  # a maximum is not linear


# ----------------------------------------------------------------------------------------------------------------------
# in a network


def batch_of(samples: int = 2, count: int = 100) -> PointBatch:
    generator = torch.Generator().manual_seed(0)
    grids = [torch.randint(0, 12, (count, 3), generator=generator).unique(dim=0) for _ in range(samples)]
    grid_coord = torch.cat(grids).int()
    return PointBatch(
        coord=grid_coord * 0.02,
        grid_coord=grid_coord,
        feat=torch.randn(len(grid_coord), 3, generator=generator),
        offset=torch.tensor([len(grid) for grid in grids]).cumsum(0),
        segment=torch.randint(0, 4, (len(grid_coord),), generator=generator),
        features=random_rows(len(grid_coord)),
        names=tuple(f"scene{i}" for i in range(samples)),
    )


def segmentor(**options: object) -> Segmentor:
    torch.manual_seed(0)
    model = ModelConfig(backbone=BACKBONE, injection=InjectionConfig(**options))  # type: ignore[arg-type]
    network = build_segmentor(model, in_channels=3, num_classes=4, feature_dim=DIM)
    for name, parameter in network.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return network


ABLATIONS = {
    "default": {},
    "decoder-fine": {"decoder": (0, 1)},
    "decoder-coarse": {"decoder": (3,)},
    "encoder": {"decoder": (), "encoder": (1,)},
    "encoder-all": {"decoder": (), "encoder": (0, 1, 2, 3, 4)},
    "input": {"decoder": (), "input": True},
    "input-narrow": {"decoder": (), "input": True, "input_channels": 1},
    "everywhere": {"decoder": "all", "encoder": (0, 1, 2, 3, 4), "input": True},
    "drop": {"feature_drop": 0.5},
    **{f"everywhere-{name}": {**EVERYWHERE, **options} for name, options in POOLS.items()},
}


@pytest.mark.parametrize("options", ABLATIONS.values(), ids=ABLATIONS)
def test_ablations_train(options: dict) -> None:
    batch, model = batch_of(), segmentor(**options)
    assert batch.segment is not None
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch), batch.segment)
        loss.backward()
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0] < 10
    model.eval()
    scores = model(batch)
    assert bool(torch.isfinite(scores).all()) and scores.shape == (len(batch.coord), 4)
    assert batch.features is not None
    unseen = replace(batch, features=replace(batch.features, index=torch.full_like(batch.features.index, -1)))
    assert not torch.equal(model(unseen), scores)


def test_terms_enter_where_the_settings_say() -> None:
    """Features change the stages after their place, and none before it."""
    batch = batch_of()
    outputs: dict[str, Tensor] = {}
    stages = ("stem", "encoder.0", "encoder.1", "decoder.2", "decoder.3")
    for options, reached in (
        ({"decoder": (), "input": True}, stages),
        ({"decoder": (), "encoder": (0,)}, stages[1:]),
        ({"decoder": (), "encoder": (2,)}, stages[2:]),
        ({"decoder": (1,)}, stages[3:]),
        ({"decoder": (0,)}, stages[4:]),
    ):
        model = segmentor(**options).eval()
        outputs.clear()
        hooks = [
            model.backbone.get_submodule(name).register_forward_hook(
                lambda _module, _inputs, out, name=name: outputs.__setitem__(name, out.features)
            )
            for name in stages
        ]
        with torch.no_grad():
            model(batch)
            with_features = dict(outputs)
            assert batch.features is not None
            model(replace(batch, features=replace(batch.features, index=torch.full_like(batch.features.index, -1))))
        for hook in hooks:
            hook.remove()
        changed = tuple(name for name in stages if not torch.equal(outputs[name], with_features[name]))
        assert changed == reached, options


def test_input_widens_the_stem_alone() -> None:
    plain, wide = segmentor().state_dict(), segmentor(input=True, input_channels=9).state_dict()
    shapes = {k for k in plain if plain[k].shape != wide[k].shape}
    assert shapes == {"backbone.stem.conv.weight"}
    assert wide["backbone.stem.conv.weight"].numel() == plain["backbone.stem.conv.weight"].numel() * (3 + 9) // 3
    assert {k for k in wide if k not in plain and "num_batches" not in k} == {
        f"injection.{k}" for k in ("linears.input.weight", "norms.input.weight", "norms.input.bias",
                                   "norms.input.running_mean", "norms.input.running_var")
    }  # fmt: skip
    assert segmentor(input_channels=9).state_dict().keys() == plain.keys()


def test_checkpoints_of_the_default_keep_their_names() -> None:
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = [f"injection.linears.{level}.weight" for level in range(4)]
    expected += [f"injection.norms.{level}.{name}" for level in range(4) for name in norm]
    state = segmentor().state_dict()
    assert [k for k in state if k.startswith("injection")] == expected
    assert [tuple(state[f"injection.linears.{level}.weight"].shape) for level in range(4)] == [
        (4, DIM), (4, DIM), (6, DIM), (8, DIM)
    ]  # fmt: skip
    missing = [k for k in segmentor(missing_embedding=True).state_dict() if k.startswith("injection")]
    assert missing == ["injection.missing", *expected]


# ----------------------------------------------------------------------------------------------------------------------
# settings


RECIPE = """
vfm: dinov2
data: {grid_size: 0.1, feat: [color], batch_size: 2}
model: {injection: {}}
training: {epochs: 3}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "toy.yaml").write_text(RECIPE)
    return str(tmp_path / "toy.yaml")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], InjectionConfig(decoder="all", encoder=(), input=False, pool="mean")),
        (["decoder=all"], InjectionConfig()),
        (["decoder=[1, 0]"], InjectionConfig(decoder=(0, 1))),
        (["decoder=[]", "encoder=[1]"], InjectionConfig(decoder=(), encoder=(1,))),
        (["decoder=[]", "encoder=[]", "input=true"], InjectionConfig(decoder=(), input=True)),
        (["encoder=[4]"], InjectionConfig(encoder=(4,))),
        (["pool=zero_max", "visibility_flag=true"], InjectionConfig(pool="zero_max", visibility_flag=True)),
    ],
)
def test_recipes_set_the_options(recipe: str, overrides: list[str], expected: InjectionConfig, tmp_path: Path) -> None:
    loaded = load_recipe(recipe, [f"model.injection.{override}" for override in overrides])
    assert loaded.model.injection == expected
    (tmp_path / "resolved.yaml").write_text(loaded.to_yaml())
    assert read_recipe(tmp_path / "resolved.yaml") == loaded


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("decoder=some", r"decoder must be 'all' or a list of resolutions.*'some'"),
        ("decoder=1", r"decoder must be 'all' or a list of resolutions.*1"),
        ("decoder=null", r"decoder must be 'all' or a list"),
        ("decoder=[true]", r"decoder must be 'all' or a list"),
        ("decoder=[-1]", r"decoder must be 'all' or a list"),
        ("decoder=[1, 1]", r"each resolution once"),
        ("decoder=[]", r"names no place.*set injection to null"),
        ("decoder=[4]", r"decoder has 0 to 3, got \[4\]"),
        ("encoder=[0, 5]", r"encoder has 0 to 4, got \[0, 5\]"),
        ("encoder=1", r"model\.injection\.encoder.*got 1"),
        ("encoder=all", r"model\.injection\.encoder.*got 'all'"),
        ("input_channels=0", r"input_channels must be positive"),
        ("input=maybe", r"model\.injection\.input.*'maybe'"),
        ("pool=median", r"model\.injection\.pool.*'mean', 'max' or 'zero_max'"),
        ("visibility=true", r"did you mean 'visibility_flag'"),
    ],
)
def test_bad_options_name_their_key(recipe: str, override: str, message: str) -> None:
    with pytest.raises((UsageError, KeyError), match=message) as error:
        load_recipe(recipe, [f"model.injection.{override}"])
    assert "\n" not in str(error.value)


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(UsageError, match=r"zero_max.*missing_embedding.*use one of them"):
        InjectionConfig(pool="zero_max", missing_embedding=True)
    with pytest.raises(UsageError, match="resolutions of the backbone"):
        ModelConfig(backbone=replace(BACKBONE, channels=(4, 4), layers=(1, 1)), injection=InjectionConfig(decoder=(1,)))
