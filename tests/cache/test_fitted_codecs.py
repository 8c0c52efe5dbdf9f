from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ditr_cache import fitted_codecs
from ditr_cache.codecs import FITTED_MAX, make_codec
from ditr_cache.errors import CorruptCacheError, DataError, UnknownNameError
from ditr_cache.fitted_codecs import fit_codec

C = 12
PCA = ["pca1-int8", "pca5-int8", "pca256-int8"]
PQ = ["pq1", "pq4", "pq5", "pq64"]  # one subspace; even ones; padded ones; one channel each
NEGLIGIBLE = 2e-36


def training_rows(count=600, dim=C, seed=0):
    """Rows with a mean and variances that fall by a factor of 100, in rotated axes."""
    basis = np.random.default_rng(7)
    axes = np.linalg.qr(basis.normal(size=(dim, dim)))[0]
    spread = np.logspace(0, -1, dim)
    rows = np.random.default_rng(seed).normal(size=(count, dim)) * spread @ axes + basis.normal(size=dim)
    return rows.astype(np.float32)


@cache
def fitted(name, magnitude=0):
    return fit_codec(name, training_rows() * np.float32(10.0**magnitude))


@st.composite
def rows_of_all_magnitudes(draw, span=30):
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    rows = draw(hnp.arrays(np.float64, st.tuples(st.integers(1, 6), st.just(C)), elements=st.floats(-1, 1)))
    power = draw(hnp.arrays(np.float64, (len(rows), 1), elements=st.floats(-span, span)))
    bound = float(np.finfo(dtype).max)
    return np.clip(rows * 10.0**power, -bound, bound).astype(dtype)


def lengths(rows):
    return np.linalg.norm(rows, axis=-1)


def there_and_back(codec, rows):
    encoded = codec.encode(rows)
    assert encoded.table.dtype == codec.dtype and encoded.table.shape == (len(rows), codec.width)
    assert codec.scaled == (encoded.scale is not None)
    assert encoded.scale is None or (encoded.scale.dtype == np.float32 and encoded.scale.shape == (len(rows),))
    back = codec.decode(encoded.table, encoded.scale)
    assert back.dtype == np.float32 and back.shape == (len(rows), codec.dim) and np.isfinite(back).all()
    return encoded, back.astype(np.float64)


@pytest.mark.parametrize("name", PCA)
@pytest.mark.parametrize("magnitude", [-30, 0, 30])
@given(rows=rows_of_all_magnitudes())
def test_pca_bound(name, magnitude, rows):
    codec = fitted(name, magnitude)
    mean, basis = (codec.arrays[key].astype(np.float64) for key in ("mean", "basis"))
    encoded, back = there_and_back(codec, rows)
    x = rows.astype(np.float32).astype(np.float64)
    z = (x - mean) @ basis.T / np.square(basis).sum(axis=1)
    step = np.abs(z).max(axis=1) / 127
    rounding = 2.0**-16 * (lengths(x) + lengths(mean)) + NEGLIGIBLE
    decoded_z = encoded.table * encoded.scale.astype(np.float64)[:, None]
    assert (np.abs(decoded_z - z) <= step[:, None] / 2 + rounding[:, None] / lengths(basis)).all()
    projection = z @ basis + mean
    bound = step / 2 * np.sqrt(np.square(basis).sum()) + rounding
    assert (lengths(back - projection) <= bound).all()
    # Pythagoras: what the projection loses and what int8 loses are perpendicular.
    whole = np.hypot(lengths(x - projection), lengths(back - projection))
    assert (np.abs(lengths(back - x) - whole) <= rounding).all()


@pytest.mark.parametrize("name", PCA)
@pytest.mark.parametrize("magnitude", [-30, 0, 30])
def test_pca_axes_are_the_principal_ones(name, magnitude):
    rows = training_rows().astype(np.float64)
    codec = fitted(name, magnitude)
    basis = codec.arrays["basis"].astype(np.float64)
    unit = basis / lengths(basis)[:, None]
    assert basis.shape == (codec.width, C) and codec.width == min(int(name[3:-5]), C)
    assert np.allclose(unit @ unit.T, np.eye(len(unit)), atol=1e-5)
    deviations = rows - rows.mean(axis=0)
    exact = np.linalg.svd(deviations, full_matrices=False)[1] ** 2
    kept = np.square(deviations @ unit.T).sum(axis=0)
    assert np.allclose(kept, exact[: len(kept)], rtol=2e-2)  # a few far rows were drawn in
    steps = (exact[: len(kept)] / exact[0]) ** (3 / 8)
    assert np.allclose(lengths(basis), steps, rtol=2e-2)
    assert np.allclose(codec.arrays["mean"] / np.float32(10.0**magnitude), rows.mean(axis=0), atol=0.05)


