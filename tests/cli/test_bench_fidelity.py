"""KL, total variation, squared error and their standard error, against numbers worked out by hand and in float64."""

import math

import numpy as np
import pytest
from logitstore_trainer.bench.fidelity import Estimate, estimate, row_divergences

import logitstore


def _log(*probabilities):
    with np.errstate(divide="ignore"):
        return np.log(np.array([probabilities])).astype(np.float32)


def test_divergences_of_two_coins():
    found = row_divergences(_log(0.5, 0.5), _log(0.25, 0.75), temperature=1.0)
    assert found.kl[0] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-7)
    assert found.tv[0] == pytest.approx(0.25, abs=1e-7)
    assert found.squared[0] == pytest.approx(2 * 0.25**2, abs=1e-7)


def test_the_teacher_is_tempered_and_q_is_taken_as_it_is():
    # p = (0.8, 0.2) at T = 2 is (2, 1) / 3
    found = row_divergences(_log(0.8, 0.2), _log(0.5, 0.5), temperature=2.0)
    assert found.kl[0] == pytest.approx(2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3), abs=1e-7)
    assert found.tv[0] == pytest.approx(1 / 6, abs=1e-7)


def test_tokens_of_probability_zero():
    # what the teacher rules out adds nothing, even where q rules it out too; the reverse is infinite
    both = row_divergences(_log(1.0, 0.0, 0.0), _log(0.5, 0.5, 0.0), temperature=1.0)
    assert both.kl[0] == pytest.approx(math.log(2), abs=1e-7)
    missing = row_divergences(_log(0.5, 0.5), _log(1.0, 0.0), temperature=1.0)
    assert missing.kl[0] == math.inf
    assert missing.tv[0] == pytest.approx(0.5, abs=1e-7)
    assert missing.squared[0] == pytest.approx(2 * 0.5**2, abs=1e-7)


def test_absent_rows_are_nan_and_rows_beyond_q_are_not_read():
    logits = np.concatenate([_log(0.5, 0.5), _log(0.5, 0.5), _log(0.9, 0.1)])
    q = np.concatenate([_log(0.5, 0.5), np.full((1, 2), np.nan, np.float32)])
    found = row_divergences(logits, q, temperature=1.0)
    assert found.kl.shape == (2,)
    assert found.kl[0] == pytest.approx(0, abs=1e-7)
    assert np.isnan(found.kl[1])
    assert np.isnan(found.tv[1])
    assert np.isnan(found.squared[1])


def test_every_kind_of_logits_in_many_chunks_equals_plain_float64():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    hidden, lm_head = rng.standard_normal((7, 5)).astype(np.float32), rng.standard_normal((30, 5)).astype(np.float32)
    logits = hidden @ lm_head.T
    q = rng.standard_normal((6, 30))
    q = (q - np.log(np.exp(q).sum(1, keepdims=True))).astype(np.float32)
    x = logits[:6].astype(np.float64) / 2
    logp = x - np.log(np.exp(x).sum(1, keepdims=True))
    kl = (np.exp(logp) * (logp - q)).sum(1)
    tv = np.abs(np.exp(logp) - np.exp(q.astype(np.float64))).sum(1) / 2
    squared = np.square(np.exp(logp) - np.exp(q.astype(np.float64))).sum(1)
    for form in (logits, torch.from_numpy(logits), logitstore.FactoredLogits(hidden, lm_head)):
        found = row_divergences(form, q, temperature=2.0, chunk_bytes=2 * 4 * 30)  # two rows at a time
        np.testing.assert_allclose(found.kl, kl, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(found.tv, tv, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(found.squared, squared, rtol=1e-6, atol=1e-9)


def test_shapes_and_temperatures_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"logits \(1, 2\) do not cover the 2 x 2 reconstruction"):
        row_divergences(_log(0.5, 0.5), np.zeros((2, 2), np.float32), temperature=1.0)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        row_divergences(_log(0.5, 0.5), _log(0.5, 0.5), temperature=0)


def test_standard_error_for_equal_lengths_is_that_of_the_sequence_means():
    means = np.array([0.3, 0.5, 0.1, 0.4])
    found = estimate(means * 10, [10] * 4)
    assert found.mean == pytest.approx(means.mean())
    assert found.se == pytest.approx(means.std(ddof=1) / 2)


def test_standard_error_for_unequal_lengths_by_hand():
    # mean = 6 / 4 = 1.5; residuals 1 - 1.5 and 5 - 4.5; sqrt(2 * (0.25 + 0.25)) / 4
    assert estimate([1.0, 5.0], [1, 3]) == Estimate(1.5, pytest.approx(0.25))


def test_estimates_that_are_not_defined_are_none():
    assert estimate([1.0], [2]) == Estimate(0.5, None)
    assert estimate([1.0, math.inf], [2, 2]) == Estimate(None, None)
    assert estimate([math.nan, 1.0], [2, 2]) == Estimate(None, None)
    assert estimate([], []) == Estimate(None, None)
