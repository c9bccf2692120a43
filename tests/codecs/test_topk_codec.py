"""The top-k codec: what it keeps, that bytes give it back bit for bit, and the error bounds that it declares."""

import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import logitstore
from logitstore import logits_source
from logitstore.codecs.conformance import require_same
from logitstore.head_values import HEADS, head_format
from logitstore.tail_moments import COARSE, FINE


def log_softmax(logits_NV: np.ndarray) -> np.ndarray:
    """ln p [N, V] in float64."""
    logits = logits_NV.astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def peaked_logits(rng: np.random.Generator, length: int, vocab_size: int, scale: float = 3.0) -> np.ndarray:
    return (rng.standard_normal((length, vocab_size)) * scale).astype(np.float32)


@st.composite
def logits_and_codec(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, logitstore.codecs.registry.Codec]:
    vocab_size = draw(st.sampled_from([1, 2, 3, 17, 255, 256, 257, 1000]))
    length = draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = peaked_logits(rng, length, vocab_size, draw(st.sampled_from([0.0, 0.01, 1.0, 5.0, 40.0])))
    if draw(st.booleans()):
        logits = np.round(logits)  # ties
    if draw(st.booleans()):
        logits[rng.random(logits.shape) < 0.5] = -np.inf
        logits[:, 0] = 0.0
    if draw(st.booleans()):
        logits[0] = -np.inf
        logits[0, vocab_size // 2] = 3.0  # one-hot
    codec = logitstore.make_codec(
        "topk", vocab_size=vocab_size, k=draw(st.integers(1, vocab_size)), head=draw(st.sampled_from(HEADS))
    )
    if draw(st.booleans()):  # fitted, to rows like these or to quite other ones
        seen = logits if draw(st.booleans()) else peaked_logits(rng, 20, vocab_size)
        codec = logitstore.calibrate(codec, seen, rng.integers(0, vocab_size, len(seen))) if length > 1 else codec
    keep_mask = rng.random(length - 1) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return logits, rng.integers(0, vocab_size, length), keep_mask, codec


@settings(max_examples=150, deadline=None)
@given(logits_and_codec())
def test_blob_gives_targets_back_bit_for_bit(case) -> None:
    logits, input_ids, keep_mask, codec = case
    targets = codec.targets_from_logits(logits, input_ids, keep_mask)
    blob = codec.encode(targets, input_ids)
    decoded = codec.decode(blob, input_ids)
    require_same(decoded, targets, "targets")
    assert codec.encode(decoded, input_ids) == blob
    np.testing.assert_array_equal(targets.present, keep_mask)
    assert targets.n_rows == len(input_ids) - 1


@settings(max_examples=150, deadline=None)
@given(logits_and_codec())
def test_kept_entries_are_the_top_ones_within_the_declared_error(case) -> None:
    logits, input_ids, keep_mask, codec = case
    targets = codec.targets_from_logits(logits, input_ids, keep_mask)
    logp_RV = log_softmax(logits)[:-1]
    grid = FINE if codec.tables_sha256 is None else COARSE
    floor, reach = head_format(codec.head).least_logp, head_format(codec.head).reach_nats
    exact, exact_offsets = [], [0]
    for t in range(targets.n_rows):
        ids = targets.ids[targets.offsets[t] : targets.offsets[t + 1]]
        truth = np.sort(logp_RV[t])[::-1][: codec.k]
        if not keep_mask[t]:
            truth = truth[:0]
        with np.errstate(invalid="ignore"):
            below = np.minimum(truth - floor, truth - truth[:1] + reach)  # how far above what the format can say
        below[np.isneginf(truth)] = -np.inf
        below[:1] = np.maximum(below[:1], 1)  # the first entry is always kept
        at_the_limit = np.abs(below) < 1e-4  # kept or not, as float32 rounding has it
        assert (below >= 1e-4).sum() <= len(ids) <= (below >= 0).sum() + at_the_limit.sum()
        truth = truth[: len(ids)]
        kept = np.sort(logp_RV[t][ids])[::-1]  # a fitted codec has an order of its own among equal codes
        np.testing.assert_allclose(kept, truth, atol=2e-6)
        exact += list(kept)
        exact_offsets.append(len(exact))
        if keep_mask[t]:
            rest = np.delete(logp_RV[t], ids)
            mass = np.logaddexp.reduce(rest, initial=-np.inf)
            half = np.logaddexp.reduce(rest / 2, initial=-np.inf)
            if mass == -np.inf:
                assert targets.tail_logmass[t] == -np.inf
                assert targets.tail_logmoment_half[t] == -np.inf
            elif mass > -63:
                slack = 2e-5 / -np.expm1(min(mass, -1e-12))  # float32 logits in, head mass near 0
                assert abs(targets.tail_logmass[t] - mass) <= grid.mass_error_bound + slack
                assert abs(targets.tail_logmoment_half[t] - half) <= grid.half_error_bound + slack
    exact_E = np.array(exact, np.float32)
    bound_E = head_format(codec.head).error_bound(exact_E, np.array(exact_offsets))
    assert np.all(np.abs(targets.logps - exact_E) <= bound_E + 1e-5)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5, 2.0, 4.0])
