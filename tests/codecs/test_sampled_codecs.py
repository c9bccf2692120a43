"""The codecs that sample: what they keep, that bytes give it back bit for bit, their rounding, and what they refuse."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import logitstore
from logitstore.blob import pack_blob, unpack_blob
from logitstore.codecs.conformance import require_same
from logitstore.head_values import HEAD_FORMATS
from logitstore.sampling import multinomial_sample, probabilities, row_uniforms, varopt_sample
from logitstore.targets import StoredSamples

HEADS = sorted(HEAD_FORMATS)


def peaked_logits(rng: np.random.Generator, length: int, vocab_size: int, scale: float = 3.0) -> np.ndarray:
    return (rng.standard_normal((length, vocab_size)) * scale).astype(np.float32)


def power_law_logits(rng: np.random.Generator, length: int, vocab_size: int) -> np.ndarray:
    """Logits of p proportional to rank^-s, s from 1 to 3 and ranks in random order, row by row."""
    rank_LV = rng.permuted(np.tile(np.arange(1.0, vocab_size + 1), (length, 1)), axis=1)
    return (-rng.uniform(1, 3, (length, 1)) * np.log(rank_LV)).astype(np.float32)


@st.composite
def logits_and_codec(draw: st.DrawFn):
    vocab_size = draw(st.sampled_from([1, 2, 3, 17, 255, 256, 257, 1000]))
    length = draw(st.integers(0, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = peaked_logits(rng, length, vocab_size, draw(st.sampled_from([0.0, 0.01, 1.0, 5.0, 40.0])))
    if draw(st.booleans()):
        logits = np.round(logits)  # ties
    if draw(st.booleans()):
        logits[rng.random(logits.shape) < 0.5] = -np.inf
        logits[:, 0] = 0.0
    if length and draw(st.booleans()):
        logits[0] = -np.inf
        logits[0, vocab_size // 2] = 3.0  # one-hot
    seed = draw(st.sampled_from([0, 1, 2**63 - 1]))
    if draw(st.booleans()):
        options = {"name": "varopt", "k": draw(st.integers(1, vocab_size + 3)), "head": draw(st.sampled_from(HEADS))}
        options["max_weight"] = draw(st.sampled_from([None, 0.5, 0.03]))
    else:
        options = {"name": "rskd", "draws": draw(st.sampled_from([1, 2, 50, 127, 128, 255]))}
    codec = logitstore.make_codec(vocab_size=vocab_size, seed=seed, **options)
    keep_mask = rng.random(max(length - 1, 0)) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return logits, rng.integers(0, vocab_size, length), keep_mask, codec


@settings(max_examples=200, deadline=None)
@given(logits_and_codec())
def test_blob_gives_targets_back_bit_for_bit(case) -> None:
    logits, input_ids, keep_mask, codec = case
    targets = codec.targets_from_logits(logits, input_ids, keep_mask)
    targets.validate()
    blob = codec.encode(targets, input_ids)
    decoded = codec.decode(blob, input_ids)
    require_same(decoded, targets, "decoded")
    assert codec.encode(decoded, input_ids) == blob
    np.testing.assert_array_equal(targets.present, keep_mask)
    assert targets.is_sampled
    assert np.isneginf(targets.tail_logmass[keep_mask]).all()
    assert np.isneginf(targets.tail_logmoment_half[keep_mask]).all()
    assert (targets.counts <= codec.max_entries).all()
    dense = np.exp(targets.dense_logprobs()[keep_mask].astype(np.float64))
    np.testing.assert_allclose(dense.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal((dense > 0).sum(axis=1), targets.counts[keep_mask])


@settings(max_examples=100, deadline=None)
@given(logits_and_codec())
def test_a_row_does_not_depend_on_which_other_rows_are_kept(case) -> None:
    logits, input_ids, keep_mask, codec = case
    whole = codec.targets_from_logits(logits, input_ids)
    some = codec.targets_from_logits(logits, input_ids, keep_mask)
    np.testing.assert_array_equal(some.dense_logprobs()[keep_mask], whole.dense_logprobs()[keep_mask])


@settings(max_examples=100, deadline=None)
@given(logits_and_codec())
def test_stored_weights_are_the_sampler_s_within_the_head_s_error(case) -> None:
    logits, input_ids, _, codec = case
    targets = codec.targets_from_logits(logits, input_ids)
    if targets.n_rows == 0:
        return
    uniforms = row_uniforms(codec.seed, input_ids, codec.n_uniforms)
    p_RV = probabilities(logits[:-1])
    if codec.config["name"] == "rskd":
        rows = multinomial_sample(p_RV, uniforms)
        np.testing.assert_array_equal(targets.logps, rows.logweights[rows.ids >= 0])
    else:
        rows = varopt_sample(p_RV, codec.k, uniforms[:, 0], max_weight=codec.max_weight)
        np.testing.assert_array_equal(targets.samples.n_exact, rows.n_exact)
        exact_NK = np.arange(rows.ids.shape[1]) < rows.n_exact[:, None]
        offsets = np.concatenate([[0], np.cumsum(rows.n_exact)])
        bound_NK = np.zeros(rows.ids.shape)
        bound_NK[exact_NK] = HEAD_FORMATS[codec.head].error_bound(rows.logweights[exact_NK], offsets)
        # the shift to the stored mass, and holding entries at the threshold, move a row by its worst rounding at most
        budget_R = 3 * bound_NK.max(axis=1) + 3e-3
        error = np.abs(targets.logps - rows.logweights[rows.ids >= 0])
        mass_is_stored = rows.logweights[rows.ids >= 0] > -60  # below e^-64 the tail's mass has a floor
        assert (error <= np.repeat(budget_R, targets.counts))[mass_is_stored].all()
    np.testing.assert_array_equal(targets.ids, rows.ids[rows.ids >= 0])


def test_the_default_head_s_rounding_is_nothing_beside_the_sampling() -> None:
    """bias^2, which no number of rows averages out, over the variance of the sampling; on power-law rows."""
    rng = np.random.default_rng(0)
    logits, input_ids = power_law_logits(rng, 401, 1000), rng.integers(0, 1000, 401)
    p_RV = probabilities(logits[:-1])
    ratios, sizes = {}, {}
    for head in HEADS:
        codec = logitstore.make_codec("varopt", vocab_size=1000, head=head)
        targets = codec.targets_from_logits(logits, input_ids)
        sizes[head] = len(codec.encode(targets, input_ids))
        ids_RK, weights_RK = targets.ids.reshape(400, 12), np.exp(targets.logps.astype(np.float64)).reshape(400, 12)
        exact_RK = np.arange(12) < targets.samples.n_exact[:, None]
        bias_RV, tail_RV = np.zeros_like(p_RV), p_RV.copy()
        for row in range(400):
            kept = ids_RK[row][exact_RK[row]]
            bias_RV[row, kept] = weights_RK[row][exact_RK[row]] - p_RV[row, kept]
            tail_RV[row, kept] = 0
        threshold_R1 = tail_RV.sum(axis=1, keepdims=True) / (~exact_RK).sum(axis=1, keepdims=True)
        bias_RV += tail_RV * (weights_RK[:, -1:] / threshold_R1 - 1)  # E[weight] = p * stored threshold / threshold
        variance = (tail_RV * (threshold_R1 - tail_RV)).sum(axis=1).mean()
        ratios[head] = np.square(bias_RV).sum(axis=1).mean() / variance
    assert ratios["fp16"] < 1e-5
    assert ratios["fp16"] < ratios["int8"] < ratios["fp8"]
    assert sizes["fp16"] <= 1.05 * sizes["int8"]
    assert logitstore.make_codec("varopt", vocab_size=1000).head == "fp16"


@pytest.mark.parametrize("options", [{"name": "varopt"}, {"name": "rskd"}])
@pytest.mark.parametrize("kind", ["numpy", "torch bf16", "torch fp16", "factored", "factored torch"])
def test_every_kind_of_logits_gives_the_targets_of_its_float32_values(options: dict, kind: str) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(4)
    hidden = rng.standard_normal((7, 16)).astype(np.float32)
    lm_head = rng.standard_normal((103, 16)).astype(np.float32)
    input_ids = rng.integers(0, 100, 7)
    logits = hidden @ lm_head.T
    given_logits: object = logits
    if kind.startswith("torch"):
        given_logits = torch.from_numpy(logits).to({"bf16": torch.bfloat16, "fp16": torch.float16}[kind.split()[1]])
        logits = given_logits.float().numpy()
    elif kind == "factored":
        given_logits = logitstore.FactoredLogits(hidden, lm_head)
    elif kind == "factored torch":
        given_logits = logitstore.FactoredLogits(torch.from_numpy(hidden), torch.from_numpy(lm_head))
    codec = logitstore.make_codec(vocab_size=100, **options)  # 103 columns: 3 are padding
    require_same(
        codec.targets_from_logits(given_logits, input_ids), codec.targets_from_logits(logits[:, :100], input_ids), kind
    )


@pytest.mark.parametrize("options", [{"name": "varopt"}, {"name": "rskd"}])
def test_chunked_logits_equal_whole_ones(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    logits, input_ids, keep_mask = peaked_logits(rng, 40, 64), rng.integers(0, 64, 40), rng.random(39) < 0.6
    codec = logitstore.make_codec(vocab_size=64, **options)
    whole = codec.targets_from_logits(logits, input_ids, keep_mask)
    monkeypatch.setattr("logitstore.codecs.sampled._SAMPLED_CHUNK_BYTES", 3 * 4 * 64)
    require_same(codec.targets_from_logits(logits, input_ids, keep_mask), whole, "chunks of three rows")


@pytest.mark.parametrize("options", [{"name": "varopt"}, {"name": "rskd"}])
def test_samples_drawn_elsewhere_make_the_same_targets(options: dict) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(6)
    logits, input_ids, keep_mask = peaked_logits(rng, 12, 50), rng.integers(0, 50, 12), rng.random(11) < 0.5
    codec = logitstore.make_codec(vocab_size=50, **options)
    direct = codec.targets_from_logits(logits, input_ids, keep_mask)
    rows = codec.sample_rows(logits, np.arange(11), codec.uniforms(input_ids))
    all_rows = codec.targets_from_samples(*rows, input_ids=input_ids, keep_mask=keep_mask)
    kept = [torch.from_numpy(column[keep_mask]) for column in rows]
    require_same(all_rows, direct, "all rows")
    require_same(codec.targets_from_samples(*kept, input_ids=input_ids, keep_mask=keep_mask), direct, "kept rows")


def test_entries_of_varopt_are_limited_by_k_or_by_what_a_weight_can_need() -> None:
    codec = logitstore.make_codec("varopt", vocab_size=100)
    assert (codec.k, codec.max_weight) == (12, None)
    assert codec.config == {"name": "varopt", "vocab_size": 100, "k": 12, "head": "fp16", "seed": 0}
    codec = logitstore.make_codec("varopt", vocab_size=100, max_weight=0.03)
    assert codec.k == 34
    assert codec.config == {"name": "varopt", "vocab_size": 100, "k": 34, "head": "fp16", "seed": 0, "max_weight": 0.03}
    flat = codec.targets_from_logits(np.zeros((3, 100)), [1, 2, 3])
    assert flat.counts.tolist() == [34, 34]
    assert logitstore.make_codec("varopt", vocab_size=100, max_weight=0.03, k=20).targets_from_logits(
        np.zeros((3, 100)), [1, 2, 3]
    ).counts.tolist() == [20, 20]


def test_seeds_draw_anew() -> None:
    rng = np.random.default_rng(7)
    logits, input_ids = peaked_logits(rng, 20, 300, 1.0), rng.integers(0, 300, 20)
    for name in ("varopt", "rskd"):
        a, b = (
            logitstore.make_codec(name, vocab_size=300, seed=s).targets_from_logits(logits, input_ids) for s in (0, 1)
        )
        assert not np.array_equal(a.ids, b.ids)


def test_one_varopt_format_encodes_the_samples_of_another() -> None:
    rng = np.random.default_rng(10)
    logits, input_ids = peaked_logits(rng, 8, 80), rng.integers(0, 80, 8)
    first = logitstore.make_codec("varopt", vocab_size=80, head="fp16").targets_from_logits(logits, input_ids)
    for head in ("fp8", "int8"):
        codec = logitstore.make_codec("varopt", vocab_size=80, head=head)
        decoded = codec.decode(codec.encode(first, input_ids), input_ids)
        np.testing.assert_array_equal(decoded.ids, first.ids)
        np.testing.assert_allclose(decoded.logps, first.logps, atol=0.4)
        assert not np.array_equal(decoded.logps, first.logps)
        require_same(codec.decode(codec.encode(decoded, input_ids), input_ids), decoded, head)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "varopt", "head": "sqrtp"}, "head must be one of fp8, int8, fp16, got 'sqrtp'"),
        ({"name": "varopt", "k": 0}, "k must be an integer from 1 to 65,535, got 0"),
        ({"name": "varopt", "max_weight": 0}, "max_weight must be a number above 0 and below 1, or None, got 0"),
        ({"name": "varopt", "max_weight": 1.0}, "max_weight must be a number above 0 and below 1"),
        ({"name": "varopt", "max_weight": "0.1"}, "max_weight must be a number above 0 and below 1"),
        ({"name": "varopt", "max_weight": float("nan")}, "max_weight must be a number above 0 and below 1"),
        ({"name": "varopt", "max_weight": 1e-5}, "k must be an integer from 1 to 65,535, got 100000"),
        ({"name": "rskd", "max_weight": 0.1}, "no option 'max_weight'"),
        ({"name": "varopt", "seed": -1}, "seed must be an integer from 0"),
        ({"name": "varopt", "tail": "sampled"}, "no option 'tail'"),
        ({"name": "varopt", "vocab_size": 0}, "vocab_size must be an integer from 1"),
        ({"name": "rskd", "draws": 256}, "draws must be an integer from 1 to 255, got 256"),
        ({"name": "rskd", "draws": 5.0}, "draws must be an integer"),
        ({"name": "rskd", "seed": 2**63}, "seed must be an integer from 0 to 9,223,372,036,854,775,807"),
        ({"name": "rskd", "k": 4}, "no option 'k'"),
        ({"name": "rskd", "vocab_size": (1 << 24) + 1}, "16,777,216"),
    ],
)
def test_options_that_do_not_exist(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logitstore.make_codec(**{"vocab_size": 100, **options})


class TestBadInput:
    """Each mistake is named, with the row or position where it is."""

    varopt = logitstore.make_codec("varopt", vocab_size=50, k=4)
    rskd = logitstore.make_codec("rskd", vocab_size=50, draws=4)
    logits = peaked_logits(np.random.default_rng(0), 4, 50)
    ids = np.array([1, 2, 3, 4])

    @pytest.mark.parametrize("codec", [varopt, rskd])
    @pytest.mark.parametrize(
        ("logits", "input_ids", "keep_mask", "error", "message"),
        [
            (logits[:3], ids, None, ValueError, "3 rows of logits for 4 tokens"),
            (logits[:, :49], ids, None, ValueError, "49 columns.*50"),
            ([[0.0]], ids, None, TypeError, "numpy array, a torch tensor or FactoredLogits"),
            (logits, [1, 2, 3, 50], None, ValueError, r"input_ids\[3\] is 50.*0\.\.49"),
            (logits, ids, np.ones(4, bool), ValueError, r"keep_mask must be bool \[3\]"),
            (np.where(np.arange(4)[:, None] == 1, np.nan, logits), ids, None, ValueError, "row 1 have NaN"),
            (np.full((4, 50), -np.inf, np.float32), ids, None, ValueError, "row 0 have NaN"),
            (np.full((4, 50), np.inf, np.float32), ids, None, ValueError, "row 0 have NaN, .inf"),
        ],
    )
    def test_logits(self, codec, logits, input_ids, keep_mask, error, message: str) -> None:
        with pytest.raises(error, match=message):
            codec.targets_from_logits(logits, input_ids, keep_mask)

    @pytest.mark.parametrize(
        ("codec", "change", "message"),
        [
            (varopt, {"ids": [[1, 1], [2, 3], [4, 5]]}, "row 0 of the given rows has a token id twice"),
            (varopt, {"ids": [[1, 2], [2, 50], [4, 5]]}, "row 1 .* beyond the vocabulary of 50"),
            (varopt, {"ids": [[1, 2], [2, 3], [-1, -1]]}, "row 2 .* no entry"),
            (varopt, {"weights": [[0.25, 0.75], [0.75, 0.25], [0.5, 0.5]]}, "row 0 .* not descending"),
            (varopt, {"weights": [[0.5, 0.5], [0.75, 0.2], [0.5, 0.5]]}, "row 1 .* weights that do not sum to 1"),
            (varopt, {"weights": [[1.0, 1e-38], [0.5, 0.5], [0.5, 0.5]]}, "row 0 .* a weight below e.-87"),
            (varopt, {"n_exact": [0, 3, 0]}, "row 1 .* more exact entries than entries"),
            (varopt, {"n_exact": [0, -1, 0]}, "row 1 .* fewer than 0"),
            (varopt, {"n_exact": [0, 0]}, r"n_exact must be \[3\], got \(2,\)"),
            (varopt, {"ids": [[1, 2], [2, 3]]}, r"ids and logweights must be \[N, K\]"),
            (varopt, {"ids": [range(5)] * 3, "weights": [[0.2] * 5] * 3}, "row 0 .* more than 4 entries"),
            (
                rskd,
                {"weights": [[0.5, 0.5], [0.6, 0.4], [0.5, 0.5]]},
                "row 1 has weights that are not multiples of 1/4",
            ),
            (rskd, {"n_exact": [0, 1, 0]}, "row 1 .* exact entries, and rskd has none"),
        ],
    )
    def test_samples(self, codec, change: dict, message: str) -> None:
        rows = {"ids": [[1, 2], [2, 3], [4, 5]], "weights": [[0.5, 0.5]] * 3, "n_exact": [0, 0, 0], **change}
        with pytest.raises(ValueError, match=message):
            codec.targets_from_samples(
                np.array(rows["ids"]), np.log(rows["weights"]), np.array(rows["n_exact"]), input_ids=self.ids
            )

    @pytest.mark.parametrize("codec", [varopt, rskd])
    def test_top_entries_are_no_sample(self, codec) -> None:
        with pytest.raises(ValueError, match=r"Codec keeps samples.*use targets_from_logits, or targets_from_samples"):
            codec.targets_from_topk([[1]], [[0.0]], [-np.inf], [-np.inf], input_ids=[1, 2])

    @pytest.mark.parametrize("codec", [varopt, rskd])
    def test_encode_refuses_what_does_not_belong_together(self, codec) -> None:
        targets = codec.targets_from_logits(self.logits, self.ids)
        with pytest.raises(ValueError, match="not the ones that the targets were made with"):
            codec.encode(targets, self.ids[::-1])
        with pytest.raises(logitstore.SpecMismatchError, match="vocabulary of 50, the codec 60"):
            logitstore.make_codec(**{**codec.config, "vocab_size": 60}).encode(targets, self.ids)
        topk = logitstore.make_codec("topk", vocab_size=50, k=4)
        with pytest.raises(logitstore.SpecMismatchError, match="targets hold weighted samples.*'topk' stores top entr"):
            topk.encode(targets, self.ids)
        with pytest.raises(logitstore.SpecMismatchError, match=r"targets hold top entries.*stores weighted samples"):
            codec.encode(topk.targets_from_logits(self.logits, self.ids), self.ids)

    def test_encode_refuses_rows_that_it_cannot_hold(self) -> None:
        targets = self.varopt.targets_from_logits(self.logits, self.ids)
        with pytest.raises(logitstore.SpecMismatchError, match="has 4 entries, the codec keeps 2"):
            logitstore.make_codec("varopt", vocab_size=50, k=2).encode(targets, self.ids)
        with pytest.raises(logitstore.SpecMismatchError, match="row 0 of the targets is not one of 4 draws"):
            self.rskd.encode(targets, self.ids)
        with pytest.raises(logitstore.CorruptionError, match="row 0 holds weights that do not sum to 1"):
            self.varopt.encode(replace(targets, logps=targets.logps - np.float32(0.1)), self.ids)
        samples = StoredSamples(n_exact=np.array([0, 5, 0]))
        with pytest.raises(logitstore.CorruptionError, match="row 1 holds more exact entries than entries"):
            self.varopt.encode(replace(targets, samples=samples), self.ids)
        with pytest.raises(logitstore.CorruptionError, match=r"samples.n_exact has shape \(2,\), expected \(3,\)"):
            self.varopt.encode(replace(targets, samples=StoredSamples(n_exact=np.array([0, 5]))), self.ids)
        with pytest.raises(logitstore.CorruptionError, match=r"samples.codes has shape \(0,\), expected"):
            samples = replace(targets.samples, codes=targets.samples.codes[:0])
            self.varopt.encode(replace(targets, samples=samples), self.ids)
        with pytest.raises(logitstore.CorruptionError, match="row 2 holds samples and a tail"):
            tail = np.array([-np.inf, -np.inf, -1], np.float32)
            self.varopt.encode(replace(targets, tail_logmass=tail, tail_logmoment_half=tail), self.ids)

    @pytest.mark.parametrize(
        ("codec", "position", "value", "message"),
        [
            (varopt, 6, 5, r"row 0 has 5 exact of 4 entries and a tail code of"),
            (
                varopt,
                6,
                4,
                r"row 0 has 4 exact of 4 entries and a tail code of \d+; 65535 goes with exact entries alone",
            ),
            (rskd, 3, 0, "a row's counts do not add up to 4 draws, or one of them is 0"),
            (rskd, 3, 9, "a row's counts do not add up to 4 draws, or one of them is 0"),
        ],
    )
    def test_decode_says_what_is_wrong_with_sound_bytes(self, codec, position: int, value: int, message: str) -> None:
        """Position in the planes: behind varopt's three u16 counts come the h, behind rskd's three u8 the draws."""
        blob = codec.encode(codec.targets_from_logits(self.logits, self.ids), self.ids)
        header, payload = unpack_blob(blob, max_payload_bytes=1000)
        content = bytearray(payload)
        content[position] = value
        with pytest.raises(logitstore.CorruptionError, match=message):
            codec.decode(pack_blob(header, [bytes(content)]), self.ids)

    @pytest.mark.parametrize("codec", [varopt, rskd])
    @pytest.mark.parametrize("temperature", [0.5, 2.0])
    def test_no_temperature_but_1(self, codec, temperature: float) -> None:
        targets = codec.targets_from_logits(self.logits, self.ids)
        with pytest.raises(
            logitstore.SpecMismatchError, match=f"sampled rows say nothing of temperature {temperature}"
        ):
            targets.dense_logprobs(temperature)
        with pytest.raises(ValueError, match="temperature must be positive"):
            targets.dense_logprobs(0)


def test_a_store_of_samples(tmp_path) -> None:
    rng = np.random.default_rng(11)
    for name in ("varopt", "rskd"):
        codec = logitstore.make_codec(name, vocab_size=400)
        path = tmp_path / f"{name}.parquet"
        written = []
        with logitstore.create(path, logitstore.StoreSpec(codec=codec, vocab_size=400)) as writer:
            for i in range(5):
                input_ids = rng.integers(0, 400, 12)
                logits = peaked_logits(rng, 12, 400)
                logits[np.arange(11), input_ids[1:]] += 8
                written.append(codec.targets_from_logits(logits, input_ids, rng.random(11) < 0.8))
                writer.append(i, input_ids, written[-1])
        store = logitstore.open(path)
        assert store.verify().ok
        assert store.spec.codec == codec
        for sample, targets in zip(store, written, strict=True):
            require_same(sample.targets, targets, name)
