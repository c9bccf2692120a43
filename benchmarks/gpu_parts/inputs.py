"""What the losses are measured on: peaked random logits of student and teacher, and the teacher's batch of int8 codes.

Letters: N rows, K entries kept, V vocabulary, r coefficients.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from logitstore_kernels import TeacherBatch, topk_with_tail
from logitstore_kernels.reference import distillation_loss_reference
from torch import Tensor

K, ALPHA, SPREAD = 64, 0.7, 3.0
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Inputs:
    """One size. logits_NV is what a loss is given; an in-place one destroys it, and restore() brings it back."""

    drawn_NV: Tensor
    logits_NV: Tensor
    teacher_logits_NV: Tensor
    teacher: TeacherBatch
    labels_N: Tensor

    @staticmethod
    def seeded(n_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device, *, seed: int = 0) -> "Inputs":
        generator = torch.Generator(device).manual_seed(seed)
        drawn_NV = normal(n_rows, vocab_size, dtype, generator)
        teacher_NV = normal(n_rows, vocab_size, dtype, generator)
        labels_N = torch.randint(vocab_size, (n_rows,), generator=generator, device=device)
        teacher = coded_teacher(teacher_NV, min(K, vocab_size - 1))
        return Inputs(drawn_NV, drawn_NV.clone().requires_grad_(), teacher_NV, teacher, labels_N)

    @torch.no_grad()
    def restore(self) -> None:
        self.logits_NV.copy_(self.drawn_NV)


def normal(n_rows: int, n_columns: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """[N, V] with a standard deviation of SPREAD, drawn in float32 some rows at a time."""
    out = torch.empty(n_rows, n_columns, dtype=dtype, device=generator.device)
    for start in range(0, n_rows, _ROWS_AT_ONCE):
        rows = out[start : start + _ROWS_AT_ONCE]
        rows.copy_(SPREAD * torch.randn(rows.shape, generator=generator, device=generator.device))
    return out


def coded_teacher(teacher_logits_NV: Tensor, k: int, *, numbers: bool = True) -> TeacherBatch:
    """Its k most probable tokens as one-byte codes, with two numbers a row or none, and both tail moments."""
    kept = topk_with_tail(teacher_logits_NV, k)
    moments = {"tail_logmass_N": kept.tail_logmass_N, "tail_logmoment_half_N": kept.tail_logmoment_half_N}
    table = torch.arange(256, dtype=torch.float32, device=teacher_logits_NV.device)
    if numbers:
        offset_N = kept.logps_NK[:, 0]
        scale_N = ((kept.logps_NK[:, -1] - offset_N) / 255).clamp(max=-1e-6)
        codes_NK = ((kept.logps_NK - offset_N[:, None]) / scale_N[:, None]).round()
        moments |= {"scale_N": scale_N, "offset_N": offset_N}
    else:
        table = -table / 16
        codes_NK = (-16 * kept.logps_NK).round().clamp(max=255)
    return TeacherBatch.from_codes(
        kept.ids_NK, codes_NK.to(torch.uint8), table, **moments, vocab_size=teacher_logits_NV.shape[1]
    )


def with_random_tail(teacher: TeacherBatch, rank: int, dtype: torch.dtype) -> TeacherBatch:
    """The batch with tail logits of that rank: basis [V, r] and bias [V] of this dtype, coefficients in float32."""
    generator = torch.Generator(teacher.device).manual_seed(rank)
    draw = {"generator": generator, "device": teacher.device}
    coefs_Nr = torch.randn(teacher.n_rows, rank, **draw)
    basis_Vr = torch.randn(teacher.vocab_size, rank, **draw) / rank**0.5
    return teacher.with_dense_tail(coefs_Nr, basis_Vr.to(dtype), torch.randn(teacher.vocab_size, **draw).to(dtype))


def value_and_gradient(loss_function: Callable[..., Tensor], logits_NV: Tensor, *args, **kwargs) -> tuple:
    """(loss, its gradient with respect to logits_NV), neither of them copied."""
    loss = loss_function(logits_NV, *args, **kwargs)
    (gradient_NV,) = torch.autograd.grad(loss.sum(), logits_NV)
    return loss.detach(), gradient_NV


def truth(logits_NV: Tensor, dtype: torch.dtype, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """(loss of each row, gradient of their sum) of the reference in this dtype from the same logits, as float64."""
    leaf = logits_NV.detach().to(dtype).requires_grad_()
    loss_N, gradient_NV = value_and_gradient(distillation_loss_reference, leaf, *args, reduction="none", **kwargs)
    return loss_N.double(), gradient_NV.double()


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|, norms over all elements, in float64; NaN where either has one."""
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-300))


def edge_rows(n_rows: int) -> Tensor:
    """The first and last 8 rows: the last lie where an address of 32 bits would have overflowed."""
    return torch.cat([torch.arange(min(8, n_rows)), torch.arange(min(max(n_rows - 8, 8), n_rows), n_rows)])


def some_rows(teacher: TeacherBatch, rows: Tensor) -> TeacherBatch:
    """The batch of these rows, its log-probs decoded to floats."""
    rows = rows.to(teacher.device)
    columns = (teacher.ids_NK, teacher.logprobs_NK, teacher.tail_logmass_N, teacher.tail_logmoment_half_N)
    few = TeacherBatch.from_topk(*(column[rows] for column in columns), vocab_size=teacher.vocab_size)
    if teacher.dense_tail is None:
        return few
    tail = teacher.dense_tail
    return few.with_dense_tail(tail.coefs_Nr[rows], tail.basis_Vr, tail.bias_V)
