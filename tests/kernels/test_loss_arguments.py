"""Every way of calling a loss wrongly: each is refused, with the same message by the fast path and by the reference."""

import math
from dataclasses import replace

import pytest
import torch
from logitstore_kernels import TeacherBatch, distillation_loss, distillation_loss_parts
from logitstore_kernels.reference import distillation_loss_parts_reference, distillation_loss_reference

LOSSES = [distillation_loss, distillation_loss_parts, distillation_loss_reference, distillation_loss_parts_reference]

BAD_OPTIONS = [
    ({"temperature": 0.0}, ValueError, r"temperature must be positive and finite, got 0\.0"),
    ({"temperature": math.inf}, ValueError, "temperature must be positive and finite, got inf"),
    ({"temperature": math.nan}, ValueError, "temperature must be positive and finite, got nan"),
    ({"temperature": "2"}, TypeError, "temperature must be a number, got str"),
    ({"temperature": torch.tensor(2.0)}, TypeError, "temperature must be a number, got Tensor"),
    ({"alpha": -0.1}, ValueError, r"alpha must be in \[0, 1\].*got -0\.1"),
    ({"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\].*got 1\.5"),
    ({"alpha": True}, TypeError, "alpha must be a number, got bool"),
    ({"tail": "ghost"}, ValueError, "one of bucket, uniform, renormalised, dropped, dense, sampled, got 'ghost'"),
    ({"tail": "sampled"}, ValueError, "tail='sampled' is impossible: the teacher batch holds top-k entries"),
    ({"reduction": "batchmean"}, ValueError, "reduction must be one of none, sum, mean, got 'batchmean'"),
    ({"reduction": "sum", "num_items_in_batch": 3}, ValueError, "denominator of reduction='mean', got reduction='sum'"),
    ({"reduction": "none", "num_items_in_batch": 3}, ValueError, "denominator of reduction='mean'"),
    ({"num_items_in_batch": 0}, ValueError, "num_items_in_batch must be positive and finite, got 0"),
    ({"num_items_in_batch": float("nan")}, ValueError, "num_items_in_batch must be positive and finite, got nan"),
    ({"num_items_in_batch": float("inf")}, ValueError, "num_items_in_batch must be positive and finite, got inf"),
    ({"num_items_in_batch": "3"}, TypeError, "num_items_in_batch must be an int or a tensor, got str"),
    ({"num_items_in_batch": torch.ones(2)}, ValueError, r"num_items_in_batch must hold one number, got shape \(2,\)"),
]


@pytest.mark.parametrize("loss_function", LOSSES)
@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS, ids=[str(option[0]) for option in BAD_OPTIONS])
def test_bad_options(case_factory, loss_function, options, error, message):
    case = case_factory(3, 11, 4)
    with pytest.raises(error, match=message):
        loss_function(case.logits_NV, case.teacher, case.labels_N, **options)


@pytest.mark.parametrize("loss_function", LOSSES)
def test_tensors_that_do_not_go_together(case_factory, loss_function):
    case = case_factory(3, 11, 4)
    logits_NV, teacher, labels_N = case.logits_NV, case.teacher, case.labels_N
    bad_calls = [
        ((logits_NV.numpy(), teacher, labels_N), TypeError, "student_logits_NV must be a torch.Tensor, got ndarray"),
        (
            (logits_NV.long(), teacher, labels_N),
            TypeError,
            r"student_logits_NV must be of a float dtype, got torch\.int64",
        ),
        ((logits_NV, (teacher.ids_NK,), labels_N), TypeError, "the teacher must be a TeacherBatch, got tuple"),
        ((logits_NV, teacher, labels_N.tolist()), TypeError, "labels_N must be a torch.Tensor, got list"),
        (
            (logits_NV, teacher, labels_N.float()),
            TypeError,
            r"labels_N must be torch\.int32 or torch\.int64, got torch\.float32",
        ),
        ((logits_NV[None], teacher, labels_N), ValueError, r"got \(1, 3, 11\) and \(3,\); flatten"),
        ((logits_NV, teacher, labels_N[None]), ValueError, r"got \(3, 11\) and \(1, 3\); flatten"),
        ((logits_NV[:2], teacher, labels_N), ValueError, "student_logits_NV has 2, the teacher batch 3, labels_N 3"),
        ((logits_NV, teacher, labels_N[:2]), ValueError, "student_logits_NV has 3, the teacher batch 3, labels_N 2"),
        ((logits_NV[:, :10], teacher, labels_N), ValueError, "10 columns, fewer than the teacher's vocab_size=11"),
        (
            (logits_NV, teacher.to("meta"), labels_N),
            ValueError,
            r"on cpu, the teacher batch on meta, labels_N on cpu.*teacher\.to",
        ),
    ]
    for args, error, message in bad_calls:
        with pytest.raises(error, match=message):
            loss_function(*args)


