"""topk_with_tail_linear against the same reduction of whole logits, and against the codec's own numpy path."""

import math

import numpy as np
import pytest
import torch
from logitstore_kernels import topk_with_tail, topk_with_tail_linear
from torch.utils._python_dispatch import TorchDispatchMode

import logitstore

N, D, V, K = 23, 8, 501, 16


def head_of(*, dtype=torch.float32, extra=0):
    rng = torch.Generator().manual_seed(2)
    shapes = ((N, D), (V + extra, D), (V + extra,))
    return tuple(torch.randn(shape, generator=rng).mul(1.5).to(dtype) for shape in shapes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"min_prob": 0.02}], ids=str)
@pytest.mark.parametrize("chunk_rows", [None, 1, 7])
def test_it_is_the_reduction_of_the_logits(dtype, options, chunk_rows):
    hidden_ND, weight_VD, bias = head_of(dtype=dtype, extra=3)
    weight_VD[V:] = math.nan  # the padding of the head takes no part
    logits_NV = torch.nn.functional.linear(hidden_ND, weight_VD[:V], bias[:V])
    got = topk_with_tail_linear(
        hidden_ND, weight_VD, K, bias=bias, vocab_size=V, chunk_rows=chunk_rows, **options
    )  # fmt: skip
    # bfloat16 logits are rounded alike, but one in a thousand may be rounded to the neighbour
    expected = topk_with_tail(logits_NV, K, **options)
    same_N = (got.ids_NK == expected.ids_NK).all(dim=1)
    assert same_N.sum() >= (N if dtype != torch.bfloat16 else N - 3)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(
            one[same_N], other[same_N], rtol=1e-5, atol=1e-2 if dtype == torch.bfloat16 else 3e-6
        )


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, None), (0.5, 20.0)])
@pytest.mark.parametrize("min_prob", [None, 0.01])
def test_it_is_the_codec_s_own_reduction(scale, softcap, min_prob):
    hidden_ND, weight_VD, bias = head_of()
    codec = logitstore.make_codec("topk", vocab_size=V, k=K, head="fp16", min_prob=min_prob)
    input_ids = np.arange(N)
    factored = logitstore.FactoredLogits(hidden_ND, weight_VD, bias, scale, softcap)
    expected = codec.targets_from_logits(factored, input_ids)
    kept = topk_with_tail_linear(
        hidden_ND, weight_VD, K, bias=bias, scale=scale, softcap=softcap, min_prob=min_prob, chunk_rows=5
    )
    got = codec.targets_from_topk(*(column[:-1].numpy() for column in kept), input_ids=input_ids)
    np.testing.assert_array_equal(got.offsets, expected.offsets)
    np.testing.assert_array_equal(got.ids, expected.ids)
    np.testing.assert_allclose(got.logps, expected.logps, atol=4e-3)  # a step of fp16
    for temperature in (1.0, 2.0):
        difference = got.dense_logprobs(temperature) - expected.dense_logprobs(temperature)
        assert np.abs(difference).max() < 1e-2
    assert min_prob is None or len(got.ids) < K * (N - 1)


def test_autocast_decides_the_dtype_of_the_logits():
    hidden_ND, weight_VD, bias = head_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = topk_with_tail_linear(hidden_ND, weight_VD, K, bias=bias)
    expected = topk_with_tail_linear(*(x.bfloat16() for x in (hidden_ND, weight_VD)), K, bias=bias.bfloat16())
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert (got.logps_NK != topk_with_tail_linear(hidden_ND, weight_VD, K, bias=bias).logps_NK).any()


class LargestTensor(TorchDispatchMode):
    n_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.n_elements = max(self.n_elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


def test_no_tensor_is_larger_than_the_logits_of_a_chunk():
    hidden_ND, weight_VD, bias = head_of()
    with LargestTensor() as largest:
        kept = topk_with_tail_linear(hidden_ND, weight_VD, K, bias=bias, chunk_rows=9)
    assert largest.n_elements <= 9 * 512
    assert kept.ids_NK.shape == (N, K)


def test_no_rows_and_no_graph():
    hidden_ND, weight_VD, bias = head_of()
    kept = topk_with_tail_linear(hidden_ND[:0], weight_VD, 1000, bias=bias)
    assert [tuple(column.shape) for column in kept] == [(0, V), (0, V), (0,), (0,)]
    assert not topk_with_tail_linear(hidden_ND.requires_grad_(), weight_VD, K).logps_NK.requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden_ND": np.zeros((N, D))}, TypeError, "hidden_ND must be a torch.Tensor, got ndarray"),
        ({"weight_VD": torch.zeros(V, D + 1)}, ValueError, "hidden_ND has width 8 but weight_VD 9"),
        ({"bias": torch.zeros(V - 1)}, ValueError, "bias has 500 elements but weight_VD 501 rows"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"vocab_size": V + 1}, ValueError, "501 columns, fewer than vocab_size=502"),
        ({"min_prob": 1.0}, ValueError, r"min_prob must be in \(0, 1\), got 1.0"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1, got 0"),
        ({"scale": 0.0}, ValueError, "scale must be above 0, got 0.0"),
        ({"softcap": -1.0}, ValueError, "softcap must be above 0, got -1.0"),
    ],
)
def test_what_is_refused(change, error, message):
    hidden_ND, weight_VD, _ = head_of()
    with pytest.raises(error, match=message):
        topk_with_tail_linear(**({"hidden_ND": hidden_ND, "weight_VD": weight_VD, "k": K} | change))
