import hashlib
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ditr_cache.codecs import (
    CODECS,
    FLOAT16_MAX,
    FP8_VALUES,
    check_codec,
    concatenate_rows,
    make_codec,
    needs_fit,
)
from ditr_cache.errors import CorruptCacheError, DataError, UnknownNameError, UsageError

PLAIN = [name for name in CODECS if not needs_fit(name)]
DTYPES = {"float16": np.float16, "int8": np.int8, "fp8": np.uint8}
SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)
NEGLIGIBLE = 2e-36  # rows whose scale is subnormal are stored as zero


def there_and_back(rows, name):
    codec = make_codec(name, rows.shape[1])
    encoded = codec.encode(rows)
    assert encoded.table.dtype == codec.dtype == DTYPES[name]
    assert encoded.table.shape == (len(rows), codec.width) == rows.shape
    assert codec.scaled == (encoded.scale is not None)
    if encoded.scale is not None:
        assert encoded.scale.dtype == np.float32 and encoded.scale.shape == rows.shape[:1]
    back = codec.decode(encoded.table, encoded.scale)
    assert back.dtype == np.float32 and back.shape == rows.shape
    return back


@st.composite
def rows_within(draw, limit):
    """Rows of all float dtypes and magnitudes, each row with one of its own."""
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    bound = min(float(np.finfo(dtype).max), limit)
    shape = draw(SHAPES)
    rows = draw(hnp.arrays(np.float64, shape, elements=st.floats(-1, 1)))
    top = draw(hnp.arrays(np.float64, (shape[0], 1), elements=st.floats(-46, np.log10(bound))))
    return np.clip(rows * 10.0**top, -bound, bound).astype(dtype)


@given(rows_within(FLOAT16_MAX))
def test_float16_bound(rows):
    x = rows.astype(np.float64)
    error = np.abs(there_and_back(rows, "float16") - x)
    assert (error <= 2.0**-11 * np.abs(x) + 2.0**-25).all()


@given(rows_within(float(np.finfo(np.float32).max)))
def test_int8_bound(rows):
    x = rows.astype(np.float64)
    peak = np.abs(x).max(axis=1, keepdims=True)
    error = np.abs(there_and_back(rows, "int8") - x)
    assert (error <= peak * (0.5 / 127 + 2**-16) + NEGLIGIBLE).all()


@given(rows_within(float(np.finfo(np.float32).max)))
def test_fp8_bound(rows):
    x = rows.astype(np.float64)
    peak = np.abs(x).max(axis=1, keepdims=True)
    error = np.abs(there_and_back(rows, "fp8") - x)
    assert (error <= np.maximum(2.0**-4 * np.abs(x), 2.0**-10 * peak / 448) + 2**-16 * peak + NEGLIGIBLE).all()


def test_fp8_takes_the_nearest_number():
    rows = np.random.default_rng(0).normal(size=(40, 33)).astype(np.float32)
    encoded = make_codec("fp8", 33).encode(rows)
    numbers = FP8_VALUES[np.isfinite(FP8_VALUES)].astype(np.float64)
    scaled = rows.astype(np.float64) / encoded.scale[:, None]
    least = np.abs(scaled[..., None] - numbers).min(axis=-1)
    assert np.allclose(np.abs(scaled - FP8_VALUES[encoded.table]), least, rtol=0, atol=1e-4)


def test_fp8_numbers_are_those_of_torch():
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(FP8_VALUES, expected, equal_nan=True)
    assert np.array_equal(np.signbit(FP8_VALUES), np.signbit(expected))


@pytest.mark.parametrize("missing", [None, torch.nn])  # no torch at all; one that is too old
def test_fp8_without_the_type_says_what_to_do(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, "torch", missing)
    codec = make_codec("fp8", 2)
    with pytest.raises(UsageError, match=r"float8_e4m3fn.*install torch.*codec int8"):
        codec.encode(np.ones((1, 2)))
    code = np.array([[0x38, 0x7E]], np.uint8)  # 1 and 448
    assert codec.decode(code, np.array([0.5], np.float32)).tolist() == [[0.5, 224]]


