"""Errors of the tail's mass and of asked log-probs, recomputed in float64 from full logits."""

import numpy as np
from logitstore_trainer.bench.tail_measures import TEMPERATURES, TailErrors, TeacherTail
from made_up_teacher import V, teacher_samples

import logitstore


def _log_softmax(z):
    return z - np.logaddexp.reduce(z, axis=1, keepdims=True)


def _add(errors: TailErrors, codec, logits, ids) -> logitstore.TeacherTargets:
    decoded = codec.targets_from_logits(logits, ids)
    logp = _log_softmax((logits.hidden[:-1] @ logits.lm_head.T).astype(np.float64))
    errors.add(decoded, decoded.dense_logprobs(), TeacherTail.of(logp))
    return decoded


def test_mass_is_that_of_all_tokens_that_are_no_entries():
    codec = logitstore.make_codec("topk", vocab_size=V, head="int8", k=5)
    errors = [TailErrors(), TailErrors()]
    total, n_rows = np.zeros(len(TEMPERATURES)), 0
    for number, (logits, ids, _) in enumerate(teacher_samples(2, 2, 30)):
        decoded = _add(errors[number], codec, logits, ids)
        z = (logits.hidden[:-1] @ logits.lm_head.T).astype(np.float64)
        for i, temperature in enumerate(TEMPERATURES):
            p, q = np.exp(_log_softmax(z / temperature)), np.exp(decoded.dense_logprobs(temperature))
            entries = np.zeros_like(p, bool)
            entries[np.repeat(np.arange(29), decoded.counts), decoded.ids] = True
            total[i] += np.abs(np.where(entries, 0, p - q).sum(axis=1)).sum()
        n_rows += 29
    found = TailErrors.joined(errors).as_json()["tail_mass_error"]
    assert list(found) == ["1", "1.25", "1.5", "2", "3", "4"]
    np.testing.assert_allclose(list(found.values()), total / n_rows, rtol=1e-3, atol=1e-6)
    assert found["1"] < 1e-3  # the moments at 1 and 1/2 are stored, all others follow from them
    assert found["2"] < 1e-3 < found["4"]


def test_asked_tokens_are_compared_one_by_one():
    logits, ids, _ = teacher_samples(3, 1, 30)[0]
    everything = logitstore.make_codec("topk", vocab_size=V, head="fp16", k=V)
    error = TailErrors()
    _add(error, everything, logits, ids)
    assert 0 < error.as_json()["logprobs_at_error"] < 5e-3  # fp16 alone
    few = TailErrors()
    _add(few, logitstore.make_codec("topk", vocab_size=V, head="fp16", k=1), logits, ids)
    assert few.as_json()["logprobs_at_error"] > 0.3  # a uniform tail does not know them


def test_samples_say_nothing_of_a_tail():
    logits, ids, _ = teacher_samples(3, 1, 30)[0]
    error = TailErrors()
    _add(error, logitstore.make_codec("rskd", vocab_size=V, draws=9), logits, ids)
    assert error.as_json() == {"tail_mass_error": None, "logprobs_at_error": None}


def test_no_rows_have_no_error():
    assert TailErrors.joined([]).as_json() == {"tail_mass_error": None, "logprobs_at_error": None}
