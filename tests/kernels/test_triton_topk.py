"""The Triton kernel of topk_with_tail, run by the interpreter: against float64, and the PyTorch form."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logitstore_kernels import topk_with_tail
from logitstore_kernels.dispatch import why_not_the_topk_kernel

pytest.importorskip("triton", reason="the kernels need Triton, which is for Linux")
pytestmark = pytest.mark.usefixtures("triton_interpreter")


def logits_of(n, v, *, seed=0, spread=3.0):
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed)) * spread


def check_against_float64(logits_NW, k, *, vocab_size=None):
    """Head, tail moments, order and pads of finite or -inf logits with one finite a row."""
    v = vocab_size or logits_NW.shape[1]
    assert why_not_the_topk_kernel(logits_NW, min(k, v), v) is None
    before = logits_NW.clone()
    kept = topk_with_tail(logits_NW, k, vocab_size=vocab_size)
    torch.testing.assert_close(logits_NW, before, rtol=0, atol=0, equal_nan=True)
    logp_NV = logits_NW[:, :v].double().log_softmax(dim=1)
    largest_NK = logp_NV.topk(min(k, v), dim=1).values
    entry_NK = kept.ids_NK >= 0
    assert torch.equal(entry_NK, largest_NK > -math.inf)
    for row in range(len(logp_NV)):
        ids = kept.ids_NK[row][entry_NK[row]].long()
        assert len(set(ids.tolist())) == len(ids)
        torch.testing.assert_close(logp_NV[row][ids], largest_NK[row][: len(ids)], rtol=0, atol=0)
        order = list(zip((-logp_NV[row][ids]).tolist(), ids.tolist(), strict=True))
        assert order == sorted(order)
        rest = torch.ones(v, dtype=torch.bool).index_fill(0, ids, False)
        tail = logp_NV[row][rest]
        for got, exact in ((kept.tail_logmass_N, tail), (kept.tail_logmoment_half_N, tail / 2)):
            torch.testing.assert_close(got[row].double(), exact.logsumexp(0), rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(kept.logps_NK.double(), largest_NK, rtol=2e-7, atol=6e-7)
    return kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [1, 8, 64])
def test_against_float64(dtype, k):
    for n, v in ((2, 20_011), (3, 1003), (2, 4096), (1, 65)):
        check_against_float64(logits_of(n, v).to(dtype), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_vocabulary_and_the_most_entries(dtype):
    check_against_float64(logits_of(1, 151_937).to(dtype), 127)


def test_the_entries_and_their_order_are_those_of_the_pytorch_form(monkeypatch):
    """Distinct logits but for -0 and 0, and for equals that are all kept."""
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.stack([torch.randperm(5001, generator=generator) for _ in range(3)]).float()
    logits_NV[0] -= 4990.0  # most are below 0
    logits_NV[1, [7, 4000, 11]] = 6000.0
    logits_NV[2] = -logits_NV[2]
    logits_NV[2, [3, 4]] = torch.tensor([-0.0, 0.0])
    by_kernel = topk_with_tail(logits_NV, 64)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    plain = topk_with_tail(logits_NV, 64)
    assert torch.equal(by_kernel.ids_NK, plain.ids_NK)
    for got, expected in zip(by_kernel[1:], plain[1:], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [1, 8, 64])
def test_ties_at_the_last_place_are_shared_between_head_and_tail(k):
    logits_NV = torch.stack([torch.zeros(700), logits_of(1, 700)[0].round(), torch.arange(700.0) // 100])
    check_against_float64(logits_NV, k)


@pytest.mark.parametrize("k", [6, 7, 1000])
def test_k_of_the_vocabulary_leaves_no_tail(k):
    kept = check_against_float64(logits_of(3, 6), k)
    assert (kept.tail_logmass_N == -math.inf).all()
    assert (kept.tail_logmoment_half_N == -math.inf).all()


def test_minus_inf_is_never_an_entry():
    inf = math.inf
    logits_NV = logits_of(4, 300)
    logits_NV[0, 1:] = -inf
    logits_NV[1, :290] = -inf
    logits_NV[2, ::2] = -inf
    kept = check_against_float64(logits_NV, 12)
    assert kept.ids_NK[0].tolist() == [0] + [-1] * 11
    assert kept.tail_logmass_N[1] == kept.tail_logmoment_half_N[1] == -inf
    assert not any(column.isnan().any() for column in kept[1:])


def test_tails_of_1e_minus_30_and_less_keep_their_digits():
    logits_NV = logits_of(3, 1001, spread=1.0)
    for row, lead in enumerate((76.0, 200.0, 1e4)):
        logits_NV[row, 500] += lead
    kept = check_against_float64(logits_NV, 1)
    assert (kept.tail_logmass_N < math.log(1e-29)).all()


@pytest.mark.parametrize("k", [3, 11])
def test_padded_columns_and_gaps_between_rows_take_no_part(k):
    wide = torch.full((4, 40), math.nan)
    wide[:, :11] = logits_of(4, 11)
    check_against_float64(wide[:, :16], k, vocab_size=11)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_are_not_hidden(bad):
    logits_NV = logits_of(3, 500)
    logits_NV[1, 123] = bad
    logits_NV[2] = -math.inf
    kept = topk_with_tail(logits_NV, 8)
    assert kept.tail_logmass_N.isnan().tolist() == [False, True, True]
    assert kept.tail_logmoment_half_N.isnan().tolist() == [False, True, True]


def test_min_prob_and_chunks_are_as_without_the_kernel(monkeypatch):
    logits_NV = logits_of(5, 1003)
    by_kernel = topk_with_tail(logits_NV, 16, min_prob=0.02, chunk_rows=2)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    plain = topk_with_tail(logits_NV, 16, min_prob=0.02)
    assert torch.equal(by_kernel.ids_NK, plain.ids_NK)
    for got, expected in zip(by_kernel[1:], plain[1:], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert topk_with_tail(logits_NV[:0], 4).ids_NK.shape == (0, 4)


@given(v=st.integers(1, 300), k=st.integers(1, 40), levels=st.integers(1, 400), seed=st.integers(0, 2**20))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_vocabulary_k_and_number_of_distinct_logits(v, k, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    logits_NV = torch.randint(levels, (1, v), generator=generator) / 16 - levels / 32
    check_against_float64(logits_NV, k)


@pytest.mark.parametrize(
    ("logits", "k", "reason"),
    [
        (torch.zeros(1, 4096), 64, None),
        (torch.zeros(1, 4096).double(), 4, "computes in float32, and the logits are torch.float64"),
        (torch.zeros(1, 4096)[:, ::2], 4, "needs rows of neighbouring elements"),
        (torch.zeros(1, 262_144), 127, None),
        (torch.zeros(1, 262_144), 512, "k = 512 of 262144 is more than one program holds"),
    ],
    ids=str,
)
def test_what_the_kernel_takes(logits, k, reason):
    refusal = why_not_the_topk_kernel(logits, k, logits.shape[1])
    assert refusal is None if reason is None else reason in refusal
