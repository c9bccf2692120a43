"""topk_with_tail against float64: exact log-probs of the head, both moments of the tail, pads and padded columns."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logitstore_kernels import topk_with_tail


def truth_of(logits_NV, ids_NK):
    """(log-probs of the ids, tail log-mass, tail half log-moment) of softmax(logits) in float64."""
    logp_NV = logits_NV.double().log_softmax(dim=1)
    in_tail_NV = torch.ones_like(logp_NV, dtype=torch.bool).scatter_(1, ids_NK.long(), False)
    tail_NV = logp_NV.masked_fill(~in_tail_NV, -math.inf)
    return logp_NV.gather(1, ids_NK.long()), tail_NV.logsumexp(dim=1), (tail_NV / 2).logsumexp(dim=1)


def logits_of(n, v, *, seed=0, spread=3.0):
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "v", "k"), [(7, 1003, 16), (1, 5, 1), (3, 50_001, 64), (4, 33, 32)])
def test_against_float64(dtype, n, v, k):
    logits_NV = logits_of(n, v).to(dtype)
    kept = topk_with_tail(logits_NV, k)
    logps_NK, mass_N, half_N = truth_of(logits_NV, kept.ids_NK)
    largest_NK = logits_NV.double().log_softmax(1).sort(dim=1, descending=True).values[:, :k]
    assert kept.ids_NK.dtype == torch.int32
    assert {x.dtype for x in kept[1:]} == {torch.float32}
    torch.testing.assert_close(logps_NK, largest_NK, rtol=0, atol=0)
    plain_NK = logits_NV.float().log_softmax(1).gather(1, kept.ids_NK.long()).double()
    assert (kept.logps_NK - logps_NK).abs().max() <= 2 * (plain_NK - logps_NK).abs().max() + 2e-7
    torch.testing.assert_close(kept.tail_logmass_N.double(), mass_N, rtol=2e-7, atol=1e-6)
    torch.testing.assert_close(kept.tail_logmoment_half_N.double(), half_N, rtol=2e-7, atol=1e-6)


def test_entries_descend_and_equal_ones_are_in_order_of_id():
    kept = topk_with_tail(torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, -1.0]]), 4)
    assert kept.ids_NK.tolist() == [[1, 3, 2, 4]]
    kept = topk_with_tail(logits_of(5, 997).bfloat16(), 200)
    order = list(zip((-kept.logps_NK).flatten().tolist(), kept.ids_NK.flatten().tolist(), strict=True))
    for row in range(5):
        assert order[row * 200 : row * 200 + 200] == sorted(order[row * 200 : row * 200 + 200])


@pytest.mark.parametrize("k", [6, 7, 1000])
def test_k_of_the_vocabulary_or_more_leaves_no_tail(k):
    logits_NV = logits_of(3, 6)
    kept = topk_with_tail(logits_NV, k)
    assert kept.ids_NK.sort(dim=1).values.tolist() == [list(range(6))] * 3
    torch.testing.assert_close(kept.logps_NK.double(), truth_of(logits_NV, kept.ids_NK)[0], rtol=2e-7, atol=2e-7)
    assert (kept.tail_logmass_N == -math.inf).all()
    assert (kept.tail_logmoment_half_N == -math.inf).all()


@pytest.mark.parametrize("k", [3, 11])
def test_padded_columns_take_no_part(k):
    logits_NV = logits_of(4, 11)
    padded_NW = torch.cat([logits_NV, torch.full((4, 5), 40.0)], dim=1)
    padded_NW[0, 12] = math.nan
    for got, expected in zip(topk_with_tail(padded_NW, k, vocab_size=11), topk_with_tail(logits_NV, k), strict=True):
        assert torch.equal(got, expected)


def test_a_token_of_probability_0_is_no_entry():
    inf = math.inf
    logits_NV = torch.tensor([[0.0, -inf, math.log(3), -inf, -inf], [0.0, 0.0, 0.0, 0.0, -inf]])
    kept = topk_with_tail(logits_NV, 3)
    assert kept.ids_NK[0].tolist() == [2, 0, -1]
    torch.testing.assert_close(kept.logps_NK[0].exp(), torch.tensor([0.75, 0.25, 0.0]))
    assert kept.tail_logmass_N[0] == kept.tail_logmoment_half_N[0] == -inf
    torch.testing.assert_close(kept.tail_logmass_N[1].exp(), torch.tensor(0.25))
    torch.testing.assert_close(kept.tail_logmoment_half_N[1].exp(), torch.tensor(0.5))


def test_a_tail_of_1e_minus_30_keeps_its_digits():
    logits_NV = logits_of(4, 1001, spread=1.0)
    logits_NV[:, 500] += 76.0
    kept = topk_with_tail(logits_NV, 1)
    _, mass_N, half_N = truth_of(logits_NV, kept.ids_NK)
    assert (mass_N < math.log(1e-29)).all()
    torch.testing.assert_close(kept.tail_logmass_N.double(), mass_N, rtol=3e-7, atol=0)
    torch.testing.assert_close(kept.tail_logmoment_half_N.double(), half_N, rtol=3e-7, atol=0)


@pytest.mark.parametrize("k", [1, 16, 1003])
@pytest.mark.parametrize("min_prob", [0.9, 0.02, 1e-3])
def test_entries_below_a_probability_belong_to_the_tail(k, min_prob):
    logits_NV = logits_of(40, 1003)
    logits_NV[0] = 0.0  # nothing reaches the probability, and the first entry stays
    kept, all_k = topk_with_tail(logits_NV, k, min_prob=min_prob), topk_with_tail(logits_NV, k)
    entry_NK = kept.ids_NK >= 0
    expected_NK = all_k.logps_NK.double().exp() >= min_prob
    expected_NK[:, 0] = True
    assert torch.equal(entry_NK, expected_NK)
    assert torch.equal(kept.ids_NK, all_k.ids_NK.masked_fill(~expected_NK, -1))
    assert torch.equal(kept.logps_NK, all_k.logps_NK.masked_fill(~expected_NK, -math.inf))
    logp_NV = logits_NV.double().log_softmax(dim=1)
    for row in range(40):
        tail = torch.ones(1003, dtype=torch.bool)
        tail[kept.ids_NK[row][entry_NK[row]].long()] = False
        tail_logp = logp_NV[row][tail]
        torch.testing.assert_close(kept.tail_logmass_N[row].double(), tail_logp.logsumexp(0), rtol=3e-7, atol=1e-6)
        half = (tail_logp / 2).logsumexp(0)
        torch.testing.assert_close(kept.tail_logmoment_half_N[row].double(), half, rtol=3e-7, atol=1e-6)


def test_a_shift_of_the_logits_changes_nothing():
    logits_NV = (logits_of(4, 257) * 64).round() / 64  # so that adding 512 is exact
    for got, expected in zip(topk_with_tail(logits_NV + 512, 9), topk_with_tail(logits_NV, 9), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@given(
    n=st.integers(0, 9),
    v=st.integers(1, 70),
    k=st.integers(1, 80),
    chunk_rows=st.integers(1, 10),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_chunks_and_input_are_left_as_they_were(n, v, k, chunk_rows, seed):
    logits_NV = logits_of(n, v, seed=seed)
    before = logits_NV.clone()
    whole, chunked = (
        topk_with_tail(logits_NV, k, chunk_rows=max(n, 1)),
        topk_with_tail(logits_NV, k, chunk_rows=chunk_rows),
    )
    assert torch.equal(logits_NV, before)
    assert whole.ids_NK.shape == (n, min(k, v))
    for got, expected in zip(chunked, whole, strict=True):
        assert torch.equal(got, expected)
    total = whole.logps_NK.double().exp().sum(1) + whole.tail_logmass_N.double().exp()
    torch.testing.assert_close(total, torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-5)


def test_no_graph_and_strided_input():
    logits_NV = logits_of(4, 50).t().contiguous().t().requires_grad_()
    kept = topk_with_tail(logits_NV, 5)
    assert not kept.logps_NK.requires_grad
    assert torch.equal(kept.logps_NK, topk_with_tail(logits_NV.detach().contiguous(), 5).logps_NK)


def test_nothing_is_read_by_the_host():
    assert topk_with_tail(torch.empty(4, 50, device="meta"), 5).ids_NK.shape == (4, 5)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (([[0.0]], 1), {}, TypeError, "logits_NV must be a torch.Tensor, got list"),
        ((torch.zeros(2, 3).long(), 1), {}, TypeError, r"logits_NV must be of a float dtype, got torch\.int64"),
        ((torch.zeros(1, 2, 3), 1), {}, ValueError, r"logits_NV must be \[N, V\], got shape \(1, 2, 3\); flatten"),
        ((torch.zeros(2, 3), 0), {}, ValueError, "k must be at least 1, got 0"),
        ((torch.zeros(2, 3), 2.0), {}, TypeError, "k must be an int, got float"),
        ((torch.zeros(2, 3), 1), {"vocab_size": 4}, ValueError, "logits_NV has 3 columns, fewer than vocab_size=4"),
        ((torch.zeros(2, 3), 1), {"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
        ((torch.zeros(2, 3), 1), {"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1, got 0"),
        ((torch.zeros(2, 3), 1), {"min_prob": 0.0}, ValueError, r"min_prob must be in \(0, 1\), got 0\.0"),
        ((torch.zeros(2, 3), 1), {"min_prob": "0.1"}, TypeError, "min_prob must be a number or None, got str"),
    ],
)  # fmt: skip
def test_what_is_refused(args, options, error, message):
    with pytest.raises(error, match=message):
        topk_with_tail(*args, **options)


@pytest.mark.parametrize("vocab_size", [8_320, 8_351, 49_155])
@pytest.mark.parametrize("kind", ["normal", "ties", "crowded", "minus infinity"])
def test_search_by_blocks_finds_what_topk_finds(vocab_size: int, kind: str) -> None:
    """Widths that are and are not whole blocks; the largest logits spread, tied, or all in one block's columns."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(7, vocab_size, generator=generator)
    if kind == "ties":
        logits_NV = logits_NV.bfloat16().float()
    elif kind == "crowded":
        logits_NV[:, 3 :: vocab_size // 32] += 50
        logits_NV[:, -5:] += 60
    elif kind == "minus infinity":
        logits_NV[:, 70:] = -torch.inf
    found = topk_with_tail(logits_NV, 64)
    truth_NV = logits_NV.double().log_softmax(dim=1)
    torch.testing.assert_close(found.logps_NK.double(), truth_NV.topk(64, dim=1).values, atol=4e-6, rtol=0)
    assert all(len(set(row.tolist())) == 64 for row in found.ids_NK)
    rest_NV = truth_NV.scatter(1, found.ids_NK.long(), -torch.inf)
    torch.testing.assert_close(found.tail_logmass_N.double(), rest_NV.logsumexp(dim=1), atol=4e-6, rtol=0)
    torch.testing.assert_close(found.tail_logmoment_half_N.double(), (rest_NV / 2).logsumexp(dim=1), atol=4e-6, rtol=0)
