"""The top-k codec with a predicted tail: bytes give everything back, it beats the uniform tail, and corrections pay."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from made_up_teacher import SETTINGS, D, V, teacher_samples

import logitstore
from logitstore.codecs.topk import LEAST_PREDICTED_VOCAB, TopKCodec
from logitstore.errors import CorruptionError, SpecMismatchError
from logitstore.fit_codec import fitted_on_rows, fitted_steps, targets_of_rows
from logitstore.logits_source import FactoredLogits
from logitstore.tail_fit import fit_tail_model
from logitstore.tail_rows import TailRows, tail_rows


@pytest.fixture(scope="module")
def rows() -> TailRows:
    return tail_rows(teacher_samples(0, 150), V)


@pytest.fixture(scope="module")
def tail(rows: TailRows):
    return fit_tail_model(rows, replace(SETTINGS, rows_seen=40_000))


def fitted(rows: TailRows, tail, **options) -> TopKCodec:
    return fitted_on_rows(logitstore.make_codec("topk", vocab_size=V, tail="predicted", **options), rows, tail)


OPTIONS = (
    {"k": 8, "head": "log"},
    {"k": 8, "head": "log", "tail_step": 0.3},
    {"k": 40, "head": "int8", "min_prob": 0.02, "tail_step": 0.1},
    {"k": 1, "head": "fp16", "tail_step": 0.05},
)


@pytest.mark.parametrize("options", OPTIONS)
def test_bytes_give_targets_back(rows: TailRows, tail, options: dict, tmp_path) -> None:
    codec = fitted(rows, tail, **options)
    codec.save(tmp_path)
    codec = logitstore.load_codec(tmp_path)
    rng = np.random.default_rng(1)
    for logits, ids, _ in teacher_samples(1, 3):
        targets = codec.targets_from_logits(logits, ids, rng.random(len(ids) - 1) < 0.8)
        blob = codec.encode(targets, ids)
        decoded = codec.decode(blob, ids)
        for name in ("ids", "logps", "tail_logmass", "tail_logmoment_half", "offsets"):
            np.testing.assert_array_equal(getattr(decoded, name), getattr(targets, name))
        assert (decoded.corrections is None) == ("tail_step" not in options)
        if decoded.corrections is not None:
            np.testing.assert_array_equal(decoded.corrections, targets.corrections)
            assert np.all(decoded.corrections[~decoded.present] == 0)
            assert np.any(decoded.corrections)
        assert codec.encode(decoded, ids) == blob
        np.testing.assert_array_equal(decoded.dense_logprobs(2.0), targets.dense_logprobs(2.0))


def test_several_steps_fitted_at_once_are_those_fitted_alone(rows: TailRows, tail) -> None:
    steps = (None, 0.3, 0.1)
    codec = logitstore.make_codec("topk", vocab_size=V, k=8, head="log", tail="predicted")
    together = list(fitted_steps(codec, rows, tail, steps))
    alone = [fitted(rows, tail, k=8, head="log", tail_step=step) for step in steps]
    assert [codec.config for codec in together] == [codec.config for codec in alone]
    assert len({codec.tables_sha256 for codec in together}) == 3


def kl_to_teacher(codec: TopKCodec, temperature: float) -> float:
    total, n_rows = 0.0, 0
    for logits, ids, _ in teacher_samples(1, 8):
        z = (logits.hidden.astype(np.float64)[:-1] @ logits.lm_head.astype(np.float64).T) / temperature
        log_p = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
        log_q = codec.targets_from_logits(logits, ids).dense_logprobs(temperature)
        total += float((np.exp(log_p) * (log_p - log_q)).sum())
        n_rows += len(z)
    return total / n_rows


@pytest.mark.parametrize("temperature", [1.0, 1.5, 2.0])
def test_prediction_beats_the_uniform_tail_and_corrections_beat_prediction(rows, tail, temperature: float) -> None:
    uniform = logitstore.make_codec("topk", vocab_size=V, k=8, head="log")
    kls = [kl_to_teacher(uniform, temperature)]
    kls += [kl_to_teacher(fitted(rows, tail, k=8, head="log", tail_step=s), temperature) for s in (None, 0.5, 0.1)]
    assert np.all(np.diff(kls) < 0), kls
    assert kls[1] < 0.4 * kls[0]
    if temperature != 1.5:  # in between, the mass of the tail is interpolated
        assert kls[3] < 0.15 * kls[1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_dense_logprobs_are_the_distribution_that_is_stored(rows, tail, temperature: float) -> None:
    codec = fitted(rows, tail, k=8, head="log", tail_step=0.3)
    logits, ids, _ = teacher_samples(2, 1)[0]
    targets = codec.targets_from_logits(logits, ids, np.arange(39) % 4 > 0)
    dense = targets.dense_logprobs(temperature)
    assert np.all(np.isnan(dense[~targets.present]))
    uniform = replace(targets, tail_model=None, corrections=None).dense_logprobs(temperature)
    (coefs,) = targets.tail_model.predicted([targets])
    coefs = coefs.astype(np.float64)
    coefs[:, : targets.corrections.shape[1]] += targets.corrections
    for t in np.flatnonzero(targets.present):
        entries = targets.ids[targets.offsets[t] : targets.offsets[t + 1]]
        others = np.setdiff1d(np.arange(V), entries)
        np.testing.assert_allclose(dense[t, entries], uniform[t, entries], atol=2e-6)
        shape = (
            targets.tail_model.basis[others] @ coefs[t] + targets.tail_model.model.arrays["bias"][others]
        ) / temperature
        mass = np.logaddexp.reduce(uniform[t, others].astype(np.float64))
        np.testing.assert_allclose(dense[t, others], shape - np.logaddexp.reduce(shape) + mass, atol=2e-4)
    present = targets.present
    np.testing.assert_allclose(np.exp(dense[present].astype(np.float64)).sum(axis=1), 1, atol=2e-6)


def test_logprobs_at_are_those_of_dense_logprobs(rows, tail) -> None:
    logits, ids, _ = teacher_samples(2, 1)[0]
    wanted = np.random.default_rng(0).integers(0, V, (39, 7))
    for codec in (logitstore.make_codec("topk", vocab_size=V, k=8), fitted(rows, tail, k=8, tail_step=0.3)):
        targets = codec.targets_from_logits(logits, ids)
        expected = np.take_along_axis(targets.dense_logprobs(2.0), wanted, axis=1)
        np.testing.assert_array_equal(targets.logprobs_at(wanted, 2.0), expected)
    with pytest.raises(ValueError, match=r"ids must be integers \[39, M\], got int64 \(3, 7\)"):
        targets.logprobs_at(wanted[:3])
    with pytest.raises(ValueError, match=f"ids must lie in 0..{V - 1}"):
        targets.logprobs_at(wanted + V)


def test_calibrate_fits_everything_from_samples() -> None:
    samples = teacher_samples(0, 40, 30)
    codec = logitstore.make_codec("topk", vocab_size=V, k=8, head="log", tail="predicted", tail_step=0.2)
    logits, ids = [sample[0] for sample in samples], [sample[1] for sample in samples]
    ready = logitstore.calibrate(codec, logits, ids)
    assert ready.tables.tail.rank == D
    assert kl_to_teacher(ready, 1.0) < 0.25 * kl_to_teacher(logitstore.make_codec("topk", vocab_size=V, k=8), 1.0)
    more = replace(ready, k=100, min_prob=1e-3)  # beyond the 64 entries that are held, and with its tail model kept
    more = logitstore.calibrate(more, logits[:10], ids[:10])
    assert more.tables.tail is ready.tables.tail
    assert more.tables_sha256 != ready.tables_sha256
    assert kl_to_teacher(more, 1.0) < kl_to_teacher(ready, 1.0)


def test_a_store_of_predicted_tails_is_written_and_read(rows, tail, tmp_path) -> None:
    codec = fitted(rows, tail, k=8, head="log", tail_step=0.3)
    path = tmp_path / "x.parquet"
    samples = teacher_samples(3, 3)
    with logitstore.create(path, logitstore.StoreSpec(codec=codec, vocab_size=V)) as writer:
        for number, (logits, ids, _) in enumerate(samples):
            writer.append(number, ids, codec.targets_from_logits(logits, ids))
    store = logitstore.open(path)
    for sample, (logits, ids, _) in zip(store, samples, strict=True):
        expected = codec.targets_from_logits(logits, ids).dense_logprobs(2.0)
        np.testing.assert_array_equal(sample.targets.dense_logprobs(2.0), expected)
    assert logitstore.verify(path).ok
    (table,) = (tmp_path / "x.parquet.tables").glob("*.safetensors")
    content = bytearray(table.read_bytes())
    content[-1] ^= 1
    table.write_bytes(content)
    with pytest.raises(CorruptionError, match="not that of their name"):
        logitstore.open(path)
    table.unlink()
    with pytest.raises(SpecMismatchError, match="coded with tables that are missing"):
        logitstore.open(path)[0]


def test_what_a_predicted_tail_needs_is_said(rows, tail) -> None:
    logits, ids, _ = teacher_samples(2, 1)[0]
    unfitted = logitstore.make_codec("topk", vocab_size=V, k=8, tail="predicted")
    with pytest.raises(SpecMismatchError, match="was not fitted: logitstore.calibrate fits it"):
        unfitted.targets_from_logits(logits, ids)
    codec = fitted(rows, tail, k=8, tail_step=0.3)
    kept = logitstore.make_codec("topk", vocab_size=V, k=8).targets_from_logits(logits, ids)
    with pytest.raises(SpecMismatchError, match="codec has a tail_step, the targets no corrections"):
        codec.encode(kept, ids)
    top = torch.from_numpy(logits.hidden @ logits.lm_head.T).log_softmax(1).topk(8)
    moments = np.full(39, -3.0, np.float32), np.full(39, 1.0, np.float32)
    with pytest.raises(ValueError, match=r"needs teacher_coefs \(39, 12\).*got None"):
        codec.targets_from_topk(top.indices[:-1], top.values[:-1], *moments, input_ids=ids)
    with pytest.raises(SpecMismatchError, match="codec has tail_step None, its tables are for tail_step 0.3"):
        replace(codec, tail_step=None, tables_sha256=None, tables=None).with_tables(codec.tables)
    with pytest.raises(SpecMismatchError, match="its tables hold no tail model"):
        unfitted.with_tables(replace(codec.tables, tail=None, corrections=None))


@pytest.mark.parametrize("as_full_logits", [False, True])
def test_tokens_that_the_teacher_rules_out_stay_ruled_out(as_full_logits: bool) -> None:
    never = np.arange(V) % 3 == 0
    bias = np.where(never, -np.inf, 0).astype(np.float32)
    logits, ids = [], []
    for factored, tokens, _ in teacher_samples(0, 40, 30):
        full = factored.hidden @ factored.lm_head.T + bias
        logits.append(full if as_full_logits else replace(factored, bias=bias))
        ids.append(tokens)
    codec = logitstore.make_codec("topk", vocab_size=V, k=8, head="log", tail="predicted", tail_step=0.3)
    codec = logitstore.calibrate(codec, logits, ids)
    targets = codec.targets_from_logits(logits[0], ids[0])
    decoded = codec.decode(codec.encode(targets, ids[0]), ids[0])
    dense = np.exp(decoded.dense_logprobs().astype(np.float64))
    assert dense[:, never].sum(axis=1).max() < 1e-3
    # logits of the ruled out reach 100 below the others, where float32 has steps of 8e-6
    np.testing.assert_allclose(dense.sum(axis=1), 1, atol=2e-5)


def test_a_vocabulary_too_small_to_predict_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a vocabulary of 18 tokens or more, got 5"):
        logitstore.make_codec("topk", vocab_size=5, tail="predicted")


def _with(value: float) -> np.ndarray:
    logits = np.random.default_rng(0).standard_normal((20, 100)).astype(np.float32)
    logits[3, 4] = value
    return logits


def _only_token_3() -> np.ndarray:
    return np.where(np.arange(100) == 3, 0, -np.inf) + np.zeros((20, 1), np.float32)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (_with(np.nan), "logits of row 3 have NaN"),
        (_with(np.inf), "logits of row 3 have NaN, .inf or no finite value"),
        (FactoredLogits(_with(np.nan)[:, :8], np.ones((100, 8))), "logits of row 3 have NaN"),
        (FactoredLogits(_with(1e6)[:, :8], np.ones((100, 8))), r"hidden states reach 1e\+06, a fit takes .* 65504"),
        (np.zeros((20, 100), np.float32), "whose tails do not differ"),
        (_only_token_3(), "whose tails do not differ"),
        (1000 * _with(0), "whose tails do not differ"),
    ],
    ids=["nan", "inf", "hidden nan", "hidden beyond float16", "flat", "one-hot", "steep"],
)
def test_rows_that_no_tail_can_be_fitted_to_are_refused(logits, message: str) -> None:
    codec = logitstore.make_codec("topk", vocab_size=100, tail="predicted", tail_step=0.3)
    with pytest.raises(ValueError, match=message):
        logitstore.calibrate(codec, [logits] * 6, [np.arange(20)] * 6)


@pytest.mark.parametrize("vocab_size", [LEAST_PREDICTED_VOCAB, 64, 65])
def test_a_small_vocabulary_can_be_predicted_whether_or_not_every_token_is_kept(vocab_size: int) -> None:
    rng = np.random.default_rng(0)
    logits = [(3 * rng.standard_normal((20, vocab_size))).astype(np.float32) for _ in range(6)]
    ids = [rng.integers(0, vocab_size, 20) for _ in logits]
    sample = tail_rows(list(zip(logits, ids, [None] * 6, strict=True)), vocab_size)
    tail = fit_tail_model(sample, SETTINGS)
    for k in (3, 64):
        options = {"k": min(k, vocab_size), "head": "log", "tail": "predicted", "tail_step": 0.3}
        codec = fitted_on_rows(logitstore.make_codec("topk", vocab_size=vocab_size, **options), sample, tail)
        for number, of_rows in enumerate(targets_of_rows(codec, sample)):
            read = codec.targets_from_logits(logits[number], ids[number])
            assert codec.encode(of_rows, ids[number])
            assert np.isneginf(of_rows.tail_logmass[of_rows.counts == vocab_size]).all()
            np.testing.assert_array_equal(of_rows.ids, read.ids)
            np.testing.assert_allclose(of_rows.teacher_coefs, read.teacher_coefs, atol=0.02)


def test_full_logits_are_corrected_as_well_as_hidden_states_with_their_head() -> None:
    """Their head is narrower than the directions that float32 finds in them."""
    found = []
    for full in (False, True):
        sample = tail_rows(teacher_samples(0, 30, full=full), V)
        codec = fitted(sample, fit_tail_model(sample, SETTINGS), k=8, head="log", tail_step=0.1)
        kl = n_bytes = 0.0
        for (logits, ids, _), (whole, _, _) in zip(
            teacher_samples(1, 4, full=full), teacher_samples(1, 4, full=True), strict=True
        ):
            targets = codec.targets_from_logits(logits, ids)
            z = whole[:-1].astype(np.float64) / 2
            log_p = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
            kl += float((np.exp(log_p) * (log_p - targets.dense_logprobs(2.0))).sum()) / len(z) / 4
            n_bytes += len(codec.encode(targets, ids))
        found.append((kl, n_bytes))
    assert found[1] == pytest.approx(found[0], rel=0.15)
    assert found[0][0] < 0.02
