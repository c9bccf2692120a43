"""What a call of a distillation loss may ask for, checked before anything is allocated, and the reduction over rows.

Shared by the reference and by the fast paths, so that they refuse the same things and divide by the same number.
Checks of values (labels in range) are made on a CPU only, where reading one costs no synchronisation, and not under
torch.compile, where there is no value yet.

Letters: N rows, W student columns (W >= V), V vocabulary. T is the temperature.
"""

import math
import numbers
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from logitstore_kernels.divergences import TAILS_OF_DIVERGENCE, check_divergence_of_tail
from logitstore_kernels.loss_terms import LossTerms
from logitstore_kernels.teacher_batch import TeacherBatch
from logitstore_kernels.tensor_checks import refuse_rows

TAILS_OF_TOPK = ("bucket", "uniform", "renormalised", "dropped")
TAILS = (*TAILS_OF_TOPK, "dense", "sampled")
REDUCTIONS = ("none", "sum", "mean")


class DistillationLossParts(NamedTuple):
    """loss carries the graph; kl (KL at T in nats, without the factor T^2) and ce (nats) are detached.

    All three are on the logits' device and reduced alike: scalars over the same rows with the same denominator, or [N]
    for "none".
    """

    loss: Tensor
    kl: Tensor
    ce: Tensor


class CheckedRows(NamedTuple):
    """terms, its temperature and alpha as floats; which rows count [N] bool; what each row's loss is multiplied with, 0
    axes or [N]."""

    terms: LossTerms
    counted_N: Tensor
    weight: Tensor


def checked_rows(
    student_logits_NW: Tensor,
    teacher: TeacherBatch,
    labels_N: Tensor,
    terms: LossTerms,
    ignore_index: int,
    reduction: str,
    num_items_in_batch: int | Tensor | None,
    row_weights_N: Tensor | None = None,
) -> CheckedRows:
    """What every path begins with: all checks, and the rows and weights that follow from the arguments.

    student_logits_NW: only shape, dtype and device are looked at.
    """
    check_arguments(
        student_logits_NW, teacher, labels_N, temperature=terms.temperature, alpha=terms.alpha, tail=terms.tail,
        ignore_index=ignore_index, reduction=reduction, num_items_in_batch=num_items_in_batch,
        kl_wanted=terms.kl_wanted,
    )  # fmt: skip
    check_extra_terms(terms, row_weights_N, labels_N)
    counted_N = counted_rows(labels_N, teacher, ignore_index, num_items_in_batch)
    check_reverse_kl_is_finite(teacher, terms, counted_N)
    weight = row_weight(counted_N, reduction, num_items_in_batch, compute_dtype(student_logits_NW), row_weights_N)
    if row_weights_N is not None:
        counted_N = counted_N & (row_weights_N != 0)
    floats = replace(terms, temperature=float(terms.temperature), alpha=float(terms.alpha))
    return CheckedRows(floats, counted_N, weight)


def logits_like(tensor_ND: Tensor, n_columns: int) -> Tensor:
    """Logits [N, n_columns] with rows, dtype and device of tensor_ND that take no memory: for the checks alone."""
    return tensor_ND.detach().new_empty(1).expand(len(tensor_ND), n_columns)