def test_dense_logprobs_are_the_uniform_tail_reconstruction(head: str, temperature: float) -> None:
    rng = np.random.default_rng(1)
    logits, input_ids = peaked_logits(rng, 9, 300), rng.integers(0, 300, 9)
    codec = logitstore.make_codec("topk", vocab_size=300, k=20, head=head)
    targets = codec.targets_from_logits(logits, input_ids)
    dense = targets.dense_logprobs(temperature)
    for t in range(8):
        ids = targets.ids[targets.offsets[t] : targets.offsets[t + 1]]
        logps = targets.logps[targets.offsets[t] : targets.offsets[t + 1]].astype(np.float64)
        mass, half = float(targets.tail_logmass[t]), float(targets.tail_logmoment_half[t])
        head_p = np.exp(logps - np.logaddexp.reduce(logps)) * (1 - np.exp(mass))
        beta = 1 / temperature
        rho = (
            np.interp(beta, [0, 0.5, 1], [np.log(280), half, mass])
            if beta <= 1
            else half + (2 * beta - 1) * (mass - half)
        )
        weights = np.full(300, np.exp(rho) / 280)
        weights[ids] = head_p**beta
        np.testing.assert_allclose(dense[t], np.log(weights / weights.sum()), atol=2e-6)
    np.testing.assert_allclose(np.exp(dense.astype(np.float64)).sum(axis=1), 1, atol=1e-6)


def test_tail_mass_is_exact_at_temperature_1_and_2() -> None:
    rng = np.random.default_rng(2)
    logits, input_ids = peaked_logits(rng, 65, 2000), rng.integers(0, 2000, 65)
    targets = logitstore.make_codec("topk", vocab_size=2000, k=32, head="fp16").targets_from_logits(logits, input_ids)
    for temperature in (1.0, 2.0):
        tempered = np.exp(log_softmax(logits[:-1] / np.float32(temperature)))
        stored = np.exp(targets.dense_logprobs(temperature).astype(np.float64))
        row, ids = np.repeat(np.arange(64), 32), targets.ids
        true_tail = 1 - tempered[row, ids].reshape(64, 32).sum(axis=1)
        stored_tail = 1 - stored[row, ids].reshape(64, 32).sum(axis=1)
        np.testing.assert_allclose(stored_tail, true_tail, rtol=3e-3)


