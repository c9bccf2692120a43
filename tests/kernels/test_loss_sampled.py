"""The loss of weighted samples against numpy float64 by hand, in value and gradient, and what it estimates."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logitstore_kernels import TeacherBatch, distillation_loss, distillation_loss_parts
from logitstore_kernels.reference import distillation_loss_parts_reference, distillation_loss_reference

LOSSES = [distillation_loss, distillation_loss_reference]
IDS = torch.tensor([[4, 1], [0, -1], [-1, -1]], dtype=torch.int32)
LOGWEIGHTS = torch.tensor([[0.75, 0.25], [1.0, 9.0], [9.0, 9.0]]).log()


def make_samples(n, v, k, *, seed=0, spread=3.0, total=1.0, n_pads=0):
    """(student logits [N, V], samples of random weights that sum to `total`, labels [N]), float64."""
    rng = torch.Generator().manual_seed(seed)
    logits_NV = torch.randn(n, v, generator=rng, dtype=torch.float64) * spread
    ids_NK = torch.rand(n, v, generator=rng).argsort(dim=1)[:, : min(k, v)]
    weights_NK = torch.rand(n, ids_NK.shape[1], generator=rng, dtype=torch.float64) + 1e-3
    for _ in range(n_pads if n and ids_NK.shape[1] > 1 else 0):
        row, place = (
            int(torch.randint(low, high, (1,), generator=rng)) for low, high in ((0, n), (1, ids_NK.shape[1]))
        )
        ids_NK[row, place] = -1
    weights_NK[ids_NK < 0] = 0
    weights_NK *= total / weights_NK.sum(dim=1, keepdim=True)
    samples = TeacherBatch.from_samples(ids_NK, weights_NK.log(), vocab_size=v)
    return logits_NV, samples, torch.randint(0, v, (n,), generator=rng)


def by_hand(logits_NV, samples, labels_N, alpha):
    """Value [N] and gradient [N, V] of each row in numpy float64: sum w (ln w - ln q), and q * sum(w) - w."""
    values, gradients = [], []
    for z, ids, logw, label in zip(
        logits_NV.double().numpy(), samples.ids_NK.numpy(), samples.logprobs_NK.double().numpy(), labels_N.tolist(),
        strict=True,
    ):  # fmt: skip
        logq = z - z.max() - np.log(np.exp(z - z.max()).sum())
        if not (ids >= 0).any() or label == -100:
            values.append(0.0)
            gradients.append(np.zeros(len(z)))
            continue
        w, one_hot = np.zeros(len(z)), np.zeros(len(z))
        w[ids[ids >= 0]], one_hot[label] = np.exp(logw[ids >= 0]), 1
        kept = w > 0
        kl = (w[kept] * (np.log(w[kept]) - logq[kept])).sum()
        values.append(alpha * kl - (1 - alpha) * logq[label])
        gradients.append(alpha * (np.exp(logq) * w.sum() - w) + (1 - alpha) * (np.exp(logq) - one_hot))
    return torch.tensor(values, dtype=torch.float64), torch.from_numpy(np.array(gradients).reshape(logits_NV.shape))


@pytest.mark.parametrize("loss_function", LOSSES)
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("total", [1.0, 0.8, 1.7])
def test_float64_is_the_sum_by_hand(value_and_gradient, loss_function, alpha, total):
    logits_NV, samples, labels_N = make_samples(6, 23, 5, total=total, n_pads=4)
    labels_N[2] = -100
    loss, gradient = value_and_gradient(
        loss_function, logits_NV, samples, labels_N, 1.0, alpha, "sampled", -100, "none"
    )
    expected, expected_gradient = by_hand(logits_NV, samples, labels_N, alpha)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("loss_function", LOSSES)
@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
def test_gradcheck(loss_function, alpha):
    logits_NV, samples, labels_N = make_samples(3, 11, 4, total=1.3)
    labels_N[1] = -100
    assert torch.autograd.gradcheck(
        lambda z: loss_function(z, samples, labels_N, 1.0, alpha, "sampled"), logits_NV.requires_grad_()
    )


@given(
    n=st.integers(0, 5), v=st.integers(1, 40), k=st.integers(1, 16), seed=st.integers(0, 2**20),
    alpha=st.sampled_from([0.0, 0.3, 1.0]), total=st.sampled_from([1.0, 0.5, 3.0]),
    spread=st.sampled_from([0.1, 3.0, 200.0]), n_pads=st.integers(0, 5), extra=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_any_batch_is_the_sum_by_hand(value_and_gradient, n, v, k, seed, alpha, total, spread, n_pads, extra):
    logits_NV, samples, labels_N = make_samples(n, v, k, seed=seed, spread=spread, total=total, n_pads=n_pads)
    expected, expected_gradient = by_hand(logits_NV, samples, labels_N, alpha)
    wide_NW = torch.cat([logits_NV, torch.full((n, extra), 99.0, dtype=torch.float64)], dim=1)
    for loss_function in LOSSES:
        loss, gradient = value_and_gradient(
            loss_function, wide_NW, samples, labels_N, 1.0, alpha, "sampled", -100, "none"
        )
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradient[:, :v], expected_gradient, rtol=1e-8, atol=1e-12)
        assert (gradient[:, v:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("total", [1.0, 1.7])
def test_low_precision_is_within_twice_the_error_of_pytorch(value_and_gradient, dtype, reduction, total):
    logits_NV, samples, labels_N = make_samples(33, 1003, 12, total=total)
    leaf = logits_NV.to(dtype)
    args = (samples, labels_N, 1.0, 0.7, "sampled", -100, reduction)
    truth, truth_gradient = value_and_gradient(distillation_loss_reference, leaf.double(), *args)
    plain, plain_gradient = value_and_gradient(distillation_loss_reference, leaf, *args)
    loss, gradient = value_and_gradient(distillation_loss, leaf, *args)
    for got, yardstick, exact in ((loss, plain, truth), (gradient, plain_gradient, truth_gradient)):
        error, budget = (got - exact).abs().max(), (yardstick - exact).abs().max()
        assert error <= 2 * budget + 1e-7 * exact.abs().max()


def test_with_the_whole_distribution_it_is_the_kl(case_factory, value_and_gradient):
    case = case_factory(7, 19, 19)
    logp_NV = case.teacher_logits_NV.log_softmax(-1)
    samples = TeacherBatch.from_samples(torch.arange(19).expand(7, 19), logp_NV, vocab_size=19)
    args = (case.labels_N, 1.0, 0.7)
    sampled = value_and_gradient(distillation_loss, case.logits_NV, samples, *args, "sampled")
    whole = value_and_gradient(distillation_loss, case.logits_NV, case.teacher, *args, "bucket")
    for got, expected in zip(sampled, whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)


def test_the_gradient_s_expectation_is_that_of_the_whole_kl(value_and_gradient):
    """Over all outcomes of one draw, weighted with their probabilities: exact, no sampling in the test."""
    v = 9
    rng = torch.Generator().manual_seed(3)
    student_NV, teacher_NV = (torch.randn(1, v, generator=rng, dtype=torch.float64) for _ in range(2))
    p_V = teacher_NV.softmax(-1)[0]
    outcomes = TeacherBatch.from_samples(torch.arange(v)[:, None], torch.zeros(v, 1).double(), vocab_size=v)
    args = (torch.zeros(v, dtype=torch.int64), 1.0, 1.0, "sampled", -100, "none")
    loss_O, gradient_OV = value_and_gradient(distillation_loss, student_NV.expand(v, v), outcomes, *args)
    torch.testing.assert_close(p_V @ gradient_OV, student_NV.softmax(-1)[0] - p_V, rtol=1e-12, atol=1e-14)
    kl = (p_V * (p_V.log() - student_NV.log_softmax(-1)[0])).sum()
    entropy = -(p_V * p_V.log()).sum()
    assert float(p_V @ loss_O) == pytest.approx(float(kl + entropy), rel=1e-12)


@pytest.mark.parametrize("loss_parts", [distillation_loss_parts, distillation_loss_parts_reference])
def test_absent_rows_and_impossible_tokens(loss_parts):
    logits_NV = torch.randn(3, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    logits_NV[0, 4] = -math.inf  # a sample that the student holds impossible
    logits_NV[2] = math.nan  # an absent row
    samples = TeacherBatch.from_samples(IDS, LOGWEIGHTS, vocab_size=5)
    leaf = logits_NV.requires_grad_()
    parts = loss_parts(leaf, samples, torch.tensor([1, 0, 2]), 1.0, tail="sampled", reduction="none")
    parts.loss[1:].sum().backward()
    assert parts.kl[0] == math.inf
    expected = -float(logits_NV[1].log_softmax(0)[0].detach())
    assert parts.kl[1].item() == pytest.approx(expected, rel=1e-12)
    assert parts.loss[2] == 0
    assert (leaf.grad[2] == 0).all()
    assert leaf.grad.isfinite().all()


def test_a_weight_of_zero_counts_for_nothing(value_and_gradient):
    logits_NV, samples, labels_N = make_samples(4, 11, 3)
    others_N1 = torch.tensor([[next(i for i in range(11) if i not in row)] for row in samples.ids_NK.tolist()])
    nothing_N1 = torch.full((4, 1), -math.inf, dtype=torch.float64)
    ids_NK, logweights_NK = torch.cat([samples.ids_NK, others_N1], 1), torch.cat([samples.logprobs_NK, nothing_N1], 1)
    more = TeacherBatch.from_samples(ids_NK, logweights_NK, vocab_size=11)
    for loss_function in LOSSES:
        args = (labels_N, 1.0, 0.7, "sampled")
        for got, expected in zip(
            value_and_gradient(loss_function, logits_NV, more, *args),
            value_and_gradient(loss_function, logits_NV, samples, *args),
            strict=True,
        ):
            torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)


def test_a_batch_of_samples_holds_what_it_was_given():
    t = TeacherBatch.from_samples(IDS, LOGWEIGHTS, vocab_size=5)
    assert t.is_sampled
    assert torch.equal(t.ids_NK, IDS)
    assert torch.equal(t.logprobs_NK, LOGWEIGHTS)
    assert t.present_N.tolist() == [True, True, False]
    assert (t.tail_logmass_N == -math.inf).all()
    assert t.to("meta").is_sampled
    assert TeacherBatch.from_samples(IDS, LOGWEIGHTS.half(), vocab_size=5).logprobs_NK.dtype == torch.float32
    assert TeacherBatch.from_samples(IDS, LOGWEIGHTS.double(), vocab_size=5).logprobs_NK.dtype == torch.float64
    nothing = TeacherBatch.from_samples(IDS[:, :0], LOGWEIGHTS[:, :0], vocab_size=5)
    assert nothing.present_N.tolist() == [False] * 3
    assert not TeacherBatch.from_topk(IDS, LOGWEIGHTS, LOGWEIGHTS[:, 0], vocab_size=5).is_sampled


@pytest.mark.parametrize(
    ("ids", "logweights", "vocab_size", "error", "message"),
    [
        (IDS.tolist(), LOGWEIGHTS, 5, TypeError, "ids_NK must be a torch.Tensor, got list"),
        (IDS, None, 5, TypeError, "logweights_NK must be a torch.Tensor, got NoneType"),
        (IDS, IDS, 5, TypeError, r"logweights_NK must be of a float dtype, got torch\.int32"),
        (IDS, LOGWEIGHTS[:2], 5, ValueError, r"logprobs_NK must have shape \(3, 2\)"),
        (IDS[0], LOGWEIGHTS[0], 5, ValueError, "ids_NK must have 2 axes"),
        (IDS, LOGWEIGHTS, 4, ValueError, r"row 0 has ids outside \[0, 4\)"),
        (torch.tensor([[4, 4], [0, 1], [1, 2]]), LOGWEIGHTS, 5, ValueError, "row 0 has an id more than once"),
        (IDS, LOGWEIGHTS * math.nan, 5, ValueError, "row 0 has NaN log-probs"),
        (IDS, LOGWEIGHTS + math.inf, 5, ValueError, r"row 0 has a log-weight of \+inf.*\(2 such rows\)"),
    ],
)  # fmt: skip
def test_samples_that_are_refused(ids, logweights, vocab_size, error, message):
    with pytest.raises(error, match=message):
        TeacherBatch.from_samples(ids, logweights, vocab_size=vocab_size)
