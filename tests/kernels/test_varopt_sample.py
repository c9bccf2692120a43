"""varopt_sample against its numpy twin: the same tokens with the same weights from the same uniforms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logitstore_kernels import varopt_sample

from logitstore import sampling


def assert_same(logits_NV, k, uniforms_N, **options):
    got = varopt_sample(torch.from_numpy(logits_NV), k, torch.from_numpy(uniforms_N), **options)
    chunked = varopt_sample(torch.from_numpy(logits_NV), k, torch.from_numpy(uniforms_N), chunk_rows=3, **options)
    p_NV = sampling.probabilities(logits_NV.astype(np.float32))
    expected = sampling.varopt_sample(p_NV, k, uniforms_N, max_weight=options.get("max_weight"))
    for one, again, other in zip(got, chunked, expected, strict=True):
        assert torch.equal(one, again)
        assert one.numpy().dtype == other.dtype
    np.testing.assert_array_equal(got.ids_NK.numpy(), expected.ids)
    np.testing.assert_array_equal(got.n_exact_N.numpy(), expected.n_exact)
    np.testing.assert_allclose(got.logweights_NK.numpy(), expected.logweights, rtol=1e-6, atol=1e-7)
    return got


@given(
    n=st.integers(0, 7), v=st.integers(1, 300), k=st.integers(1, 40), seed=st.integers(0, 2**20),
    spread=st.sampled_from([0.0, 1.0, 5.0, 60.0]), max_weight=st.sampled_from([None, 0.5, 0.05, 0.01]),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_it_draws_what_numpy_draws(n, v, k, seed, spread, max_weight):
    rng = np.random.default_rng(seed)
    logits_NV = (spread * rng.normal(size=(n, v))).astype(np.float32)
    if v > 3 and n:
        logits_NV[0, : v // 2] = -np.inf
    assert_same(logits_NV, k, rng.random(n), max_weight=max_weight)


@pytest.mark.parametrize("max_weight", [None, 0.03])
def test_a_real_vocabulary(max_weight):
    rng = np.random.default_rng(0)
    rows = assert_same(4 * rng.normal(size=(6, 49_157)).astype(np.float32), 34, rng.random(6), max_weight=max_weight)
    assert (rows.n_exact_N > 0).all()
    assert (rows.n_exact_N < 34).all()
    torch.testing.assert_close(rows.logweights_NK.double().exp().sum(dim=1), torch.ones(6, dtype=torch.float64))


def test_padded_columns_and_half_precision():
    rng = np.random.default_rng(1)
    logits_NV = torch.from_numpy(rng.normal(size=(5, 90))).bfloat16()
    uniforms_N = torch.from_numpy(rng.random(5))
    wide_NW = torch.cat([logits_NV, torch.full((5, 6), 50.0, dtype=torch.bfloat16)], dim=1)
    expected = assert_same(logits_NV.float().numpy(), 8, uniforms_N.numpy())
    for one, other in zip(varopt_sample(wide_NW, 8, uniforms_N, vocab_size=90), expected, strict=True):
        assert torch.equal(one, other)


def test_a_row_that_is_no_distribution_is_nan():
    logits_NV = torch.zeros(3, 30)
    logits_NV[0, 2], logits_NV[1] = math.nan, -math.inf
    rows = varopt_sample(logits_NV, 4, torch.rand(3))
    assert rows.logweights_NK.isnan().any(dim=1).tolist() == [True, True, False]


def test_nothing_is_read_by_the_host():
    rows = varopt_sample(torch.empty(4, 50, device="meta"), 5, torch.empty(4, device="meta"), max_weight=0.1)
    assert rows.ids_NK.shape == (4, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits_NV": torch.zeros(3, 9).long()}, TypeError, "logits_NV must be of a float dtype"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"uniforms_N": [0.1, 0.2, 0.3]}, TypeError, "uniforms_N must be a float tensor, got <class 'list'>"),
        ({"uniforms_N": torch.zeros(3).long()}, TypeError, "uniforms_N must be a float tensor, got torch.int64"),
        ({"uniforms_N": torch.zeros(3, 1)}, ValueError, r"shape \(3,\) on cpu, got \(3, 1\) on cpu"),
        ({"uniforms_N": torch.zeros(3, device="meta")}, ValueError, r"got \(3,\) on meta"),
        ({"max_weight": 0.0}, ValueError, r"max_weight must be in \(0, 1\), got 0.0"),
        ({"vocab_size": 10}, ValueError, "logits_NV has 9 columns, fewer than vocab_size=10"),
    ],
)
def test_what_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        varopt_sample(**({"logits_NV": torch.zeros(3, 9), "k": 4, "uniforms_N": torch.zeros(3)} | change))