def test_pca_steps_lower_the_error_at_equal_bytes(monkeypatch):
    rows = training_rows(3000, 64)
    mean_error = {}
    for power in (0.0, 0.75):
        monkeypatch.setattr(fitted_codecs, "_STEP_POWER", power)
        mean_error[power] = np.square(there_and_back(fit_codec("pca64-int8", rows), rows)[1] - rows).mean()
    assert mean_error[0.75] < 0.6 * mean_error[0.0]


@pytest.mark.parametrize("name", PQ)
@pytest.mark.parametrize("magnitude", [-30, 0, 30])
@given(rows=rows_of_all_magnitudes(span=2))
def test_pq_takes_the_nearest_codeword_of_each_subspace(name, magnitude, rows):
    codec = fitted(name, magnitude)
    rows = rows.astype(np.float64) * 10.0**magnitude
    mean, rotation, books = (codec.arrays[key].astype(np.float64) for key in ("mean", "rotation", "codebooks"))
    encoded, back = there_and_back(codec, rows)
    x = rows.astype(np.float32).astype(np.float64)
    parts = ((x - mean) @ rotation.T).reshape(len(x), len(books), -1)
    square = np.square(parts[:, :, None] - books).sum(axis=3)  # [T, M, 256]
    taken = np.take_along_axis(square, encoded.table[..., None].astype(np.int64), axis=2)[..., 0]
    slack = 2.0**-16 * np.square(lengths(x - mean) + lengths(mean) + lengths(books).max())
    assert (taken <= square.min(axis=2) + slack[:, None]).all()
    words = books[np.arange(len(books)), encoded.table].reshape(len(x), -1)
    expected = words @ rotation + mean
    assert np.allclose(back, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", PQ)
@pytest.mark.parametrize("magnitude", [-30, 0])
@given(rows=rows_of_all_magnitudes())
def test_pq_of_rows_far_outside_goes_by_their_direction(name, magnitude, rows):
    codec = fitted(name, magnitude)
    mean, rotation, books = (codec.arrays[key].astype(np.float64) for key in ("mean", "rotation", "codebooks"))
    encoded, _ = there_and_back(codec, rows)
    x = rows.astype(np.float32).astype(np.float64)
    far = lengths(x) > 10.0 ** (7 + magnitude)
    parts = ((x - mean) @ rotation.T).reshape(len(x), len(books), -1)[far]
    product = np.einsum("tmd,mkd->tmk", parts, books)
    taken = np.take_along_axis(product, encoded.table[far][..., None].astype(np.int64), axis=2)[..., 0]
    assert (taken >= product.max(axis=2) - 1e-5 * lengths(x[far])[:, None] * lengths(books).max()).all()


@pytest.mark.parametrize("name", PQ)
def test_pq_arrays(name):
    codec = fitted(name)
    subspaces = min(int(name[2:]), C)
    each = -(-C // subspaces)
    rotation, books = codec.arrays["rotation"], codec.arrays["codebooks"]
    assert codec.width == subspaces and books.shape == (subspaces, 256, each)
    real = np.square(rotation).sum(axis=1) > 0.5
    assert real.sum() == C and not rotation[~real].any()
    assert np.allclose(rotation[real] @ rotation[real].T, np.eye(C), atol=1e-5)
    assert not books.transpose(0, 2, 1).reshape(-1, 256)[~real].any()
    assert len(np.unique(books[0], axis=0)) == 256


def test_pq_balances_variances_over_subspaces():
    rows = training_rows(4000, 32)
    rotation = fit_codec("pq4", rows).arrays["rotation"]
    variance = np.var(rows @ rotation.T, axis=0).reshape(4, 8)
    logs = np.log2(variance).sum(axis=1)
    assert np.ptp(logs) < 2  # of about 27; cut in their order, they would span 37


def test_pq_is_better_than_random_codewords_and_whole_bytes_of_axes():
    train, held_out = training_rows(4000, 32), training_rows(500, 32, seed=1)
    error = {}
    for name in ("pq8", "pca4-int8"):  # 8 bytes per row each
        error[name] = np.square(there_and_back(fit_codec(name, train), held_out)[1] - held_out).mean()
    assert error["pq8"] < 0.5 * error["pca4-int8"]
    codec = fit_codec("pq8", train)
    arrays = codec.arrays
    chosen = train[np.random.default_rng(0).choice(len(train), 256, replace=False)] - arrays["mean"]
    arrays["codebooks"] = (chosen @ arrays["rotation"].T).reshape(256, 8, 4).swapaxes(0, 1)
    sampled = make_codec("pq8", 32, arrays)
    assert error["pq8"] < 0.9 * np.square(there_and_back(sampled, held_out)[1] - held_out).mean()


@pytest.mark.parametrize("name", ["pca5-int8", "pca256-int8", "pq4", "pq64"])
def test_explained_variance(name):
    codec, rows = fitted(name), training_rows().astype(np.float64)
    _, back = there_and_back(codec, rows)
    expected = 1 - np.square(rows - back).sum() / np.square(rows - rows.mean(axis=0)).sum()
    assert codec.explained_variance == pytest.approx(expected, abs=1e-6) and 0.5 < expected < 1


@pytest.mark.parametrize("name", [*PCA, *PQ])
def test_what_was_stored_makes_the_same_codec(name):
    codec, rows = fitted(name), training_rows(50, seed=3)
    again = make_codec(name, C, {key: array.copy() for key, array in codec.arrays.items()})
    assert again.explained_variance == codec.explained_variance
    (first, one), (second, two) = there_and_back(codec, rows), there_and_back(again, rows)
    assert np.array_equal(first.table, second.table) and np.array_equal(one, two)


@pytest.mark.parametrize("name", ["pca5-int8", "pq4"])
def test_fitting_is_deterministic_and_takes_any_float(name):
    half = training_rows().astype(np.float16)
    first = fit_codec(name, half).arrays
    for dtype in (np.float16, np.float32, np.float64):
        again = fit_codec(name, half.astype(dtype)).arrays
        assert all(np.array_equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("name", ["pca5-int8", "pq4"])
def test_more_rows_than_are_needed_are_thinned_evenly(monkeypatch, name):
    rows = training_rows(1200)
    for limit in ("FIT_ROWS", "_WORD_ROWS", "_JUDGED_ROWS"):
        monkeypatch.setattr(fitted_codecs, limit, 300)
    thinned = rows[np.linspace(0, 1199, 300).astype(int)]
    many, few = fit_codec(name, rows).arrays, fit_codec(name, thinned).arrays
    assert all(np.array_equal(many[key], few[key]) for key in many)


@pytest.mark.parametrize("name", [*PCA, *PQ])
@pytest.mark.parametrize("count", [0, 1, 2049, 4096])
def test_rows_are_coded_block_by_block(name, count):
    codec, rows = fitted(name), training_rows(count, seed=5)
    encoded, back = there_and_back(codec, rows)
    at = count // 2 if count else 0
    alone = codec.decode(*vars(codec.encode(rows[at : at + 1])).values())
    assert np.allclose(alone, back[at : at + 1], atol=0.05)
    assert encoded.table.shape == (count, codec.width)


@pytest.mark.parametrize("name", ["pca5-int8", "pca256-int8", "pq4", "pq64"])
@pytest.mark.parametrize("constant", [0, 3.25, 1e30, 1e-30])
def test_constant_training_rows_come_back(name, constant):
    rows = np.full((400, C), constant, np.float32)
    codec = fit_codec(name, rows)
    assert codec.explained_variance == 1
    assert np.allclose(there_and_back(codec, rows[:3])[1], rows[:3], rtol=1e-6, atol=0)
    there_and_back(codec, training_rows(5))


@pytest.mark.parametrize("name", ["pca5-int8", "pq4"])
def test_training_rows_of_low_rank(name):
    rows = training_rows(500)
    rows[:, 3:] = rows[:, :1]
    rows[:, 1] = 0
    assert fit_codec(name, rows).explained_variance > 0.9


@pytest.mark.parametrize("name", ["pca3-int8", "pq4"])
def test_training_rows_most_of_which_are_the_same(name):
    rows = training_rows()
    rows[:, 3:] = rows[:, :1]
    rows[:400] = rows[0]
    assert fit_codec(name, rows).explained_variance > 0.99


@pytest.mark.parametrize("share", [1, 15])  # of each kind in the rows; 15 rows of one kind for each other
def test_training_rows_of_few_kinds_are_kept_exactly(share):
    kinds = training_rows(40)
    rows = np.concatenate([np.repeat(kinds, 16 - share, axis=0), np.repeat(kinds[:1], 40 * share, axis=0)])
    assert np.allclose(there_and_back(fit_codec("pq4", rows), kinds)[1], kinds, atol=1e-4)


@pytest.mark.parametrize("name", [*PCA, *PQ])
def test_rows_that_are_refused(name):
    codec, rows = fitted(name), training_rows(4)
    with pytest.raises(DataError, match=r"made for \[T, 12\]"):
        codec.encode(rows[:, :5])
    for bad in (np.nan, np.inf):
        rows[1, 2] = bad
        with pytest.raises(DataError, match="1 of 4 rows hold NaN or infinity"):
            codec.encode(rows)
    rows[1, 2] = 2 * FITTED_MAX
    with pytest.raises(DataError, match=rf"2e\+32 does not fit into {name} \(at most 1e\+32\); use the codec int8"):
        codec.encode(rows)


def test_training_rows_that_are_refused():
    for name, least in (("pca5-int8", 6), ("pca256-int8", 13), ("pq4", 256)):
        with pytest.raises(DataError, match=rf"{name}: expected at least {least}, got {least - 1}; extract more"):
            fit_codec(name, training_rows(least - 1))
        fit_codec(name, training_rows(least))
    for bad in (np.nan, np.inf):
        rows = training_rows()
        rows[5, 5] = bad
        with pytest.raises(DataError, match="1 of 600 rows hold NaN or infinity"):
            fit_codec("pca5-int8", rows)
    with pytest.raises(DataError, match="does not fit"):
        fit_codec("pca5-int8", training_rows() * np.float32(1e35))
    for shape in ((600,), (600, 0)):
        with pytest.raises(DataError, match=r"expected \[M, C\]"):
            fit_codec("pca5-int8", np.zeros(shape))
    with pytest.raises(UnknownNameError):
        fit_codec("pca", training_rows())


def test_a_codec_that_fits_nothing_is_just_made():
    codec = fit_codec("int8", training_rows(3))
    assert (codec.name, codec.dim, codec.arrays) == ("int8", C, {})


@pytest.mark.parametrize("name", ["pca5-int8", "pq5"])
def test_stored_arrays_are_checked(name):
    arrays = fitted(name).arrays
    for key, array in arrays.items():
        broken = {
            "expected": {k: v for k, v in arrays.items() if k != key},
            f"{key} is float64": {**arrays, key: array.astype(np.float64)},
            f"{key} is float32": {**arrays, key: array[:-1]},
            f"{key} holds NaN": {**arrays, key: np.where(np.arange(array.size).reshape(array.shape), array, np.nan)},
            f"{key} holds NaN, infinity or absurd": {**arrays, key: np.full_like(array, 1e35)},
        }
        for message, stored in broken.items():
            stored = {k: v.astype(np.float32) if "holds" in message else v for k, v in stored.items()}
            with pytest.raises(CorruptCacheError, match=message):
                make_codec(name, C, stored)
    with pytest.raises(CorruptCacheError, match="got none"):
        make_codec(name, C)
    with pytest.raises(CorruptCacheError, match="expected"):
        make_codec(name, C, {**arrays, "more": arrays["mean"]})
    with pytest.raises(CorruptCacheError, match=r"not in 0\.\.1"):
        make_codec(name, C, {**arrays, "explained_variance": np.array([1.5], np.float32)})
    with pytest.raises(CorruptCacheError, match="float32"):
        make_codec(name, C + 1, arrays)
    if name.startswith("pca"):
        with pytest.raises(CorruptCacheError, match="row of the basis is zero"):
            make_codec(name, C, {**arrays, "basis": np.zeros_like(arrays["basis"])})
        with pytest.raises(CorruptCacheError, match="without their scales"):
            fitted(name).decode(np.zeros((1, 5), np.int8), None)
