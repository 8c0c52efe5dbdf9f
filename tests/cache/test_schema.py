import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ditr_cache.errors import CacheError, CorruptCacheError, FormatVersionError
from ditr_cache.schema import (
    FORMAT_VERSION,
    ArrayInfo,
    BrokenView,
    CacheMetadata,
    Document,
    FeatureRecord,
    GeometryRecord,
    LinkSettings,
    SampleInfo,
    VFMSpec,
    ViewInfo,
    canonical_digest,
)

TEXT = st.text(max_size=12)
COUNT = st.integers(0, 2**32 - 1)
FEW = st.integers(0, 1000)
NUMBER = st.floats(-1e300, 1e300)
SHA = st.text("0123456789abcdef", min_size=64, max_size=64)
FILES = st.dictionaries(st.from_regex(r"[a-z]{1,8}(/[0-9a-z]{1,4}){0,3}", fullmatch=True), COUNT, max_size=3)
BROKEN = st.lists(st.builds(BrokenView, sample=TEXT, view=TEXT, error=TEXT), max_size=2).map(tuple)
VIEWS = st.lists(st.builds(ViewInfo, id=TEXT, links=FEW), max_size=2).map(tuple)
SAMPLES = st.lists(
    st.builds(SampleInfo, id=TEXT, split=TEXT, points=FEW, linked_points=FEW, views=VIEWS),
    max_size=2,
    unique_by=lambda s: s.id,
).map(tuple)


def array(length: int, *sides: int, dtype: str = "<f4") -> ArrayInfo:
    return ArrayInfo(shape=(length, *sides), dtype=dtype, sha256="0" * 64)


def geometry(samples: tuple[SampleInfo, ...], color: bool = False, **fields) -> GeometryRecord:
    """A record whose arrays are as long as its samples say."""
    points, links = sum(s.points for s in samples), sum(v.links for s in samples for v in s.views)
    arrays = {"coord": array(points, 3), "source_index": array(points, dtype="<u4")}
    arrays["offset"] = array(len(samples), dtype="<i8")
    arrays |= {"color": array(points, 3, dtype="|u1")} if color else {}
    arrays |= {"link_point": array(links, dtype="<u4"), "link_uv": array(links, 2, dtype="<u2")}
    arrays["link_depth"] = array(links)
    return GeometryRecord(samples=samples, arrays=arrays, **fields)


def features(rows: int, scale: bool = False, **fields) -> FeatureRecord:
    arrays = {"table": array(rows, 5), "index": array(7, dtype="<i4")} | ({"scale": array(rows)} if scale else {})
    return FeatureRecord(rows=rows, arrays=arrays, **fields)


LINKS = st.builds(
    LinkSettings,
    every_nth_frame=st.none() | COUNT,
    max_views=st.none() | COUNT,
    occlusion_tolerance=NUMBER,
    depth_min=NUMBER,
    depth_max=st.none() | NUMBER,
)
COLOR = st.tuples(*[st.integers(0, 255)] * 3)
SIDE = st.integers(1, 2**24)
SIZE = st.tuples(SIDE, SIDE)
DOCUMENTS = st.one_of(
    st.builds(
        CacheMetadata,
        dataset=TEXT,
        class_names=st.lists(TEXT, max_size=3).map(tuple),
        class_colors=st.lists(COLOR, max_size=3).map(tuple),
        links=LINKS,
        dataset_options=st.dictionaries(TEXT, TEXT | st.integers(-(2**63) + 1, 2**63 - 1) | NUMBER, max_size=2),
    ),
    st.builds(
        VFMSpec, name=TEXT, architecture=TEXT, weights_sha256=SHA, tap=TEXT, norm=st.booleans(),
        mean=st.tuples(NUMBER, NUMBER, NUMBER), std=st.tuples(NUMBER, NUMBER, NUMBER), interpolation=TEXT,
        image_size=SIZE, grid=SIZE, dim=SIDE,
    ),
    st.builds(
        geometry, samples=SAMPLES, color=st.booleans(), partition=TEXT, files=FILES, broken_views=BROKEN,
        seconds=NUMBER,
    ),
    st.builds(
        features, partition=TEXT, vfm_digest=SHA, geometry_digest=SHA, scale=st.booleans(), files=FILES, rows=FEW,
        valid_points=st.lists(COUNT, max_size=3).map(tuple), images=COUNT, broken_views=BROKEN, seconds=NUMBER,
    ),
)  # fmt: skip