def test_kl_of_renormalised_head_is_minus_log_of_the_kept_mass() -> None:
    """The identity that says what dropping a tail costs, from the stored mass alone."""
    rng = np.random.default_rng(3)
    logits, input_ids = peaked_logits(rng, 33, 500), rng.integers(0, 500, 33)
    targets = logitstore.make_codec("topk", vocab_size=500, k=50).targets_from_logits(logits, input_ids)
    p = np.exp(log_softmax(logits[:-1]))
    kept = np.take_along_axis(p, targets.ids.reshape(32, 50).astype(np.int64), axis=1).sum(axis=1)
    np.testing.assert_allclose(np.log(-np.expm1(targets.tail_logmass.astype(np.float64))), np.log(kept), atol=1.1e-3)


@pytest.mark.parametrize("kind", ["numpy", "torch fp32", "torch bf16", "torch fp16", "factored", "factored torch",
                                  "factored bf16", "factored fp16"])  # fmt: skip
def test_every_kind_of_logits_gives_the_targets_of_its_float32_values(kind: str) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(4)
    hidden = rng.standard_normal((7, 16)).astype(np.float32)
    lm_head = rng.standard_normal((103, 16)).astype(np.float32)
    bias = rng.standard_normal(103).astype(np.float32)
    input_ids = rng.integers(0, 100, 7)
    logits = 5 * np.tanh((hidden @ lm_head.T + bias) * 0.7 / 5)
    given_logits: object = logits
    if kind.startswith("torch"):
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[kind.split()[1]]
        given_logits = torch.from_numpy(logits).to(dtype)
        logits = given_logits.float().numpy()
    elif kind == "factored":
        given_logits = logitstore.FactoredLogits(hidden, lm_head, bias, scale=0.7, softcap=5.0)
    elif kind == "factored torch":
        tensors = [torch.from_numpy(a) for a in (hidden, lm_head, bias)]
        given_logits = logitstore.FactoredLogits(*tensors, scale=0.7, softcap=5.0)
    elif kind.startswith("factored"):
        half = torch.from_numpy(lm_head).to(torch.bfloat16 if kind.endswith("bf16") else torch.float16)
        logits = 5 * np.tanh((hidden @ half.float().numpy().T + bias) * 0.7 / 5)
        given_logits = logitstore.FactoredLogits(hidden, half, bias, scale=0.7, softcap=5.0)
    codec = logitstore.make_codec("topk", vocab_size=100, k=9, head="fp16")  # 103 columns: 3 are padding
    targets = codec.targets_from_logits(given_logits, input_ids)
    expected = codec.targets_from_logits(logits[:, :100], input_ids)
    np.testing.assert_array_equal(targets.offsets, expected.offsets)
    np.testing.assert_allclose(targets.logps, expected.logps, atol=4e-3)
    truth = log_softmax(logits[:, :100])[:-1]
    np.testing.assert_allclose(np.take_along_axis(truth, targets.ids.reshape(6, 9).astype(np.int64), axis=1).ravel(),
                               targets.logps, atol=6e-3)  # fmt: skip


def test_chunked_logits_equal_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    logits, input_ids = peaked_logits(rng, 40, 64), rng.integers(0, 64, 40)
    keep_mask = rng.random(39) < 0.6
    codec = logitstore.make_codec("topk", vocab_size=64, k=8)
    whole = codec.targets_from_logits(logits, input_ids, keep_mask)
    chunks = logits_source.iter_logit_chunks(logits, np.flatnonzero(keep_mask), vocab_size=64, chunk_bytes=3 * 4 * 64)
    from logitstore.topk import topk_with_tail

    parts = [topk_with_tail(chunk, 8) for chunk in chunks]
    assert [len(part.ids) for part in parts][:-1] == [3] * (len(parts) - 1)
    columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    require_same(codec.targets_from_topk(*columns, input_ids=input_ids, keep_mask=keep_mask), whole, "targets")


