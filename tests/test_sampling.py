"""Sampling: who survives the filters, by llama.cpp's own samplers; and that draws follow the odds."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from scarlet_jax.errors import BadInput
from scarlet_jax.sampling import INVALID, Sampling, most_likely, sample
from scarlet_jax.tools.engines import ggml

V = 37
DRAWS = 20_000
LOGITS = np.random.default_rng(5).normal(0, 2, V).astype(np.float32)
FLAT = np.random.default_rng(6).normal(0, 0.1, V).astype(np.float32)

SETTINGS = [
    Sampling(1.0),
    Sampling(0.5),
    Sampling(1.7, top_k=5),
    Sampling(1.0, top_k=1),
    Sampling(1.0, top_k=V + 9),
    Sampling(0.8, top_p=0.9),
    Sampling(1.0, top_p=0.0),
    Sampling(2.5, min_p=0.1),
    Sampling(1.0, min_p=1.0),
    Sampling(0.7, top_k=20, top_p=0.95, min_p=0.02),
    Sampling(1.3, top_k=12, top_p=0.6),
    Sampling(1.0, top_k=20, top_p=0.2),
    Sampling(1.3, top_k=-1, top_p=0.8, min_p=0.3),
]


def probabilities(logits: np.ndarray, params: Sampling) -> np.ndarray:
    """The odds of each token, in float64, by the definition and one token at a time."""
    logits = logits.astype(np.float64)
    order = sorted(range(len(logits)), key=lambda id: (-logits[id], id))
    kept = order[: params.top_k] if params.top_k > 0 else order
    if params.top_p < 1:
        odds = np.exp(logits[kept] - logits[order[0]])
        odds /= odds.sum()
        reached = (n for n in range(1, len(kept)) if odds[:n].sum() >= params.top_p)
        kept = kept[: next(reached, len(kept))]
    if params.min_p > 0:
        kept = [id for id in kept if np.exp(logits[id] - logits[order[0]]) >= params.min_p]
    result = np.zeros(len(logits))
    result[kept] = np.exp((logits[kept] - logits[order[0]]) / params.temperature)
    return result / result.sum()


@functools.cache
def llama_samplers():
    lib = ctypes.CDLL(str(ggml.library().path))
    pointer, size, i32, f32 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32, ctypes.c_float
    for name, arguments in (
        ("top_k", [i32]),
        ("top_p", [f32, size]),
        ("min_p", [f32, size]),
        ("temp", [f32]),
    ):
        function = lib[f"llama_sampler_init_{name}"]
        function.restype, function.argtypes = pointer, arguments
        setattr(lib, f"llama_sampler_init_{name}", function)
    lib.llama_sampler_apply.argtypes = [pointer, pointer]
    lib.llama_sampler_free.argtypes = [pointer]
    return lib


class Candidate(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int32), ("logit", ctypes.c_float), ("p", ctypes.c_float)]


class Candidates(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.POINTER(Candidate)),
        ("size", ctypes.c_size_t),
        ("selected", ctypes.c_int64),
        ("sorted", ctypes.c_bool),
    ]


def by_llama_cpp(logits: np.ndarray, params: Sampling) -> np.ndarray:
    """The odds after llama.cpp's chain."""
    lib = llama_samplers()
    data = (Candidate * len(logits))(*[(id, float(x), 0.0) for id, x in enumerate(logits)])
    candidates = Candidates(data, len(logits), -1, False)
    for sampler in (
        lib.llama_sampler_init_top_k(params.top_k),
        lib.llama_sampler_init_top_p(params.top_p, 1),
        lib.llama_sampler_init_min_p(params.min_p, 1),
        lib.llama_sampler_init_temp(params.temperature),
    ):
        lib.llama_sampler_apply(sampler, ctypes.byref(candidates))
        lib.llama_sampler_free(sampler)
    left = candidates.data[: candidates.size]
    result = np.zeros(len(logits))
    result[[c.id for c in left]] = np.exp([c.logit - max(c.logit for c in left) for c in left])
    return result / result.sum()


@functools.partial(jax.jit, static_argnames="candidates")
def many(logits, keys, params, candidates=1024):
    return jax.vmap(lambda key: sample(logits, key, params, candidates=candidates))(keys)


def draws(logits: np.ndarray, params: Sampling, candidates: int = 1024) -> np.ndarray:
    return np.asarray(many(logits[None], jax.random.split(jax.random.key(11), DRAWS), params, candidates))[
        :, 0
    ]


def assert_follows(drawn: np.ndarray, odds: np.ndarray) -> None:
    """Nothing impossible was drawn, and a chi-square test of the rest does not object."""
    counts = np.bincount(drawn, minlength=len(odds))
    assert not counts[odds == 0].any()
    possible = odds * len(drawn) > 5  # the test's own condition; rarer tokens are pooled
    seen = np.append(counts[possible], counts[~possible].sum())
    expected = np.append(odds[possible], odds[~possible].sum()) * len(drawn)
    if expected[-1] < 1:
        seen, expected = seen[:-1], expected[:-1] * seen[:-1].sum() / expected[:-1].sum()
    if len(seen) > 1:
        # Seeds are fixed, so this is not a matter of luck; wrong odds give less than 1e-10 (see below).
        assert stats.chisquare(seen, expected).pvalue > 1e-3


