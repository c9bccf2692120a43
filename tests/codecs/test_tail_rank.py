"""A tail model in fewer coefficients: it loses what lies outside its directions, and no directions lose less."""

import numpy as np
import pytest
import torch
from made_up_teacher import SETTINGS, D, V, teacher_samples

import logitstore
from logitstore.fit_codec import fit_tail, fitted_on_rows
from logitstore.tail_fit import fit_tail_model
from logitstore.tail_model import TailModel
from logitstore.tail_predictor import TailPredictor
from logitstore.tail_rank import default_rank, with_rank
from logitstore.tail_rows import TailRows, tail_rows


@pytest.fixture(scope="module")
def rows() -> TailRows:
    return tail_rows(teacher_samples(0, 100), V)


@pytest.fixture(scope="module")
def model(rows: TailRows) -> TailModel:
    return fit_tail(rows, SETTINGS)


def predicted_logits(model: TailModel) -> np.ndarray:
    """The predicted tail logits of unseen rows [R, V] float64, each row less its mean."""
    codec = logitstore.make_codec("topk", vocab_size=V, k=8, head="fp16")
    parts = []
    for logits, ids, _ in teacher_samples(9, 4):
        (coefs,) = TailPredictor(model).predicted([codec.targets_from_logits(logits, ids)])
        parts.append(coefs.astype(np.float64) @ model.arrays["basis"].T.astype(np.float64) + model.arrays["bias"])
    z = np.concatenate(parts)
    return z - z.mean(axis=1, keepdims=True)


def test_fewer_directions_lose_more_of_the_prediction_and_one_less_than_all_almost_nothing(
    model: TailModel, rows: TailRows
) -> None:
    full = predicted_logits(model)
    lost = []
    for rank in (D - 1, D // 2, 1):
        fewer = with_rank(model, rows, rank)
        assert (fewer.rank, fewer.vocab_size) == (rank, V)
        assert fewer.row_macs(16) < model.row_macs(16)
        lost.append(float(np.square(predicted_logits(fewer) - full).mean() / np.square(full - full.mean(0)).mean()))
    assert lost[0] < 0.05
    assert lost[0] < lost[1] < lost[2] < 1


def test_its_directions_lose_less_than_the_first_ones_of_the_full_model(model: TailModel, rows: TailRows) -> None:
    arrays = dict(model.arrays)
    for name in ("basis", "coefs_map", "coefs_bias"):
        arrays[name] = np.ascontiguousarray(arrays[name][..., : D // 2])
    first = np.square(predicted_logits(TailModel(arrays)) - predicted_logits(model)).mean()
    chosen = np.square(predicted_logits(with_rank(model, rows, D // 2)) - predicted_logits(model)).mean()
    assert chosen < 0.9 * first


def test_a_codec_with_corrections_works_in_fewer_directions(model: TailModel, rows: TailRows) -> None:
    kls = []
    for rank in (3, 9):
        codec = logitstore.make_codec("topk", vocab_size=V, k=8, head="log", tail="predicted", tail_step=0.05)
        codec = fitted_on_rows(codec, rows, with_rank(model, rows, rank))
        kl = 0.0
        for logits, ids, _ in teacher_samples(9, 4):
            targets = codec.decode(codec.encode(codec.targets_from_logits(logits, ids), ids), ids)
            z = torch.from_numpy(logits.hidden[:-1] @ logits.lm_head.T).double()
            log_p = z.log_softmax(-1)
            kl += float((log_p.exp() * (log_p - torch.from_numpy(targets.dense_logprobs()))).sum(-1).mean())
        kls.append(kl)
    assert kls[1] < 0.5 * kls[0]


def test_the_full_rank_is_the_model_itself_and_more_is_refused(model: TailModel, rows: TailRows) -> None:
    assert with_rank(model, rows, D) is model
    for rank in (0, D + 1):
        with pytest.raises(ValueError, match=f"rank must be 1 to {D}.*got {rank}"):
            with_rank(model, rows, rank)


def test_codecs_of_coarse_corrections_or_none_are_fitted_in_fewer_coefficients(
    rows: TailRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By calibrate and on rows alike; a tail model that is given is taken as it is."""
    assert [default_rank(step) for step in (None, 0.12, 0.1)] == [256, 256, None]
    monkeypatch.setattr("logitstore.tail_rank.FEW", 7)
    monkeypatch.setattr("logitstore.fit_codec.fit_tail_model", lambda rows, _, **__: made)
    made = fit_tail_model(rows, SETTINGS)
    logits, ids, _ = zip(*teacher_samples(0, 100), strict=True)
    for step, expected in ((None, 7), (0.5, 7), (0.1, D)):
        codec = logitstore.make_codec("topk", vocab_size=V, k=8, head="log", tail="predicted", tail_step=step)
        assert logitstore.calibrate(codec, logits, ids).tail_rank == expected
        assert fitted_on_rows(codec, rows).tail_rank == expected
        assert fitted_on_rows(codec, rows, made).tail_rank == D


def test_fit_tail_takes_a_rank(rows: TailRows, model: TailModel) -> None:
    few = fit_tail(rows, SETTINGS, rank=5)
    assert few.rank == 5
    np.testing.assert_allclose(few.arrays["basis"], with_rank(model, rows, 5).arrays["basis"], atol=0.05)