def test_a_head_that_is_not_float32_is_never_copied_whole() -> None:
    """164 MB in float32, multiplied out in two parts of the vocabulary, and rows given out a few at a time."""
    rng = np.random.default_rng(6)
    lm_head = np.resize(rng.standard_normal(9973).astype(np.float16), (40_000, 1024))
    hidden = rng.standard_normal((5, 1024)).astype(np.float32)
    tracemalloc.start()
    try:
        chunks = logits_source.iter_logit_chunks(
            logitstore.FactoredLogits(hidden, lm_head), np.array([0, 2, 3, 4]), vocab_size=39_000, chunk_bytes=500_000
        )
        chunks = [chunk.copy() for chunk in chunks]
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < logits_source.CHUNK_BYTES + 3_000_000
    assert [chunk.shape for chunk in chunks] == [(3, 39_000), (1, 39_000)]
    some = np.r_[:50, 16_000:17_000, 38_950:39_000]  # the second part begins at 16,384
    truth = hidden[[0, 2, 3, 4]].astype(np.float64) @ lm_head[some].astype(np.float64).T
    np.testing.assert_allclose(np.concatenate(chunks)[:, some], truth, atol=1e-3)


def test_topk_rows_may_come_for_all_rows_or_for_the_kept_ones() -> None:
    rng = np.random.default_rng(6)
    logits, input_ids = peaked_logits(rng, 12, 50), rng.integers(0, 50, 12)
    keep_mask = rng.random(11) < 0.5
    from logitstore.topk import topk_with_tail

    codec = logitstore.make_codec("topk", vocab_size=50, k=5)
    all_rows = topk_with_tail(logits[:-1], 5)
    kept_rows = topk_with_tail(logits[:-1][keep_mask], 5)
    a = codec.targets_from_topk(*all_rows, input_ids=input_ids, keep_mask=keep_mask)
    b = codec.targets_from_topk(*kept_rows, input_ids=input_ids, keep_mask=keep_mask)
    require_same(a, b, "targets")


def test_entries_behind_the_kth_join_the_tail() -> None:
    rng = np.random.default_rng(7)
    logits, input_ids = peaked_logits(rng, 6, 40), rng.integers(0, 40, 6)
    from logitstore.topk import topk_with_tail

    codec = logitstore.make_codec("topk", vocab_size=40, k=4, head="fp16")
    from_more = codec.targets_from_topk(*topk_with_tail(logits[:-1], 20), input_ids=input_ids)
    direct = codec.targets_from_logits(logits, input_ids)
    np.testing.assert_array_equal(from_more.ids, direct.ids)
    np.testing.assert_allclose(from_more.tail_logmass, direct.tail_logmass, atol=2.1e-3)
    np.testing.assert_allclose(from_more.tail_logmoment_half, direct.tail_logmoment_half, atol=1.5e-3)


def test_a_k_above_the_vocabulary_keeps_it_all() -> None:
    rng = np.random.default_rng(11)
    logits, input_ids = peaked_logits(rng, 6, 10), rng.integers(0, 10, 6)
    codec = logitstore.make_codec("topk", vocab_size=10, head="fp16")
    targets = codec.decode(codec.encode(codec.targets_from_logits(logits, input_ids), input_ids), input_ids)
    assert targets.counts.tolist() == [10] * 5
    assert np.isneginf(targets.tail_logmass).all()
    np.testing.assert_allclose(targets.dense_logprobs(), log_softmax(logits[:-1]), atol=2e-2)