@pytest.mark.parametrize(
    ("name", "digest"),
    [("float16", "a2c00fadd5f22415"), ("int8", "5ad4d2e314ab1ccc")],
)
def test_bytes_are_those_of_the_first_release(name, digest):
    """Of rows that are exact in every float dtype, so that no library's rounding takes part."""
    rows = (np.arange(-700, 700).reshape(20, 70) * 7919 % 1409 - 704).astype(np.float32) / 64
    encoded = make_codec(name, 70).encode(rows)
    content = encoded.table.tobytes() + (b"" if encoded.scale is None else encoded.scale.tobytes())
    assert hashlib.sha256(content).hexdigest()[:16] == digest


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_zero_rows_come_back_as_zero(name, dtype):
    assert not there_and_back(np.zeros((3, 4), dtype=dtype), name).any()


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (0, 0)])
def test_empty(name, shape):
    there_and_back(np.zeros(shape, dtype=np.float32), name)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(name, bad):
    rows = np.ones((4, 3), dtype=np.float32)
    rows[2, 1] = bad
    with pytest.raises(DataError, match="1 of 4 rows hold NaN or infinity"):
        make_codec(name, 3).encode(rows)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("shape", [(4, 2), (3,), (1, 3, 3)])
def test_rows_of_another_width_are_refused(name, shape):
    with pytest.raises(DataError, match=r"rows of shape \(.*made for \[T, 3\]"):
        make_codec(name, 3).encode(np.ones(shape))


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_subnormals_and_the_largest_float(name):
    assert not there_and_back(np.full((1, 2), np.float32(1e-45)), name).any()
    top = np.finfo(np.float32).max
    with np.errstate(all="raise"):
        back = there_and_back(np.array([[top, -top, 0]], np.float32), name)
    assert np.isfinite(back).all() and np.allclose(back / top, [[1, -1, 0]], atol=1e-6)


def test_float16_names_the_way_out_of_an_overflow():
    assert there_and_back(np.full((1, 1), 65504.0), "float16").item() == 65504
    with pytest.raises(DataError, match=r"70000 does not fit into float16.*codec int8"):
        make_codec("float16", 2).encode(np.array([[1.0, -70000.0]]))


def test_values_beyond_float32_are_refused():
    with pytest.raises(DataError, match="NaN or infinity"):
        make_codec("int8", 1).encode(np.array([[1e300]]))


@pytest.mark.parametrize("name", PLAIN)
def test_parts_are_joined(name):
    rows = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    codec = make_codec(name, 4)
    whole, joined = codec.encode(rows), concatenate_rows([codec.encode(rows[:2]), codec.encode(rows[2:])])
    assert np.array_equal(whole.table, joined.table) and np.array_equal(whole.scale, joined.scale)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_table_without_its_scale_is_refused(name):
    with pytest.raises(CorruptCacheError, match="without their scales"):
        make_codec(name, 3).decode(np.zeros((2, 3), DTYPES[name]), None)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_codecs_fit_nothing(name):
    codec = make_codec(name, 5)
    assert (codec.name, codec.dim, codec.arrays, codec.explained_variance) == (name, 5, {}, None)
    assert not needs_fit(name)
    with pytest.raises(CorruptCacheError, match="expected none, got"):
        make_codec(name, 5, {"mean": np.zeros(5, np.float32)})


@pytest.mark.parametrize("name", [*CODECS, "pca1-int8", "pq1", "pq999"])
def test_names_of_codecs(name):
    check_codec(name)
    assert needs_fit(name) == name.startswith("p")


@pytest.mark.parametrize(
    "name", ["int", "pca0-int8", "pca-int8", "pca1٣-int8", "pq", "pq064", "PQ64", "pq64 ", "pq-1", ""]
)
def test_names_that_are_no_codec(name):
    for call in (check_codec, needs_fit, lambda n: make_codec(n, 3)):
        with pytest.raises(UnknownNameError, match="unknown codec"):
            call(name)


def test_the_nearest_name_is_offered():
    with pytest.raises(UnknownNameError, match="did you mean 'int8'"):
        check_codec("int")
    with pytest.raises(UnknownNameError, match="did you mean 'pca256-int8'"):
        check_codec("pca256")
