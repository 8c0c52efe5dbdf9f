"""What every dataset of the registry promises: its needs, options, defaults, page, and the partitions of its scans."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path
from typing import ClassVar

import click
import pytest

from ditr_cache import cli
from ditr_cache.datasets import DATASETS, ClassInfo, Dataset, Need, Option, dataset_class, open_dataset, parse_options
from ditr_cache.datasets.base import SCANS_PER_PARTITION, Defaults, Release, changed_options, partitions
from ditr_cache.errors import UnknownNameError, UsageError
from ditr_cache.release_cost import DEVICES, RATED_TOKENS, flops, release_cost
from ditr_cache.sample import Sample
from ditr_cache.schema import LAYOUTS, OCCLUSION
from ditr_train.recipe_files import load_recipe

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "datasets"
PUBLISHED = sorted(set(DATASETS) - {"rooms"})
OUTDOORS = {"nuscenes", "semantickitti", "waymo"}
CAPTURES = {"posed", "rgbd", "rooms"}
"""Everybody's own data, of no known size."""

sys.path.insert(0, str(ROOT / "pipelines"))
import dataset_pages  # noqa: E402


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_a_dataset_says_what_it_needs_and_takes(name):
    cls = dataset_class(name)
    assert cls.name == name and cls.title
    assert any(not need.optional for need in cls.needs)
    assert all(need.optional for need in cls.needs if need.content.startswith("or:"))
    assert all(need.path and need.content and need.download for need in cls.needs)
    keywords = set(inspect.signature(cls.__init__).parameters) - {"self", "root"}
    for option in cls.options:
        assert option.name in keywords and option.help
        assert not option.choices or option.default in option.choices
        assert inspect.signature(cls.__init__).parameters[option.name].default == option.default
    assert cls.defaults.layout in LAYOUTS and cls.defaults.links.occlusion in OCCLUSION
    outdoors = name in OUTDOORS
    assert (cls.defaults.links.occlusion == "none") == outdoors
    assert not outdoors or cls.defaults.layout == "views"
    assert cls.samples_per_partition == (SCANS_PER_PARTITION if outdoors else 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_page_describes_it(name):
    page = (PAGES / f"{name}.md").read_text()
    assert f"ditr-cache check --dataset {name} --root" in page
    assert f"ditr-cache extract --dataset {name} --root" in page
    assert dataset_pages.estimate_text(name) in page, "run `python pipelines/dataset_pages.py`"
    for option in dataset_class(name).options:
        assert f"{option.name}=" in page or f"`{option.name}`" in page, option.name
    assert f"[{name}]({name}.md)" in (PAGES / "README.md").read_text()


def test_every_release_has_a_size():
    assert {name for name in DATASETS if dataset_class(name).release is None} == CAPTURES


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda p: p.stem)
def test_a_page_has_no_section_but_the_estimate(page):
    """What no script fills in stays empty, or goes out of date."""
    filled = [f"<!-- {dataset_pages.SECTION} -->", f"<!-- end of {dataset_pages.SECTION} -->"]
    assert re.findall("<!--.*?-->", page.read_text()) == (filled if page.stem in PUBLISHED else [])


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda p: p.stem)
def test_every_command_of_a_page_is_one(page):
    """Options and datasets exist; the commands themselves run in the tests of each dataset."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in lines:
        words = shlex.split(line.split("  #")[0])
        if not words or words[0] != "ditr-cache":
            continue
        command = cli.cli.commands[words[1]]
        with click.Context(command) as context:
            command.parse_args(context, words[2:])
        if "--dataset" in words and (name := words[words.index("--dataset") + 1]) != "NAME":
            given = [words[i + 1] for i, word in enumerate(words) if word == "--option"]
            parse_options(name, given)


def test_the_table_of_defaults_is_true():
    table = (PAGES / "README.md").read_text()
    for name in PUBLISHED:
        row = next(line for line in table.splitlines() if line.startswith(f"| [{name}]"))
        assert row.rstrip("| ").endswith(dataset_class(name).defaults.layout), row
        rows, columns = dataset_class(name).defaults.grid
        assert f"{rows}x{columns}" in row, row


def test_every_recipe_s_dataset_has_a_reader():
    found = set()
    for path in (ROOT / "pipelines").rglob("*.yaml"):
        found |= set(re.findall(r"^dataset: (\S+)$", path.read_text(), re.MULTILINE))
    assert len(found) >= 8 and found <= set(DATASETS), found - set(DATASETS)


def test_the_command_lists_all(run):
    done = run("datasets", "--json")
    assert done.code == 0 and [d["name"] for d in done.json["datasets"]] == sorted(DATASETS)
    first = done.json["datasets"][0]
    assert {"title", "needs", "options", "defaults", "samples_per_partition"} <= first.keys()
    text = run("datasets").out
    for name in DATASETS:
        assert re.search(rf"^{name}: ", text, re.MULTILINE)
        for need in dataset_class(name).needs:
            assert need.download in text


# --- options --------------------------------------------------------------------------------------------------------


class Drives(Dataset):
    """Two drives of 130 and 3 scans."""

    name: ClassVar[str] = "drives"
    title: ClassVar[str] = "drives"
    needs: ClassVar[tuple[Need, ...]] = ()
    samples_per_partition: ClassVar[int] = SCANS_PER_PARTITION
    options: ClassVar[tuple[Option, ...]] = (
        Option("views", "front", "which cameras", choices=("front", "all")),
        Option("voxel_size", 0.02, "metres"),
        Option("returns", 1, "echoes"),
    )

    def __init__(self, root: Path, *, views: str = "front", voxel_size: float = 0.02, returns: int = 1) -> None:
        self.root, self.views = root, views
        drives = {"train": (("a", 130), ("b", 3)), "val": (("c", 1),)}
        self.ids = {s: [f"{drive}/{i:06d}" for drive, count in d for i in range(count)] for s, d in drives.items()}

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        return ()

    def sequence(self, sample_id: str) -> str:
        return sample_id.split("/")[0]

    def read(self, sample_id: str) -> Sample:
        raise AssertionError("listing opens no sample")


@pytest.fixture
def drives(monkeypatch, tmp_path):
    monkeypatch.setitem(DATASETS, "drives", "test_datasets:Drives")
    return tmp_path


def test_options_are_parsed_by_type_and_choice(drives):
    assert parse_options("drives", ["views=all", "voxel_size=0.05", "returns=2"]) == {
        "views": "all", "voxel_size": 0.05, "returns": 2,
    }  # fmt: skip
    assert changed_options("drives", {"views": "front", "voxel_size": 0.05}) == {"voxel_size": 0.05}
    with pytest.raises(UsageError, match=r"views='rear'.*expected one of front, all"):
        parse_options("drives", ["views=rear"])
    with pytest.raises(UsageError, match=r"voxel_size='fine'.*expected float"):
        parse_options("drives", ["voxel_size=fine"])
    with pytest.raises(UsageError, match="expected NAME=VALUE"):
        parse_options("drives", ["views"])
    with pytest.raises(UnknownNameError, match=r"'view'.*did you mean 'views'"):
        parse_options("drives", ["view=all"])


# --- partitions -----------------------------------------------------------------------------------------------------


def test_unknown_splits_and_samples_are_named(drives):
    dataset = Drives(drives)
    assert dataset.splits == ("train", "val") and dataset.split_of("c/000000") == "val"
    with pytest.raises(UnknownNameError, match=r"split of dataset 'drives' 'vol'.*did you mean 'val'"):
        dataset.sample_ids("vol")
    with pytest.raises(UnknownNameError, match=r"sample of dataset 'drives' 'b/00003'.*did you mean"):
        dataset.split_of("b/00003")


def test_partitions_hold_up_to_64_scans_of_one_drive(drives):
    found = partitions(Drives(drives))
    assert [(p.id, len(p.sample_ids)) for p in found] == [
        ("a-000000", 64), ("a-000064", 64), ("a-000128", 2), ("b-000000", 3), ("c-000000", 1),
    ]  # fmt: skip
    assert found[1].sample_ids[0] == "a/000064" and found[3].sample_ids == ("b/000000", "b/000001", "b/000002")
    assert [p.id for p in partitions(Drives(drives), ["val"])] == ["c-000000"]


# --- what a release costs -------------------------------------------------------------------------------------------


def test_the_rate_is_the_published_one_at_its_own_size(monkeypatch):
    release = Release(samples=1000, images=163 * 3600, points=100, coverage=0.5, views_per_point=2.0, source="test")
    monkeypatch.setattr(Drives, "release", release)
    monkeypatch.setattr(Drives, "defaults", Defaults(grid=(37, 37)))
    cost = release_cost(Drives)
    assert cost.gpu_hours["RTX PRO 6000 Max-Q"] == pytest.approx(1.0)
    # 50 000 covered points with rows of 1024 + 4 bytes, and 100 000 entries of the index
    assert cost.feature_bytes == pytest.approx(50_000 * 1028 + 100_000 * 4)
    monkeypatch.setattr(Drives, "defaults", Defaults(grid=(37, 37), layout="views"))
    assert release_cost(Drives).feature_bytes == pytest.approx(100_000 * 1028 + 100_000 * 4)
    assert flops(2 * RATED_TOKENS) > 2 * flops(RATED_TOKENS)
    assert all(device.source for device in DEVICES)
    monkeypatch.setattr(Drives, "release", None)
    assert release_cost(Drives) is None


# --- recipes --------------------------------------------------------------------------------------------------------

WRITTEN = {
    "nuscenes": {},
    "s3dis": {"with_images": False, "areas": (1, 5)},
    "scannet200": {"frames": "none"},
    "scannetpp": {"iphone": False, "undistorted": ""},
    "semantickitti": {"scans": 1, "azimuths": 60, "without_images": ("03", "08", "13")},
    "structured3d": {"size": (64, 36), "panorama_size": (64, 32)},
    "waymo": {},
}
"""Dataset -> what its writer is told, to be quick."""


@pytest.mark.parametrize("name", WRITTEN)
def test_recipes_and_readers_agree_on_classes_and_splits(name, tmp_path):
    importlib.import_module(f"layouts.{name}").write(tmp_path, **WRITTEN[name])
    dataset = open_dataset(name, tmp_path)
    recipe = load_recipe(f"{name}/{'distill' if name == 'structured3d' else 'plain'}")
    assert recipe.dataset == name and list(recipe.classes) == [c.name for c in dataset.classes]
    named = {*recipe.splits.training, *([recipe.splits.val] if recipe.splits.val else [])}
    assert named <= set(dataset.splits)
    if name != "structured3d":
        assert all(dataset.sample_ids(split) for split in named)


def test_the_scannet_recipe_has_the_reader_s_classes():
    table = dataset_class("scannet").class_table
    assert list(load_recipe("scannet/plain").classes) == [c.name for c in table.values()]
