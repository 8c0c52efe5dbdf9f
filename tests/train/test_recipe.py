from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ditr_cache.errors import DataError, MissingDataError, UnknownNameError, UsageError
from ditr_train.models.pointnext_config import PointNeXtConfig
from ditr_train.models.ptv3_config import PTv3Config
from ditr_train.models.sparse_unet_config import SparseUNetConfig
from ditr_train.recipe import differing_keys, parse_recipe
from ditr_train.recipe_files import list_recipes, load_recipe, read_recipe, recipe_summaries
from ditr_train.run_folder import is_free

BASE = """
description: small
data: {grid_size: 0.1, feat: [color], batch_size: 2}
training: {epochs: 3}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "base.yaml").write_text(BASE)
    (tmp_path / "toy" / "plain.yaml").write_text("extends: toy/base\ndescription: points alone\nseed: 4\n")
    return tmp_path


@pytest.mark.parametrize("name", ["demo/plain", "demo/inject", "scannet/plain", "scannet/inject"])
def test_shipped_recipes_are_valid(name: str) -> None:
    recipe = load_recipe(name, ["cache=/some/where"])
    assert name in list_recipes() and recipe.description == list_recipes()[name] != ""
    assert (recipe.model.injection is None) == (recipe.vfm is None) == name.endswith("plain")
    assert recipe.require_cache() == "/some/where" and recipe.data.transforms()


def test_demo_recipes_differ_in_the_injection_alone() -> None:
    differing = differing_keys(load_recipe("demo/plain"), load_recipe("demo/inject"))
    assert {d.split(".")[0] + "." + ".".join(d.split(".")[1:2]) for d in differing} == {
        "description.", "vfm.", "model.injection",
    }  # fmt: skip


def test_scannet_recipes_are_the_published_ones() -> None:
    plain, inject = load_recipe("scannet/plain"), load_recipe("scannet/inject")
    assert plain.model.backbone.channels == (32, 64, 128, 256, 256, 128, 96, 96)
    assert (plain.training.epochs, plain.data.batch_size, plain.data.mix_prob) == (800, 12, 0.8)
    assert (plain.data.point_max, inject.data.point_max) == (100000, 102400)
    assert (plain.loss.lovasz_weight, inject.loss.lovasz_weight) == (0.0, 1.0)
    assert (plain.optimizer.name, plain.optimizer.lr, plain.optimizer.weight_decay) == ("sgd", 0.05, 1e-4)
    assert (inject.optimizer.name, inject.optimizer.lr, inject.optimizer.weight_decay) == ("adamw", 6e-3, 0.05)
    assert [(g.pattern, g.lr_scale) for g in inject.optimizer.groups] == [("block", 0.1)]
    for recipe, final in ((plain, 1e4), (inject, 1e3)):
        schedule = recipe.schedule
        assert (schedule.pct_start, schedule.div_factor, schedule.final_div_factor) == (0.05, 10, final)
    assert inject.classes is not None and len(inject.classes) == 20


def test_extends_merges_key_by_key(folder: Path) -> None:
    recipe = load_recipe("toy/plain", ["data.feat=[coord,normal]", "training.epochs=7"], [folder])
    assert recipe.seed == 4 and recipe.description == "points alone"
    assert recipe.data.feat == ("coord", "normal") and recipe.data.grid_size == 0.1 and recipe.training.epochs == 7
    assert list_recipes([folder]) == {"toy/plain": "points alone"}


def test_a_recipe_file_extends_a_file_beside_it(folder: Path) -> None:
    (folder / "mine.yaml").write_text("extends: toy/base.yaml\nseed: 9\n")
    recipe = load_recipe(str(folder / "mine.yaml"))
    assert recipe.seed == 9 and recipe.data.batch_size == 2


def test_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    for name in ("demo/inject", "scannet/plain"):
        recipe = load_recipe(name, ["cache=c", "seed=3"])
        (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
        assert read_recipe(tmp_path / "recipe.yaml") == recipe
        assert differing_keys(recipe, load_recipe(name, ["cache=c", "seed=4", "data.workers=0"])) == (
            ["data.workers", "seed"] if recipe.data.workers else ["seed"]
        )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batchsize=4", r"data\.batchsize.*did you mean 'batch_size'"),
        ("sed=4", r"sed.*did you mean 'seed'"),
        ("model.backbone.chanels=[1]", r"model\.backbone\.chanels.*did you mean 'channels'"),
        ("model.injection.pol=max", r"model\.injection\.pol.*did you mean 'pool'"),
        ("optimizer.learning=1", r"optimizer\.learning"),
        ("optimizer.groups=[{patern: block, lr_scale: 1}]", r"optimizer\.groups\.0\.patern.*did you mean 'pattern'"),
        ("data.augment=[{nam: RandomFlip}]", r"data\.augment\.0\.nam.*did you mean 'name'"),
    ],
)
def test_unknown_keys_name_the_nearest(folder: Path, override: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        load_recipe("toy/base", [override], [folder])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.grid_size=0", r"data\.grid_size: .*greater than 0.*got 0"),
        ("data.batch_size=many", r"data\.batch_size: .*'many'"),
        ("training.amp=fp8", r"training\.amp: .*'fp8'"),
        ("training.steps=5", r"training: expected either epochs or steps"),
        ("model.backbone.channels=[1,2,3]", r"model\.backbone.*even number"),
        ("vfm=dinov2-large", r"model\.injection is null"),
        ("model.injection.pool=max", r"vfm is null"),
        ("seed.x=1", r"seed\.x|seed: "),
        ("data.augment=[{name: RandomFlip, args: {p: 2}}]", r"data\.augment: RandomFlip"),
        ("noequals", r"key=value"),
        ("seed=[", r"not YAML"),
    ],
)
def test_values_that_cannot_be_used_name_their_key(folder: Path, override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe("toy/base", [override], [folder])


def test_missing_keys_and_cache(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"data: field required[\s\S]*training: field required"):
        parse_recipe({"seed": 1})
    with pytest.raises(UsageError, match="--set cache=PATH"):
        load_recipe("toy/base", (), [folder]).require_cache()


def test_unknown_recipes_and_channels_and_transforms(folder: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'demo/inject'"):
        load_recipe("demo/injct")
    with pytest.raises(UnknownNameError, match="did you mean 'color'"):
        load_recipe("toy/base", ["data.feat=[colour]"], [folder])
    with pytest.raises(UnknownNameError, match="did you mean 'RandomFlip'"):
        load_recipe("toy/base", ["data.augment=[{name: RandomFlipp}]"], [folder])


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="cannot be read"):
        load_recipe(str(tmp_path / "none.yaml"))
    bad = tmp_path / "bad.yaml"
    for text, message in (
        ("a: [", "not YAML"),
        ("- 1\n", "expected a mapping"),
        ("!!python/object:os.system {}", "YAML"),
    ):
        bad.write_text(text)
        with pytest.raises(DataError, match=message):
            load_recipe(str(bad))
    bad.write_text("extends: bad.yaml\n")
    with pytest.raises(UsageError, match="extends itself"):
        load_recipe(str(bad))
    bad.write_text("extends: {demo: base}\n")
    with pytest.raises(UsageError, match="extends"):
        load_recipe(str(bad))


def test_a_recipe_extends_several_and_inherits_no_target(folder: Path) -> None:
    (folder / "toy" / "base-small.yaml").write_text("data: {batch_size: 9, grid_size: 0.5}\nseed: 3\n")
    (folder / "toy" / "both.yaml").write_text(
        "extends: [toy/base, toy/base-small]\ndata: {grid_size: 0.7}\npublished: {miou: 50, source: a paper}\n"
    )
    (folder / "mine.yaml").write_text("extends: toy/both\n")
    both = load_recipe("toy/both", (), [folder])
    # The later one wins over the earlier one, the file's own keys over both.
    assert (both.data.feat, both.data.batch_size, both.data.grid_size, both.seed) == (("color",), 9, 0.7, 3)
    assert both.published is not None and both.published.miou == 50
    mine = load_recipe("mine", (), [folder])
    assert mine.published is None and mine.data == both.data
    assert list(list_recipes([folder])) == ["mine", "toy/both", "toy/plain"]
    assert recipe_summaries([folder])["toy/both"].published == both.published


def test_an_entry_of_a_list_is_set_by_its_number() -> None:
    recipe = load_recipe("indoor/distill", ["sources.0.cache=a", "sources.1.cache=b", "data.augment.1.args.p=0.25"])
    assert [source.cache for source in recipe.sources] == ["a", "b"]
    assert recipe.sources[1].splits.training == ("train", "val", "test")
    assert recipe.data.augment[1].args == {"axis": "z", "degrees": 180, "p": 0.25}
    for key, message in (("sources.2.cache", "0 to 1"), ("sources.x.cache", "0 to 1"), ("seed.0.a", "is a value")):
        with pytest.raises(UsageError, match=f"--set {key}.*{message}"):
            load_recipe("indoor/distill", [f"{key}=c"])


def test_the_target_changes_nothing_about_a_run() -> None:
    assert is_free("published.miou") and is_free("published") and not is_free("data.micro_batch")


def test_what_contradicts_itself_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.micro_batch is 1 and training\.accumulation is 2"):
        load_recipe("toy/base", ["data.micro_batch=1", "training.accumulation=2"], [folder])
    with pytest.raises(UsageError, match=r"data\.at_test: RandomFlip is not for test time"):
        load_recipe("toy/base", ["data.at_test=[{name: RandomFlip}]"], [folder])
    with pytest.raises(UsageError, match=r"sources\.1\.augment: RandomFlip"):
        load_recipe("indoor/distill", ["sources.1.augment=[{name: RandomFlip, args: {p: 2}}]"])


# --- backbones --------------------------------------------------------------------------------------------------------


def test_a_named_backbone_replaces_the_settings_of_another(folder: Path) -> None:
    (folder / "toy" / "unet.yaml").write_text(
        "extends: toy/base\nmodel: {backbone: {layers: [1, 1], channels: [8, 8]}}\n"
    )
    (folder / "toy" / "ptv3.yaml").write_text("extends: toy/unet\nmodel: {backbone: {name: ptv3, patch_size: 64}}\n")
    (folder / "toy" / "wide.yaml").write_text("extends: toy/ptv3\nmodel: {backbone: {name: ptv3, mlp_ratio: 2}}\n")
    recipe = load_recipe("toy/wide", (), [folder])
    assert recipe.model.backbone == PTv3Config(patch_size=64, mlp_ratio=2)
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    overrides = ["model.backbone.name=pointnext", "model.backbone.size=L"]
    assert load_recipe("toy/ptv3", overrides, [folder]).model.backbone == PointNeXtConfig(size="L")
    assert load_recipe("toy/ptv3", overrides[::-1], [folder]).model.backbone == PointNeXtConfig(size="L")
    kept = load_recipe("toy/unet", ["model.backbone.name=sparse_unet"], [folder])
    assert kept.model.backbone == SparseUNetConfig(layers=(1, 1), channels=(8, 8))


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (
            ["model.backbone.name=ptv"],
            UnknownNameError,
            r"model\.backbone\.name 'ptv'.*mean 'ptv3'",
        ),
        (["model.backbone.name=ptv3", "model.backbone.layers=[1]"], UnknownNameError, r"model\.backbone\.layers"),
        (
            ["model.backbone.name=ptv3", "model.backbone.patch_size=x"],
            UsageError,
            r"patch_size: .*'x'",
        ),
        (["model.backbone=ptv3"], UsageError, r"choose a backbone with --set model\.backbone\.name=ptv3"),
        (["model.backbone=3"], UsageError, r"model\.backbone: .*got 3"),
    ],
)
def test_settings_are_those_of_the_named_backbone(
    folder: Path, overrides: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_recipe("toy/base", overrides, [folder])