def check_arguments(
    student_logits_NW: Tensor,
    teacher: TeacherBatch,
    labels_N: Tensor,
    *,
    temperature: float,
    alpha: float,
    tail: str,
    ignore_index: int,
    reduction: str,
    num_items_in_batch: int | Tensor | None,
    kl_wanted: bool,
) -> None:
    """Raise TypeError or ValueError, saying what was got and expected, unless the loss can be computed.

    Where the KL is not wanted, the teacher need not have what only its temperature asks for.
    """
    _check_tensors(student_logits_NW, teacher, labels_N)
    if not isinstance(temperature, numbers.Real) or isinstance(temperature, bool):
        raise TypeError(f"temperature must be a number, got {type(temperature).__name__}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if not isinstance(alpha, numbers.Real) or isinstance(alpha, bool):
        raise TypeError(f"alpha must be a number, got {type(alpha).__name__}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1] (alpha weighs T^2 * KL, 1 - alpha cross-entropy), got {alpha}")
    _check_tail(tail, teacher)
    if kl_wanted:
        _check_temperature_of_tail(tail, teacher, temperature)
    _check_reduction(reduction, num_items_in_batch)
    if _values_can_be_read(labels_N):
        bad_N = (labels_N != ignore_index) & ((labels_N < 0) | (labels_N >= teacher.vocab_size))
        if bad_N.any():
            row = int(bad_N.nonzero()[0, 0])
            raise ValueError(
                f"labels_N[{row}] is {int(labels_N[row])}, expected a token in [0, {teacher.vocab_size}) "
                f"or ignore_index={ignore_index} ({int(bad_N.sum())} such rows)"
            )


def check_extra_terms(terms: LossTerms, row_weights_N: Tensor | None, labels_N: Tensor) -> None:
    """Raise TypeError or ValueError unless divergence, label smoothing, z-loss, softcap and row weights may be used."""
    _check_divergence(terms)
    for name in ("label_smoothing", "z_loss", "softcap"):
        value = getattr(terms, name)
        if value is None and name == "softcap":
            continue
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= terms.label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {terms.label_smoothing}")
    if not 0 <= terms.z_loss < math.inf:
        raise ValueError(f"z_loss must be finite and at least 0, got {terms.z_loss}")
    if terms.softcap is not None and not 0 < terms.softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {terms.softcap}; None is for no softcap")
    if row_weights_N is None:
        return
    if not isinstance(row_weights_N, Tensor):
        raise TypeError(f"row_weights_N must be a torch.Tensor, got {type(row_weights_N).__name__}")
    if not row_weights_N.is_floating_point():
        raise TypeError(f"row_weights_N must be of a float dtype, got {row_weights_N.dtype}")
    if row_weights_N.shape != labels_N.shape:
        raise ValueError(
            f"row_weights_N must have shape {tuple(labels_N.shape)} to go with labels_N, "
            f"got {tuple(row_weights_N.shape)}"
        )
    if row_weights_N.device != labels_N.device:
        raise ValueError(f"row_weights_N is on {row_weights_N.device} but labels_N is on {labels_N.device}; move it")
    if row_weights_N.requires_grad:
        raise ValueError("row_weights_N requires a gradient, which the loss does not have for it; pass .detach()")
    if _values_can_be_read(row_weights_N):
        refuse_rows(~row_weights_N.isfinite(), "a row weight that is not finite", row_weights_N)


def _check_divergence(terms: LossTerms) -> None:
    if terms.divergence not in TAILS_OF_DIVERGENCE:
        raise ValueError(f"divergence must be one of {', '.join(TAILS_OF_DIVERGENCE)}, got {terms.divergence!r}")
    if not isinstance(terms.jsd_beta, numbers.Real) or isinstance(terms.jsd_beta, bool):
        raise TypeError(f"jsd_beta must be a number, got {type(terms.jsd_beta).__name__}")
    if not 0 < terms.jsd_beta < 1:
        raise ValueError(
            f"jsd_beta must be in (0, 1), got {terms.jsd_beta}; at the ends the JSD is 0 whatever the student does"
        )
    if terms.kl_wanted:
        check_divergence_of_tail(terms.divergence, terms.tail)


def check_reverse_kl_is_finite(teacher: TeacherBatch, terms: LossTerms, counted_N: Tensor) -> None:
    """Raise ValueError on a CPU where a counted row's tail has tokens and no mass, which makes reverse KL infinite."""
    if not terms.kl_wanted or terms.divergence != "reverse_kl" or not _values_can_be_read(counted_N):
        return
    massless_N = counted_N & (teacher.tail_logmass_N == -math.inf) & (teacher.n_tail_N > 0)
    if massless_N.any():
        row = int(massless_N.nonzero()[0, 0])
        raise ValueError(
            f"divergence='reverse_kl' is infinite in row {row}: the teacher's tail has tokens but no mass "
            f"({int(massless_N.sum())} such rows); use divergence='jsd', 'tvd' or 'forward_kl'"
        )


def _values_can_be_read(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_tensors(student_logits_NW: Tensor, teacher: TeacherBatch, labels_N: Tensor) -> None:
    if not isinstance(teacher, TeacherBatch):
        raise TypeError(f"the teacher must be a TeacherBatch, got {type(teacher).__name__}")
    for name, value in (("student_logits_NV", student_logits_NW), ("labels_N", labels_N)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not student_logits_NW.is_floating_point():
        raise TypeError(f"student_logits_NV must be of a float dtype, got {student_logits_NW.dtype}")
    if labels_N.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"labels_N must be torch.int32 or torch.int64, got {labels_N.dtype}")
    if student_logits_NW.dim() != 2 or labels_N.dim() != 1:
        raise ValueError(
            f"student_logits_NV must be [N, V] and labels_N [N], got {tuple(student_logits_NW.shape)} and "
            f"{tuple(labels_N.shape)}; flatten batch and length with .flatten(0, 1)"
        )
    n_rows, width = student_logits_NW.shape
    if not n_rows == teacher.n_rows == labels_N.shape[0]:
        raise ValueError(
            f"rows must be aligned: student_logits_NV has {n_rows}, the teacher batch {teacher.n_rows}, "
            f"labels_N {labels_N.shape[0]}"
        )
    if width < teacher.vocab_size:
        raise ValueError(
            f"student_logits_NV has {width} columns, fewer than the teacher's vocab_size={teacher.vocab_size}; "
            "student and teacher must share one vocabulary"
        )
    if not student_logits_NW.device == teacher.device == labels_N.device:
        raise ValueError(
            f"student_logits_NV is on {student_logits_NW.device}, the teacher batch on {teacher.device}, labels_N on "
            f"{labels_N.device}; move them to one device (teacher.to(device))"
        )


def _check_tail(tail: str, teacher: TeacherBatch) -> None:
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {tail!r}")
    possible = TAILS_OF_TOPK if teacher.dense_tail is None else (*TAILS_OF_TOPK, "dense")
    why_not = "the teacher batch holds top-k entries, not weighted samples"
    if teacher.is_sampled:
        possible, why_not = ("sampled",), "the teacher batch holds weighted samples, not top-k entries and a tail"
    elif tail == "dense":
        why_not = "the teacher batch has no tail coefficients and basis, which with_dense_tail adds"
    if tail not in possible:
        raise ValueError(f"tail={tail!r} is impossible: {why_not}; use one of {', '.join(possible)}")


def _check_temperature_of_tail(tail: str, teacher: TeacherBatch, temperature: float) -> None:
    if tail == "sampled" and temperature != 1:
        raise ValueError(
            f"tail='sampled' needs temperature=1, got {temperature}: samples are unbiased at the temperature at which "
            "they were drawn; use temperature=1, or a store of codec 'topk'"
        )
    if tail != "renormalised" and temperature != 1 and teacher.tail_logmoment_half_N is None:
        raise ValueError(
            f"tail={tail!r} at temperature={temperature} needs tail_logmoment_half_N, which the teacher batch lacks; "
            "store it, use temperature=1 or tail='renormalised', or assume a flat tail with teacher.uniform_moment()"
        )


def _check_reduction(reduction: str, num_items_in_batch: int | Tensor | None) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if num_items_in_batch is None:
        return
    if reduction != "mean":
        raise ValueError(
            f"num_items_in_batch is the denominator of reduction='mean', got reduction={reduction!r}; leave it out"
        )
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1:
            raise ValueError(f"num_items_in_batch must hold one number, got shape {tuple(num_items_in_batch.shape)}")
    elif not isinstance(num_items_in_batch, numbers.Real) or isinstance(num_items_in_batch, bool):
        raise TypeError(f"num_items_in_batch must be an int or a tensor, got {type(num_items_in_batch).__name__}")
    elif not 0 < num_items_in_batch < math.inf:
        raise ValueError(f"num_items_in_batch must be positive and finite, got {num_items_in_batch}")


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64 logits, float32 for every other float dtype."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def counted_rows(
    labels_N: Tensor, teacher: TeacherBatch, ignore_index: int, num_items_in_batch: int | Tensor | None
) -> Tensor:
    """[N] bool, True where the row counts: its label is not ignore_index and the teacher row is present.

    A num_items_in_batch tensor that holds 0 says that no row counts, and then none does.
    """
    counted_N = (labels_N != ignore_index) & teacher.present_N
    if isinstance(num_items_in_batch, Tensor):
        counted_N &= num_items_in_batch.to(counted_N.device).reshape(()) != 0
    return counted_N


def row_weight(
    counted_N: Tensor,
    reduction: str,
    num_items_in_batch: int | Tensor | None,
    dtype: torch.dtype,
    row_weights_N: Tensor | None = None,
) -> Tensor:
    """What each row is multiplied with: 1 or 1 / denominator, 0 axes, on the rows' device; times row_weights_N, [N].

    The mean of no counted row at all is 0, not 0 / 0: where the denominator is 0, so is every row.
    """
    if reduction != "mean":
        weight = torch.ones((), dtype=dtype, device=counted_N.device)
    elif num_items_in_batch is None:
        weight = counted_N.sum().clamp(min=1).to(dtype).reciprocal()
    elif not isinstance(num_items_in_batch, Tensor):  # a fill: a copy to the device would wait for it
        weight = torch.full((), 1 / num_items_in_batch, dtype=dtype, device=counted_N.device)
    else:
        n_items = num_items_in_batch.to(counted_N.device).reshape(()).to(dtype)
        weight = n_items.masked_fill(n_items == 0, 1).reciprocal()
    return weight if row_weights_N is None else weight * row_weights_N.to(dtype)


def reduce_rows(loss_N: Tensor, kl_N: Tensor, ce_N: Tensor, weight: Tensor, reduction: str) -> DistillationLossParts:
    """The three per-row values times `weight`, summed unless reduction is "none"; uncounted rows are 0 already."""
    parts = DistillationLossParts(loss_N, kl_N.detach(), ce_N.detach())
    if reduction != "none" or weight.dim():
        parts = DistillationLossParts(*(part_N * weight for part_N in parts))
    return parts if reduction == "none" else DistillationLossParts(*(part_N.sum() for part_N in parts))