@pytest.mark.parametrize("params", SETTINGS, ids=str)
@pytest.mark.parametrize("logits", [LOGITS, FLAT], ids=["peaked", "flat"])
def test_the_definition_is_llama_cpps(logits, params):
    # llama.cpp computes these in f32: 1e-6 is a few of its roundings.
    np.testing.assert_allclose(probabilities(logits, params), by_llama_cpp(logits, params), atol=1e-6)


@pytest.mark.parametrize("candidates", [1024, 8], ids=["all sorted", "8 tried first"])
@pytest.mark.parametrize("params", SETTINGS, ids=str)
@pytest.mark.parametrize("logits", [LOGITS, FLAT], ids=["peaked", "flat"])
def test_draws_follow_the_definition(logits, params, candidates):
    assert_follows(draws(logits, params, candidates), probabilities(logits, params))


RIGHT = Sampling(1.3, top_k=12, top_p=0.8, min_p=0.15)
WRONG = [
    dataclasses.replace(RIGHT, **change)
    for change in ({"temperature": 0.9}, {"top_k": 0}, {"top_k": 10}, {"top_p": 0.9}, {"min_p": 0.3})
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_the_test_would_show_wrong_odds(wrong):
    mild = LOGITS / 2
    drawn = draws(mild, RIGHT)
    assert_follows(drawn, probabilities(mild, RIGHT))
    with pytest.raises(AssertionError):
        assert_follows(drawn, probabilities(mild, wrong))


def test_temperature_zero_takes_the_first_of_the_most_likely():
    logits = np.array([[0.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, -np.inf]], np.float32)
    ids = sample(logits, jax.random.key(0), Sampling(0.0, top_k=3, top_p=0.5))
    assert ids.tolist() == [1, 0]
    assert ids.dtype == jnp.int32


def test_top_p_keeps_up_to_and_with_the_token_that_reaches_it():
    logits = np.log(np.array([0.125, 0.5, 0.125, 0.25], np.float32))
    for top_p, kept in ((0.4, {1}), (0.6, {1, 3}), (0.74, {1, 3}), (0.76, {1, 3, 0}), (0.9, {1, 3, 0, 2})):
        assert set(draws(logits, Sampling(1.0, top_p=top_p)).tolist()) == kept


def test_of_equal_logits_the_lower_ids_survive():
    logits = np.zeros(V, np.float32)
    assert set(draws(logits, Sampling(1.0, top_k=4)).tolist()) == {0, 1, 2, 3}
    assert set(draws(logits, Sampling(1.0, top_p=3.5 / V)).tolist()) == {0, 1, 2, 3}
    assert len(set(draws(logits, Sampling(1.0, min_p=1.0)).tolist())) == V


def test_a_token_of_logit_minus_infinity_is_never_drawn():
    logits = np.where(np.arange(V) % 3 == 0, LOGITS, -np.inf).astype(np.float32)
    for params in SETTINGS:
        assert not np.any(draws(logits, params) % 3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_no_distribution_is_marked_and_the_others_stand(temperature, top_k, broken):
    logits = np.tile(LOGITS, (3, 1))
    logits[1, :] = -np.inf
    logits[1, 4] = broken
    ids = np.asarray(sample(logits, jax.random.key(0), Sampling(temperature, top_k)))
    assert ids[1] == INVALID
    assert (ids[[0, 2]] >= 0).all()


def test_rows_are_drawn_independently():
    params = Sampling(1.0, top_k=6)
    keys = jax.random.split(jax.random.key(2), DRAWS)
    drawn = np.asarray(many(np.stack([LOGITS, LOGITS]), keys, params))
    odds = probabilities(LOGITS, params)
    joint = np.outer(odds, odds).ravel()
    assert_follows(drawn[:, 0] * V + drawn[:, 1], joint)


def test_the_most_likely_is_a_sample_at_temperature_0():
    logits = np.random.default_rng(0).standard_normal((9, V)).astype(np.float32)
    logits[1] = 3  # the first of equals
    logits[2, 5], logits[3, 5], logits[4, 5], logits[5] = np.nan, np.inf, -np.inf, -np.inf
    expected = np.asarray(sample(logits, jax.random.key(0), Sampling()))
    np.testing.assert_array_equal(most_likely(logits), expected)
    np.testing.assert_array_equal(expected[[2, 3, 5]], INVALID)


def test_other_values_do_not_compile_again():
    arrays = [Sampling(*map(jnp.asarray, (s.temperature, s.top_k, s.top_p, s.min_p))) for s in SETTINGS]
    for settings in (SETTINGS, arrays):
        sample(LOGITS[None], jax.random.key(0), settings[0])
        compiled: Any = sample
        before = compiled._cache_size()
        for params, seed in itertools.product(settings, (0, 1)):
            sample(LOGITS[None], jax.random.key(seed), params)
        assert compiled._cache_size() == before


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (Sampling(-0.1), "temperature is -0.1, expected 0"),
        (Sampling(float("nan")), "temperature is nan"),
        (Sampling(float("inf")), "temperature is inf"),
        (Sampling(top_k=2**31), "top_k is 2147483648"),
        (Sampling(top_p=1.1), "top_p is 1.1, expected 0 to 1"),
        (Sampling(min_p=-0.5), "min_p is -0.5, expected 0 to 1"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(params, message):
    with pytest.raises(BadInput, match=message):
        params.checked()
