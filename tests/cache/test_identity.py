"""What must change a VFM's key, and what must not."""

import dataclasses
import shutil

import pytest
import torch

from ditr_cache import schema
from ditr_cache.partition import ExtractSettings
from ditr_cache.schema import VFMSpec
from ditr_cache.vfm import FrozenVFM, VFMRequest
from ditr_cache.weights import weights_digest

SIZE = (32, 48)

CHANGES = {
    "architecture": "other_net",
    "weights_sha256": "1" + "0" * 63,
    "tap": "blocks.2",
    "norm": False,
    "mean": (0.4, 0.5, 0.61),
    "std": (0.2, 0.25, 0.31),
    "interpolation": "bilinear",
    "image_size": (42, 28),
    "grid": (3, 2),
    "dim": 6,
    "layout": "views",
    "fuse": "last",
    "codec": "int8",
    "codec_digest": "1" * 64,
    "projection_version": schema.PROJECTION_VERSION + 1,
}


def spec_of(checkpoint, **options) -> VFMSpec:
    return FrozenVFM(
        VFMRequest(
            **{"name": "test_vit", "checkpoint": str(checkpoint), "image_size": SIZE, "device": "cpu", **options}
        )
    ).spec


@pytest.mark.parametrize("field", CHANGES)
def test_each_part_of_the_identity_changes_the_key(make_spec, field):
    assert make_spec(**{field: CHANGES[field]}).key != make_spec().key


def test_every_field_but_the_name_is_part_of_the_identity(make_spec):
    """And what follows from the rest."""
    assert {f.name for f in dataclasses.fields(VFMSpec)} == {"name", "explained_variance", *CHANGES}
    assert make_spec(explained_variance=0.5).digest == make_spec().digest
    renamed = make_spec(name="mine")
    assert renamed.digest == make_spec().digest and renamed.key == f"mine-{renamed.digest[:8]}"


def test_a_spec_that_was_read_back_has_the_same_key(make_spec):
    spec = make_spec(mean=(0.1 + 0.2, 1 / 3, 0.5))
    assert VFMSpec.from_json(spec.to_json(), "here").key == spec.key


def test_the_key_of_a_spec_stays_what_it_was(make_spec):
    """Frozen: a change of this value makes every cache of users be built anew."""
    assert make_spec().key == "fake-3e7dca0d"


def test_container_path_and_device_do_not_matter(make_checkpoint, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    checkpoint = make_checkpoint()
    state = torch.load(checkpoint, weights_only=True)
    copy = tmp_path / "another name.bin"
    shutil.copy(checkpoint, copy)
    tensors, wrapped, reordered = tmp_path / "a.safetensors", tmp_path / "b.pt", tmp_path / "c.pt"
    save_file(state, tensors)
    torch.save({"state_dict": state, "epoch": 3}, wrapped)
    torch.save(dict(reversed(state.items())), reordered)
    expected = spec_of(checkpoint)
    for path in (copy, tensors, wrapped, reordered):
        assert spec_of(path).key == expected.key
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert spec_of(checkpoint, compile=True).key == expected.key
    if not torch.cuda.is_available():
        assert spec_of(checkpoint, device="auto").key == expected.key


def test_one_bit_of_one_weight_matters(make_checkpoint, tmp_path):
    state = torch.load(make_checkpoint(), weights_only=True)
    state["blocks.2.mlp.fc1.weight"].view(torch.int32)[5, 7] ^= 1
    torch.save(state, tmp_path / "w.pt")
    ours, other = spec_of(make_checkpoint()), spec_of(tmp_path / "w.pt")
    assert ours.weights_sha256 != other.weights_sha256 and ours.key != other.key
    assert dataclasses.replace(other, weights_sha256=ours.weights_sha256) == ours


def test_image_size_matters(make_checkpoint):
    assert spec_of(make_checkpoint(), image_size=(48, 32)).key != spec_of(make_checkpoint()).key


def test_settings_add_fuse_and_codec_and_nothing_of_the_machine(make_spec):
    def key(**changes) -> str:
        request = VFMRequest(name="test_vit", checkpoint="/a", device=changes.pop("device", "cpu"))
        settings = ExtractSettings(dataset="rooms", root="/r", cache="/c", vfm=request)
        return dataclasses.replace(settings, **changes).complete_spec(make_spec()).key

    assert len({key(), key(fuse="last"), key(fuse="nearest"), key(codec="int8")}) == 4
    assert {key(batch_size=7), key(device="cuda:1"), key(cache="/d", root="/s"), key(retry_incomplete=True)} == {key()}


def test_weights_digest_covers_names_dtypes_shapes_and_bytes():
    base = {"a": torch.arange(6.0), "b": torch.tensor(3)}
    others = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].reshape(2, 3), "b": base["b"]},
        {"a": base["a"].double(), "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {"a": -base["a"], "b": base["b"]},
        {"a": base["a"]},
        {},
    ]
    assert len({weights_digest(s) for s in [base, *others]}) == 8
    strided = {"b": base["b"], "a": torch.stack([base["a"], base["a"]], dim=1)[:, 0]}
    assert weights_digest(strided) == weights_digest(base)
    half = {"h": torch.ones(3, dtype=torch.bfloat16), "empty": torch.zeros(0, 4)}
    assert len(weights_digest(half)) == 64
