"""The tail model: that fitting it pays, that it sees what it may and nothing else, and that its arrays are checked."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_up_teacher import SETTINGS, V, teacher_samples
from torch.utils.flop_counter import FlopCounterMode

import logitstore
from logitstore.errors import CorruptionError
from logitstore.tail_fit import fit_tail_model, kept_entries
from logitstore.tail_model import (
    TailInputs,
    TailModel,
    _solve,
    model_tensors,
    predicted_coefs,
)
from logitstore.tail_predictor import TailPredictor, tail_inputs
from logitstore.tail_rows import TailRows, tail_rows


@pytest.fixture(scope="module")
def rows() -> TailRows:
    return tail_rows(teacher_samples(0, 150), V)


@pytest.fixture(scope="module")
def model(rows: TailRows) -> TailModel:
    return fit_tail_model(rows, SETTINGS)


def tail_kl(model: TailModel | None, samples: list, k: int = 8) -> np.ndarray:
    """Mean KL(teacher || head exact, tail as predicted) at T = 1 and 2 in float64; None: the uniform tail."""
    codec = logitstore.make_codec("topk", vocab_size=V, k=k, head="fp16")
    kls = []
    for logits, ids, _ in samples:
        z = logits.hidden.astype(np.float64)[:-1] @ logits.lm_head.astype(np.float64).T
        targets = codec.targets_from_logits(logits, ids)
        shape = np.zeros_like(z)
        if model is not None:
            (coefs,) = TailPredictor(model).predicted([targets])
            shape = coefs.astype(np.float64) @ model.arrays["basis"].T.astype(np.float64) + model.arrays["bias"]
        entry = np.zeros(z.shape, bool)
        np.put_along_axis(entry, targets.ids.reshape(len(z), k).astype(np.int64), True, axis=1)
        for temperature in (1, 2):
            log_p = z / temperature - np.logaddexp.reduce(z / temperature, axis=1, keepdims=True)
            tail_p = np.where(entry, -np.inf, log_p)
            tail_q = np.where(entry, -np.inf, shape / temperature)
            tail_q += np.logaddexp.reduce(tail_p, axis=1, keepdims=True) - np.logaddexp.reduce(
                tail_q, axis=1, keepdims=True
            )
            kls.append(np.where(entry, 0, np.exp(log_p) * (log_p - np.where(entry, 0, tail_q))).sum(1).mean())
    return np.array(kls).reshape(-1, 2).mean(0)


def test_the_fit_pays_on_rows_that_it_did_not_see(model: TailModel) -> None:
    others = teacher_samples(1, 10)
    uniform, predicted = tail_kl(None, others), tail_kl(model, others)
    assert np.all(predicted < 0.35 * uniform), (uniform, predicted)


def test_equal_seeds_give_equal_models_and_others_do_not(rows: TailRows) -> None:
    short = replace(SETTINGS, rows_seen=2000)
    first, again, other = (fit_tail_model(rows, replace(short, seed=seed)) for seed in (0, 0, 1))
    for name, array in first.arrays.items():  # up to how a product of matrices is rounded from call to call
        np.testing.assert_allclose(again.arrays[name], array, atol=2e-3 * np.abs(array).max(), err_msg=name)
    assert np.abs(other.arrays["hidden_map"] - first.arrays["hidden_map"]).max() > 0.01


def test_a_fit_stays_on_its_device(rows: TailRows) -> None:
    """torch's device without data takes every operation of a fit: nothing is mixed with the processor's tensors, no
    value is read back before the arrays of the finished model are."""
    stages: dict[str, tuple[int, int]] = {}

    def on_progress(stage: str, done: int, total: int) -> None:
        stages[stage] = done, total

    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        fit_tail_model(rows, replace(SETTINGS, rows_seen=500), device="meta", on_progress=on_progress)
    assert list(stages) == ["metric", "steps", "basis"]
    assert all(done == total for done, total in stages.values())


def test_full_logits_serve_where_the_teacher_gives_no_head() -> None:
    model = fit_tail_model(tail_rows(teacher_samples(0, 150, full=True), V), SETTINGS)
    others = teacher_samples(1, 10)
    assert np.all(tail_kl(model, others) < 0.4 * tail_kl(None, others))
    logits, _, _ = others[0]
    full = logits.hidden @ logits.lm_head.T
    predictor = TailPredictor(model)
    rebuilt = predictor.teacher_coefs(full, np.arange(39)) @ predictor.basis.T + model.arrays["bias"]
    error = (rebuilt - full[:39]) - (rebuilt - full[:39]).mean(1, keepdims=True)
    assert np.abs(error).max() < 0.05


def test_teacher_coefs_give_the_logits_back_up_to_a_constant(model: TailModel) -> None:
    logits, _, _ = teacher_samples(2, 1)[0]
    predictor = TailPredictor(model)
    full = logits.hidden @ logits.lm_head.T
    factored, dense = (predictor.teacher_coefs(given, np.arange(5, 20)) for given in (logits, full))
    np.testing.assert_allclose(factored, dense, atol=0.05)
    rebuilt = factored @ predictor.basis.T + model.arrays["bias"]
    error = (rebuilt - full[5:20]) - (rebuilt - full[5:20]).mean(1, keepdims=True)
    assert np.abs(error).max() < 0.05


def some_targets(seed: int, **options) -> list[logitstore.TeacherTargets]:
    codec = logitstore.make_codec("topk", vocab_size=V, **options)
    rng = np.random.default_rng(seed)
    return [
        codec.targets_from_logits(logits, ids, rng.random(len(ids) - 1) < 0.8)
        for logits, ids, _ in (
            *teacher_samples(seed, 2, 30),
            *teacher_samples(seed, 1, 17),
            *teacher_samples(seed, 1, 2),
        )
    ]


@pytest.mark.parametrize("options", [{"k": 1}, {"k": 8}, {"k": 60, "min_prob": 0.01}])
def test_a_sequence_is_predicted_alike_alone_and_among_others(model: TailModel, options: dict) -> None:
    targets = some_targets(3, **options)
    predictor = TailPredictor(model)
    together = predictor.predicted(targets)
    for sequence, coefs in zip(targets, together, strict=True):
        np.testing.assert_allclose(predictor.predicted([sequence])[0], coefs, atol=2e-4)
        assert coefs.shape == (sequence.n_rows, model.rank)
        assert np.all(coefs[~sequence.present] == 0)
        assert np.all(np.isfinite(coefs))


def test_absent_rows_are_not_seen_by_others(model: TailModel) -> None:
    targets = some_targets(4, k=8)[:1]
    inputs, changed = tail_inputs(targets), tail_inputs(targets)
    absent = torch.from_numpy(~targets[0].present)
    changed.logps[0, absent] = 5.0
    changed.tail_logmass[0, absent] = -1.0
    tensors = model_tensors(model)
    torch.testing.assert_close(predicted_coefs(tensors, changed), predicted_coefs(tensors, inputs))


def test_elimination_solves_as_cholesky_does(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.randn(3, 4, 9, 9, dtype=torch.float64)
    gram, right = a @ a.transpose(-1, -2) + torch.eye(9), torch.randn(3, 4, 9, dtype=torch.float64)
    expected = torch.linalg.solve(gram, right[..., None])[..., 0]
    torch.testing.assert_close(_solve(gram, right), expected)
    by_elimination = _solve(_OnMps(gram), right)
    torch.testing.assert_close(by_elimination, expected)


class _OnMps(torch.Tensor):
    """A tensor that says it lives on an MPS device, where there is no Cholesky."""

    @staticmethod
    def __new__(cls, tensor: torch.Tensor) -> "_OnMps":
        return torch.Tensor._make_subclass(cls, tensor)

    @property
    def device(self) -> torch.device:
        return torch.device("mps")

    __torch_function__ = torch._C._disabled_torch_function_impl


def test_the_stated_cost_is_the_counted_one(model: TailModel) -> None:
    targets = logitstore.make_codec("topk", vocab_size=V, k=16).targets_from_logits(*teacher_samples(5, 1, 41)[0][:2])
    tensors = model_tensors(model)
    with FlopCounterMode(display=False) as counter:
        predicted_coefs(tensors, tail_inputs([targets]))
    counted = counter.get_total_flops() / 2 / targets.n_rows
    elimination = 16**3  # which the counter does not see
    assert counted + elimination == pytest.approx(model.row_macs(16), rel=0.03)


def test_kept_entries_are_what_a_codec_keeps(rows: TailRows) -> None:
    index = torch.arange(20)
    ids, logps, mass, half = kept_entries(rows, index, 8, -math.inf, 0.0)
    exact = torch.from_numpy((rows.hidden[index].float() @ rows.lm_head.T).log_softmax(1).numpy())
    tail = exact.scatter(1, ids, -math.inf)
    # the hidden states are held in float16, so that logits of 30 are off by up to 0.02
    torch.testing.assert_close(mass, tail.logsumexp(1), atol=0.03, rtol=0)
    torch.testing.assert_close(half, (tail / 2).logsumexp(1), atol=0.03, rtol=0)
    torch.testing.assert_close(logps, exact.gather(1, ids), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("basis", lambda a: a.astype(np.float32), "basis is float32"),
        ("bias", lambda a: a[:-1], "bias has shape"),
        ("noise", lambda a: a * np.float32(np.nan), "noise holds NaN or infinity"),
        ("hidden_map", lambda a: a[:-1], "network takes"),
        ("prior", lambda a: a[None], "prior is float32"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(model: TailModel, name, change, message) -> None:
    with pytest.raises(CorruptionError, match=message):
        TailModel({**model.arrays, name: change(model.arrays[name])})
    with pytest.raises(CorruptionError, match="missing or unknown"):
        TailModel({k: v for k, v in model.arrays.items() if k != name})


def test_nothing_to_fit_on_is_said() -> None:
    logits, ids, _ = teacher_samples(0, 1)[0]
    with pytest.raises(ValueError, match="no sample has a present row"):
        tail_rows([(logits, ids, np.zeros(len(ids) - 1, bool))], V)
    with pytest.raises(ValueError, match="there are no samples"):
        tail_rows([], V)


def test_inputs_hold_only_the_entries_that_are_measured() -> None:
    ids = torch.arange(40).repeat(1, 2, 1)
    zeros = torch.zeros(1, 2)
    inputs = TailInputs(zeros.long(), zeros.long(), ids, ids.float(), zeros, zeros)
    assert inputs.ids.shape == (1, 2, 32)
    assert inputs.n_entries.tolist() == [[40, 40]]