@pytest.mark.parametrize("loss_function", LOSSES)
@pytest.mark.parametrize("label", [-1, 11, 12])
def test_a_label_outside_the_vocabulary(case_factory, loss_function, label):
    case = case_factory(3, 11, 4)
    wide_NW = torch.cat([case.logits_NV, case.logits_NV], dim=1)  # a padded column is no token either
    labels_N = case.labels_N.clone()
    labels_N[1:] = label
    with pytest.raises(ValueError, match=rf"labels_N\[1\] is {label}, expected a token in \[0, 11\).*\(2 such rows\)"):
        loss_function(wide_NW, case.teacher, labels_N)
    if label < 0:
        loss_function(wide_NW, case.teacher, labels_N, ignore_index=label)


@pytest.mark.parametrize("loss_function", LOSSES)
def test_a_dense_tail_must_have_been_given(case_factory, loss_function):
    case = case_factory(3, 11, 4)
    teacher = replace(case.teacher, dense_tail=None)
    message = (
        "tail='dense' is impossible: the teacher batch has no tail coefficients and basis, which with_dense_tail adds; "
        "use one of bucket, uniform, renormalised, dropped$"
    )
    with pytest.raises(ValueError, match=message):
        loss_function(case.logits_NV, teacher, case.labels_N, tail="dense")


@pytest.mark.parametrize("loss_function", LOSSES)
def test_samples_have_one_tail_and_one_temperature(case_factory, loss_function):
    case = case_factory(3, 11, 4)
    samples = TeacherBatch.from_samples(case.teacher.ids_NK, case.teacher.logprobs_NK, vocab_size=11)
    for tail in ("bucket", "uniform", "renormalised", "dropped"):
        message = f"tail='{tail}' is impossible: the teacher batch holds weighted samples.*use one of sampled"
        with pytest.raises(ValueError, match=message):
            loss_function(case.logits_NV, samples, case.labels_N, 1.0, tail=tail)
    with pytest.raises(ValueError, match="tail='dense' is impossible: the teacher batch holds weighted samples"):
        loss_function(case.logits_NV, samples, case.labels_N, 1.0, tail="dense")
    for temperature in (0.5, 2.0):
        with pytest.raises(ValueError, match=f"tail='sampled' needs temperature=1, got {temperature}: samples are unb"):
            loss_function(case.logits_NV, samples, case.labels_N, temperature, tail="sampled")


@pytest.mark.parametrize("loss_function", LOSSES)
@pytest.mark.parametrize("tail", ["bucket", "uniform", "dropped", "dense"])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_temperature_that_needs_the_half_moment(case_factory, loss_function, tail, temperature):
    case = case_factory(3, 11, 4)
    teacher = replace(case.teacher, tail_logmoment_half_N=None)
    with pytest.raises(
        ValueError, match=rf"tail='{tail}' at temperature={temperature} needs tail_logmoment_half_N.*uniform_moment"
    ):
        loss_function(case.logits_NV, teacher, case.labels_N, temperature, tail=tail)
    loss_function(case.logits_NV, teacher, case.labels_N, 1.0, tail=tail)


def test_without_the_half_moment_the_other_losses_are_what_they_were(case_factory):
    case = case_factory(3, 11, 4)
    teacher = replace(case.teacher, tail_logmoment_half_N=None)
    for loss_function in (distillation_loss, distillation_loss_reference):
        for temperature, tail in [(1.0, "bucket"), (1.0, "uniform"), (1.0, "dropped"), (2.0, "renormalised")]:
            without = loss_function(case.logits_NV, teacher, case.labels_N, temperature, tail=tail)
            assert without == loss_function(case.logits_NV, case.teacher, case.labels_N, temperature, tail=tail)


@pytest.mark.parametrize("tail", ["bucket", "uniform", "dropped"])
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_labels_alone_need_no_half_moment(case_factory, value_and_gradient, tail, temperature):
    case = case_factory(5, 11, 4).with_ignored(2)
    teacher = replace(case.teacher, tail_logmoment_half_N=None)
    plain = value_and_gradient(torch.nn.functional.cross_entropy, case.logits_NV, case.labels_N)
    for loss_function in (distillation_loss, distillation_loss_reference):
        got = value_and_gradient(loss_function, case.logits_NV, teacher, case.labels_N, temperature, 0.0, tail)
        torch.testing.assert_close(got, plain, rtol=1e-14, atol=1e-15)
    for parts_function in (distillation_loss_parts, distillation_loss_parts_reference):
        with pytest.raises(ValueError, match="needs tail_logmoment_half_N"):
            parts_function(case.logits_NV, teacher, case.labels_N, temperature, 0.0, tail)


def test_a_batch_of_every_token_needs_no_half_moment(case_factory):
    case = case_factory(3, 11, 11)
    kept = (case.teacher.ids_NK, case.teacher.logprobs_NK, case.teacher.tail_logmass_N)
    teacher = TeacherBatch.from_topk(*kept, vocab_size=11)
    loss = distillation_loss(case.logits_NV, teacher, case.labels_N, 2.0)
    assert loss == distillation_loss(case.logits_NV, case.teacher, case.labels_N, 2.0)
