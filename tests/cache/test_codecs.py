import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ditr_cache.codecs import CODECS, FLOAT16_MAX, decode, encode
from ditr_cache.errors import DataError, UnknownNameError

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)
NEGLIGIBLE = 4e-37  # rows whose scale is subnormal are stored as zero


def rows_within(limit: float):
    bound = float(np.float32(limit))
    return hnp.arrays(np.float32, SHAPES, elements=st.floats(-bound, bound, width=32))


@given(rows_within(FLOAT16_MAX))
def test_float16_bound(rows):
    encoded = encode(rows, "float16")
    assert encoded.table.dtype == np.float16 and encoded.scale is None
    x = rows.astype(np.float64)
    error = np.abs(decode(encoded.table, None).astype(np.float64) - x)
    assert (error <= 2.0**-11 * np.abs(x) + 2.0**-25).all()


@given(rows_within(np.finfo(np.float32).max))
def test_int8_bound(rows):
    encoded = encode(rows, "int8")
    assert encoded.table.dtype == np.int8 and encoded.scale is not None and encoded.scale.dtype == np.float32
    assert encoded.scale.shape == (len(rows),) and (encoded.table != -128).all()
    x = rows.astype(np.float64)
    step = np.abs(x).max(axis=1, keepdims=True) / 127
    error = np.abs(decode(encoded.table, encoded.scale).astype(np.float64) - x)
    assert (error <= step * (0.5 + 2**-10) + NEGLIGIBLE).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_zero_rows_come_back_as_zero(codec, dtype):
    encoded = encode(np.zeros((3, 4), dtype=dtype), codec)
    assert np.array_equal(decode(encoded.table, encoded.scale), np.zeros((3, 4), np.float32))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (0, 0)])
def test_empty(codec, shape):
    encoded = encode(np.zeros(shape, dtype=np.float32), codec)
    assert encoded.table.shape == shape and decode(encoded.table, encoded.scale).shape == shape
    assert encoded.scale is None or encoded.scale.shape == shape[:1]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(codec, bad):
    rows = np.ones((4, 3), dtype=np.float32)
    rows[2, 1] = bad
    with pytest.raises(DataError, match="1 of 4 rows hold NaN or infinity"):
        encode(rows, codec)


def test_subnormals_and_the_largest_float():
    tiny = np.float32(1e-45)
    assert np.array_equal(decode(**vars(encode(np.full((1, 2), tiny), "int8"))), np.zeros((1, 2), np.float32))
    top = np.finfo(np.float32).max
    with np.errstate(all="raise"):
        back = decode(**vars(encode(np.array([[top, -top, 0]], np.float32), "int8")))
    assert np.isfinite(back).all() and np.allclose(back / top, [[1, -1, 0]], atol=1e-6)


def test_float16_names_the_way_out_of_an_overflow():
    assert decode(**vars(encode(np.full((1, 1), 65504.0), "float16"))).item() == 65504
    with pytest.raises(DataError, match=r"70000 does not fit into float16.*codec int8"):
        encode(np.array([[1.0, -70000.0]]), "float16")


def test_values_beyond_float32_are_refused():
    with pytest.raises(DataError, match=r"NaN or infinity|does not fit"):
        encode(np.array([[1e300]]), "int8")


def test_an_outlier_row_does_not_coarsen_the_others():
    rows = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    alone = decode(**vars(encode(rows, "int8")))
    rows[7, 3] = 1e6  # an outlier channel of one token, as ViTs without registers have
    together = decode(**vars(encode(rows, "int8")))
    others = np.arange(50) != 7
    assert np.array_equal(alone[others], together[others])
    assert abs(together[7, 3] / 1e6 - 1) < 1e-6


def test_int8_keeps_the_direction_of_rows_with_an_outlier_channel():
    rows = np.random.default_rng(1).normal(size=(200, 384)).astype(np.float32)
    rows[:, 5] *= 20  # real backbones have such channels in every token
    back = decode(**vars(encode(rows, "int8")))
    cosine = (rows * back).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(back, axis=1)
    assert cosine.mean() > 0.999


def test_unknown_codec():
    with pytest.raises(UnknownNameError, match="did you mean 'int8'"):
        encode(np.zeros((1, 1)), "int")