def test_numpy_and_torch_topk_are_equal() -> None:
    torch = pytest.importorskip("torch")
    from logitstore_kernels import topk_with_tail as topk_with_tail_torch

    from logitstore.topk import topk_with_tail

    rng = np.random.default_rng(8)
    logits = peaked_logits(rng, 50, 700)
    logits[3, 5:] = -np.inf
    logits[4] = 0.0
    logits[4, 7] = 90.0
    a, b = topk_with_tail(logits, 16), topk_with_tail_torch(torch.from_numpy(logits), 16)
    rows = np.delete(np.arange(50), 4)  # row 4 is tied at its k-th place
    np.testing.assert_array_equal(a.ids[rows], b[0].numpy()[rows])
    np.testing.assert_allclose(a.logps, b[1].numpy(), atol=4e-6)
    np.testing.assert_allclose(a.tail_logmass, b[2].numpy(), atol=1e-5)
    np.testing.assert_allclose(a.tail_logmoment_half, b[3].numpy(), atol=1e-5)
    truth = log_softmax(logits)
    rest = np.sort(truth, axis=1)[:, :-16]
    np.testing.assert_allclose(a.tail_logmass, np.logaddexp.reduce(rest, axis=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [128_256, 151_936, 262_144])
def test_large_vocabularies(vocab_size: int) -> None:
    rng = np.random.default_rng(9)
    logits = peaked_logits(rng, 4, vocab_size)
    logits[:, -1] = 30.0  # an id of more than 17 bits
    input_ids = np.array([vocab_size - 1, 0, 5, vocab_size - 1])
    codec = logitstore.make_codec("topk", vocab_size=vocab_size, k=64)
    targets = codec.decode(codec.encode(codec.targets_from_logits(logits, input_ids), input_ids), input_ids)
    np.testing.assert_array_equal(targets.ids[::64], [vocab_size - 1] * 3)
    order = np.argsort(-logits[:-1], axis=1)[:, :64]
    np.testing.assert_array_equal(np.sort(targets.ids.reshape(3, 64), axis=1), np.sort(order, axis=1))


def test_codec_round_trips_through_a_folder(tmp_path) -> None:
    codec = logitstore.make_codec("topk", vocab_size=1234, k=7, head="fp8")
    codec.save(tmp_path / "codec")
    assert logitstore.load_codec(tmp_path / "codec") == codec
    saved = json.loads((tmp_path / "codec" / "codec.json").read_text())
    saved["config"]["k"] = 8
    (tmp_path / "codec" / "codec.json").write_text(json.dumps(saved))
    with pytest.raises(logitstore.CorruptionError, match="SHA-256"):
        logitstore.load_codec(tmp_path / "codec")
    (tmp_path / "codec" / "codec.json").write_text("{")
    with pytest.raises(logitstore.FormatError, match="not a saved codec"):
        logitstore.load_codec(tmp_path / "codec")


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint16, np.array])
def test_integers_of_any_type_are_taken_as_ints(integer) -> None:
    codec = logitstore.make_codec("topk", vocab_size=integer(1234), k=integer(7))
    assert codec == logitstore.make_codec("topk", vocab_size=1234, k=7)
    assert json.loads(json.dumps(codec.config)) == codec.config
    assert [type(codec.config[name]) for name in ("vocab_size", "k")] == [int, int]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "top-k"}, "no codec is named 'top-k'.*rskd, topk, varopt"),
        ({"head": "bf16"}, "head must be one of fp8, int8, fp16, log, sqrtp"),
        ({"head_step": 0.1}, "head 'int8' has no step to choose; log and sqrtp have one"),
        ({"head": "log", "head_step": 5.0}, "head_step of 'log' must be from 0.0625 to 4, got 5.0"),
        ({"head": "sqrtp", "head_step": 1e-3}, "head_step of 'sqrtp' must be from 0.003922 to 0.25"),
        ({"min_prob": 1.0}, "min_prob must be a number above 0 and below 1, or None, got 1.0"),
        ({"top_p": 0}, "top_p must be a number above 0 and below 1"),
        ({"min_prob": 0.1, "top_p": 0.9}, "two rules for one choice"),
        ({"tail": "sampled"}, "tail must be 'residual' or 'predicted', got 'sampled'"),
        ({"tail_step": 0.5}, "tail_step is for tail 'predicted', got tail 'residual'"),
        ({"tail": "predicted", "tail_step": 0}, "tail_step must be a number from 0.01 to 10, or None, got 0"),
        ({"k": 0}, "k must be an integer from 1 to 65,535, got 0"),
        ({"k": 65536}, "k must be an integer from 1 to 65,535, got 65536"),
        ({"k": 2.0}, "k must be an integer"),
        ({"k": np.float32(2)}, "k must be an integer"),
        ({"k": True}, "k must be an integer from 1 to 65,535, got True"),
        ({"k": np.bool_(True)}, "k must be an integer"),
        ({"k": np.array([4])}, "k must be an integer"),
        ({"k": np.int64(0)}, "k must be an integer from 1"),
        ({"vocab_size": 0}, "vocab_size must be an integer from 1"),
        ({"vocab_size": (1 << 24) + 1}, "16,777,216"),
    ],
)
def test_what_this_version_does_not_have_is_a_clear_error(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logitstore.make_codec(**{"name": "topk", "vocab_size": 100, "k": 4, **options})


class TestBadInput:
    """Each mistake is named, with the row or position where it is."""

    codec = logitstore.make_codec("topk", vocab_size=50, k=3)
    logits = np.zeros((4, 50), np.float32)
    ids = np.array([1, 2, 3, 4])

    @pytest.mark.parametrize(
        ("logits", "input_ids", "keep_mask", "error", "message"),
        [
            (logits[:3], ids, None, ValueError, "3 rows of logits for 4 tokens"),
            (logits[:, :49], ids, None, ValueError, "49 columns.*50"),
            (logits[0], ids, None, ValueError, "50 rows of logits|must be"),
            ([[0.0]], ids, None, TypeError, "numpy array, a torch tensor or FactoredLogits"),
            (logits, [1, 2, 3, 50], None, ValueError, r"input_ids\[3\] is 50.*0\.\.49"),
            (logits, [1, 2, 3, -1], None, ValueError, r"input_ids\[3\] is -1"),
            (logits, [1.0, 2, 3, 4], None, ValueError, "integers"),
            (logits, ids, np.ones(4, bool), ValueError, r"keep_mask must be bool \[3\]"),
            (logits, ids, np.ones(3), ValueError, "float64"),
            (np.where(np.arange(4)[:, None] == 1, np.nan, logits), ids, None, ValueError, "row 1 have NaN"),
            (np.full((4, 50), -np.inf, np.float32), ids, None, ValueError, "row 0 have NaN"),
        ],
    )
    def test_logits(self, logits, input_ids, keep_mask, error, message: str) -> None:
        with pytest.raises(error, match=message):
            self.codec.targets_from_logits(logits, input_ids, keep_mask)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"ids": [[1, 1], [2, 3], [4, 5]]}, "row 0 of the given rows has a token id twice"),
            ({"ids": [[1, 2], [2, 50], [4, 5]]}, "row 1 .* beyond the vocabulary of 50"),
            ({"ids": [[1, 2], [2, 3], [-1, -1]]}, "row 2 .* no entry"),
            ({"logps": [[-2, -1], [-1, -2], [-1, -2]]}, "row 0 .* not descending"),
            ({"logps": [[-1, -2], [-1, np.nan], [-1, -2]]}, "row 1 .* NaN"),
            ({"logps": [[0.1, -2], [-1, -2], [-1, -2]]}, "row 0 .* above 0"),
            ({"ids": [[-1, 2], [2, 3], [4, 5]]}, "row 0 .* behind a pad"),
            ({"mass": [-1, np.nan, -1]}, "row 1 .* tail moment"),
            ({"mass": [-1, -1, -np.inf]}, "row 2 .* tail moment"),
            ({"mass": [-1, 0.5, -1]}, "row 1 .* tail log-mass above 0"),
            ({"ids": [[1, 2], [2, 3]]}, r"must be \[N, K\]"),
            ({"mass": [-1, -1]}, r"tail moments must be \[3\]"),
        ],
    )
    def test_top_entries(self, change: dict, message: str) -> None:
        rows = {
            "ids": [[1, 2], [2, 3], [4, 5]],
            "logps": [[-1.0, -2.0]] * 3,
            "mass": [-1.0] * 3,
            "half": [0.5] * 3,
            **change,
        }
        arrays = [np.array(rows[name]) for name in ("ids", "logps", "mass", "half")]
        with pytest.raises(ValueError, match=message):
            self.codec.targets_from_topk(*arrays, input_ids=self.ids)

    def test_encode_refuses_what_does_not_belong_together(self) -> None:
        targets = self.codec.targets_from_logits(self.logits, self.ids)
        with pytest.raises(ValueError, match="not the ones that the targets were made with"):
            self.codec.encode(targets, self.ids[::-1])
        with pytest.raises(logitstore.SpecMismatchError, match="vocabulary of 50, the codec 60"):
            logitstore.make_codec("topk", vocab_size=60, k=3).encode(targets, self.ids)
        with pytest.raises(logitstore.SpecMismatchError, match="has 3 entries, the codec keeps 2"):
            logitstore.make_codec("topk", vocab_size=50, k=2).encode(targets, self.ids)
        with pytest.raises(logitstore.CorruptionError, match="row 0 holds log-probs that are not descending"):
            self.codec.encode(replace(targets, logps=targets.logps - np.arange(9)[::-1].astype(np.float32)), self.ids)

    def test_dense_logprobs_refuse_a_temperature_that_is_not_positive(self) -> None:
        targets = self.codec.targets_from_logits(self.logits, self.ids)
        with pytest.raises(ValueError, match="temperature must be positive, got 0"):
            targets.dense_logprobs(0)


