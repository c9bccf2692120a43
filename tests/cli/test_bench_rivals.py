"""Rivals of `bench storage` that store something about every token, and top-p with samples: what they write, what is
read back, and how many bytes that takes."""

import numpy as np
import pytest
from logitstore_trainer.bench.full_vocabulary_rivals import HeadDirections, LlamaCppLayout, head_directions
from logitstore_trainer.bench.logits_file import LogitsFile, LogitsSample
from logitstore_trainer.bench.nucleus_rival import DRAWN, NucleusAndSamples
from made_up_teacher import D, V, teacher_samples
from safetensors.numpy import save_file


def _log_softmax(z):
    z = np.asarray(z, np.float64)
    return z - np.logaddexp.reduce(z, axis=1, keepdims=True)


def _sample(seed=0, length=40):
    logits, ids, _ = teacher_samples(seed, 1, length)[0]
    return LogitsSample(ids.astype(np.int32), logits), _log_softmax(logits.hidden[:-1] @ logits.lm_head.T)


@pytest.mark.parametrize("vocab_size", [V, V - 1])  # odd and even: rows are padded to an even number of tokens
def test_llama_cpp_rows_are_16_bits_a_token_clipped_16_nats_below_the_greatest(tmp_path, vocab_size):
    rng = np.random.default_rng(0)
    logits = (4 * rng.standard_normal((9, vocab_size))).astype(np.float32)
    logits[3, :5] = -100
    sample = LogitsSample(rng.integers(0, vocab_size, 9).astype(np.int32), logits)
    candidate = LlamaCppLayout(vocab_size)
    candidate.open(tmp_path)
    read = candidate.add(0, sample)
    totals = candidate.close()
    assert totals.n_rows == 8
    assert totals.blob_bytes == 8 * (8 + 2 * (vocab_size + vocab_size % 2))
    assert (tmp_path / "logits.kld").stat().st_size == totals.container_bytes == totals.blob_bytes + 4 * 9
    clipped = np.maximum(logits[:-1], logits[:-1].max(axis=1, keepdims=True) - 16)
    for temperature in (1.0, 2.0):
        np.testing.assert_allclose(read(temperature), _log_softmax(clipped / temperature), atol=3e-4)


def test_all_directions_of_a_head_rebuild_the_logits_and_fewer_lose_the_least_they_can(tmp_path):
    samples = teacher_samples(1, 20, 40)
    path = tmp_path / "fit.safetensors"
    tensors = {
        "input_ids": np.concatenate([ids for _, ids, _ in samples]).astype(np.int32),
        "sample_lengths": np.full(20, 40, np.int32),
        "hidden": np.concatenate([logits.hidden for logits, _, _ in samples]),
        "lm_head": samples[0][0].lm_head.copy(),
    }
    save_file(tensors, str(path))
    directions = head_directions(LogitsFile(path))
    sample, log_p = _sample(5)
    errors = []
    for rank in (3, 6, D):
        candidate = HeadDirections(V, directions, rank, budget=rank + 3)
        place = tmp_path / str(rank)
        place.mkdir()
        candidate.open(place)
        log_q = candidate.add(0, sample)(1.0)
        errors.append(float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()))
        totals = candidate.close()
        assert totals.blob_bytes <= 39 * (rank + 3)
        assert totals.container_bytes == totals.blob_bytes + 4 * 40 + candidate.table_bytes
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3  # what int8 loses
    # principal directions of the centred logits: no other three explain more of them
    centred = (tensors["hidden"] - directions.mean) @ (tensors["lm_head"] - tensors["lm_head"].mean(axis=0)).T
    kept = (tensors["hidden"] - directions.mean) @ directions.to_coefs[:, :3] @ directions.from_coefs[:, :3].T
    explained = np.sum((kept @ (tensors["lm_head"] - tensors["lm_head"].mean(axis=0)).T) ** 2)
    best = np.sum(np.linalg.svd(centred.astype(np.float64), compute_uv=False)[:3] ** 2)
    assert explained == pytest.approx(best, rel=0.02)


def test_without_a_head_there_are_no_directions(tmp_path):
    logits = np.zeros((4, 20), np.float32)
    save_file(
        {"input_ids": np.zeros(4, np.int32), "sample_lengths": np.array([4]), "logits": logits},
        str(tmp_path / "logits.safetensors"),
    )
    assert head_directions(LogitsFile(tmp_path / "logits.safetensors")) is None


def test_a_nucleus_holds_its_mass_and_24_others_are_known_besides(tmp_path):
    sample, log_p = _sample(3)
    candidate = NucleusAndSamples(V)
    candidate.open(tmp_path)
    read = candidate.add(0, sample)
    ids_RK, logps_RK, counts_R, _ = candidate._entries(0, sample, 39)
    for row in range(39):
        p = np.sort(np.exp(log_p[row]))[::-1]
        nucleus = min(1 + int((np.cumsum(p) < 0.98).sum()), 100)
        assert counts_R[row] == nucleus + DRAWN
        kept = ids_RK[row, : counts_R[row]]
        assert len(set(kept.tolist())) == len(kept)
        assert set(kept[:nucleus].tolist()) == set(np.argsort(-log_p[row])[:nucleus].tolist())
        np.testing.assert_allclose(logps_RK[row, : counts_R[row]], log_p[row, kept], atol=1e-5)
    totals = candidate.close()
    entries = int(counts_R.sum())
    assert totals.blob_bytes == 5 * 39 + (entries * 18 + 7) // 8 + 2 * entries
    log_q = read(1.0)
    np.testing.assert_allclose(np.exp(log_q).sum(axis=1), 1, atol=1e-5)
    row = 7
    kept = ids_RK[row, : counts_R[row]]
    np.testing.assert_allclose(log_q[row, kept], log_p[row, kept], atol=2e-3)  # steps of 1e-3, and one normalisation
    others = np.setdiff1d(np.arange(V), kept)
    left = 1 - np.exp(log_p[row, kept]).sum()
    np.testing.assert_allclose(np.exp(log_q[row, others]), left / len(others), rtol=0.05)