@given(DOCUMENTS)
def test_json_round_trip(document: Document):
    back = type(document).from_json(document.to_json(), "here")
    assert back == document and hash(str(back)) == hash(str(document))
    assert back.to_json() == document.to_json()
    body = json.loads(document.to_json())
    assert body["format_version"] == FORMAT_VERSION and body["kind"] == document.kind


@given(DOCUMENTS, st.data())
def test_an_altered_byte_is_refused_or_changes_nothing(document: Document, data):
    text = bytearray(document.to_json().encode())
    position = data.draw(st.integers(0, len(text) - 1))
    text[position] ^= data.draw(st.integers(1, 255))
    try:
        back = type(document).from_json(bytes(text), "here")
    except (CorruptCacheError, FormatVersionError) as error:
        assert "here" in str(error)
    else:
        assert back == document  # say a space that became a tab


def test_every_bit_of_a_spec(make_spec):
    spec = make_spec()
    text = spec.to_json().encode()
    unseen = 0
    for position in range(len(text)):
        for bit in range(8):
            altered = bytearray(text)
            altered[position] ^= 1 << bit
            try:
                unseen += VFMSpec.from_json(bytes(altered), "here") == spec
            except (CorruptCacheError, FormatVersionError):
                continue
            assert VFMSpec.from_json(bytes(altered), "here") == spec
    assert unseen < 0.02 * 8 * len(text)


@given(DOCUMENTS, st.data())
def test_a_cut_document_is_refused(document: Document, data):
    text = document.to_json()
    with pytest.raises(CorruptCacheError):
        type(document).from_json(text[: data.draw(st.integers(0, len(text) - 1))], "here")


@pytest.mark.parametrize("text", [b"", b"null", b"[]", b"3", b'"x"', b"{}", b"\xff\xfe", b"\0" * 50, b"[" * 100_000])
def test_what_is_no_document_is_refused(text):
    with pytest.raises(CorruptCacheError, match="here: not a vfm of a ditr cache"):
        VFMSpec.from_json(text, "here")


def test_a_document_of_another_kind_is_refused(make_spec, make_metadata):
    with pytest.raises(CorruptCacheError):
        CacheMetadata.from_json(make_spec().to_json(), "here")


def resigned(document: Document, **changes: object) -> str:
    body = {**json.loads(document.to_json()), **changes}
    del body["checksum"]
    body = {k: v for k, v in body.items() if v is not ...}
    return json.dumps({**body, "checksum": canonical_digest(body)})


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99, "2", None])
def test_a_newer_version_is_refused_in_clear_words(make_spec, version):
    with pytest.raises(FormatVersionError, match=rf"here: format version {version}, .* reads up to 1; upgrade ditr"):
        VFMSpec.from_json(resigned(make_spec(), format_version=version), "here")


def test_a_newer_version_is_recognised_whatever_else_it_holds(make_spec):
    with pytest.raises(FormatVersionError):
        VFMSpec.from_json('{"format_version": 7, "kind": "something new", "signature": [1]}', "here")


def test_missing_fields_are_named(make_spec):
    with pytest.raises(CorruptCacheError, match=r"here: fields are missing .*'tap'"):
        VFMSpec.from_json(resigned(make_spec(), tap=...), "here")


def test_documents_are_frozen(make_spec):
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_spec().name = "other"


def test_errors_are_cache_errors_and_their_built_in_twins():
    assert issubclass(CorruptCacheError, CacheError) and issubclass(CorruptCacheError, OSError)
    assert issubclass(FormatVersionError, ValueError)
    assert str(CorruptCacheError("plain words")) == "plain words"


def test_coverage_of_a_sample():
    info = SampleInfo(id="a", split="train", points=8, linked_points=2, views=())
    assert info.coverage == 0.25
    assert dataclasses.replace(info, points=0, linked_points=0).coverage == 0