def test_one_format_encodes_the_targets_of_another() -> None:
    """Values that are not on a codec's grid are quantised when it encodes them."""
    rng = np.random.default_rng(10)
    logits, input_ids = peaked_logits(rng, 5, 80), rng.integers(0, 80, 5)
    exact = logitstore.make_codec("topk", vocab_size=80, k=6, head="fp16").targets_from_logits(logits, input_ids)
    for head in ("fp8", "int8"):
        codec = logitstore.make_codec("topk", vocab_size=80, k=6, head=head)
        decoded = codec.decode(codec.encode(exact, input_ids), input_ids)
        bound = head_format(head).error_bound(exact.logps, exact.offsets)
        assert np.all(np.abs(decoded.logps - exact.logps) <= bound)
        assert decoded.codes is not None
        assert not np.array_equal(decoded.logps, exact.logps)


def test_fp8_codes_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    from logitstore.head_values import E4M3_TABLE

    logps = -np.concatenate([np.linspace(0, 90, 5001), 2.0 ** -np.arange(1, 14)]).astype(np.float32)
    head = head_format("fp8").quantise(logps, np.array([0, len(logps)]))
    expected = torch.from_numpy(logps).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(head.logps, expected.float().numpy())
    np.testing.assert_array_equal(
        E4M3_TABLE, torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    )


class TestSelection:
    """How many entries a row keeps, where that follows from the row."""

    rng = np.random.default_rng(11)
    logits, input_ids = peaked_logits(rng, 40, 500), rng.integers(0, 500, 40)
    logp_RV = log_softmax(logits)[:-1]

    @pytest.mark.parametrize("k", [3, 16])
    @pytest.mark.parametrize("min_prob", [0.2, 0.03, 1e-3])
    def test_min_prob_keeps_what_is_above_it_and_one_at_least(self, min_prob: float, k: int) -> None:
        codec = logitstore.make_codec("topk", vocab_size=500, k=k, min_prob=min_prob)
        targets = codec.targets_from_logits(self.logits, self.input_ids)
        wanted = np.clip((self.logp_RV >= np.log(min_prob)).sum(axis=1), 1, k)
        np.testing.assert_array_equal(targets.counts, wanted)
        if k == 16 and min_prob > 0.01:
            assert len(set(wanted)) > 1

    @pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99])
    def test_top_p_keeps_the_entry_that_reaches_it(self, top_p: float) -> None:
        codec = logitstore.make_codec("topk", vocab_size=500, k=60, top_p=top_p)
        targets = codec.targets_from_logits(self.logits, self.input_ids)
        mass_RV = np.cumsum(np.sort(np.exp(self.logp_RV), axis=1)[:, ::-1], axis=1)
        wanted = np.minimum((mass_RV < top_p).sum(axis=1) + 1, 60)
        np.testing.assert_array_equal(targets.counts, wanted)

    def test_what_is_not_kept_is_in_the_tail_at_both_temperatures(self) -> None:
        codec = logitstore.make_codec("topk", vocab_size=500, k=60, min_prob=0.02, head="fp16")
        targets = codec.targets_from_logits(self.logits, self.input_ids)
        blob = codec.encode(targets, self.input_ids)
        require_same(codec.decode(blob, self.input_ids), targets, "targets")
        for t in range(targets.n_rows):
            rest = np.delete(self.logp_RV[t], targets.ids[targets.offsets[t] : targets.offsets[t + 1]])
            assert abs(targets.tail_logmass[t] - np.logaddexp.reduce(rest)) <= FINE.mass_error_bound + 1e-4
            assert abs(targets.tail_logmoment_half[t] - np.logaddexp.reduce(rest / 2)) <= FINE.half_error_bound + 1e-4

    def test_the_configuration_names_only_what_was_chosen(self) -> None:
        plain = logitstore.make_codec("topk", vocab_size=500)
        assert set(plain.config) == {"name", "vocab_size", "k", "head", "tail"}
        chosen = logitstore.make_codec("topk", vocab_size=500, min_prob=0.01, head="log", head_step=0.5)
        assert chosen.config == plain.config | {"min_prob": 0.01, "head": "log", "head_step": 0.5}
        assert logitstore.make_codec(**chosen.config) == chosen


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_log_heads_store_no_first_value_and_lose_nothing_by_it(temperature: float) -> None:
    rng = np.random.default_rng(5)
    logits, input_ids = peaked_logits(rng, 50, 200), rng.integers(0, 200, 50)
    fine = logitstore.make_codec("topk", vocab_size=200, k=8, head="log", head_step=1 / 16)
    targets = fine.targets_from_logits(logits, input_ids)
    assert np.all(targets.codes[targets.offsets[:-1]] == 0)
    exact = logitstore.make_codec("topk", vocab_size=200, k=8, head="fp16").targets_from_logits(logits, input_ids)
    np.testing.assert_allclose(
        targets.dense_logprobs(temperature), exact.dense_logprobs(temperature), atol=1 / 16 + 0.004
    )


@pytest.mark.parametrize("is_fitted", [False, True])
def test_threads_encode_and_decode_as_one_does(is_fitted: bool) -> None:
    """Compiled loops run side by side, and each thread has its own zstd contexts."""
    codec, rng = logitstore.make_codec("topk", vocab_size=500, k=20, head="log"), np.random.default_rng(0)
    samples = [(peaked_logits(rng, length, 500), rng.integers(0, 500, length)) for length in rng.integers(2, 90, 24)]
    if is_fitted:
        codec = logitstore.calibrate(codec, *map(list, zip(*samples, strict=True)))

    def there_and_back(sample: tuple[np.ndarray, np.ndarray]) -> tuple[bytes, logitstore.TeacherTargets]:
        blob = codec.encode(codec.targets_from_logits(*sample), sample[1])
        return blob, codec.decode(blob, sample[1])

    alone = [there_and_back(sample) for sample in samples]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(there_and_back, samples * 4))
    for (blob, targets), (expected_blob, expected) in zip(together, alone * 4, strict=True):
        assert blob == expected_blob
        require_same(targets, expected, "targets")
