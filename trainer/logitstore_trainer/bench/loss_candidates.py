"""The losses that `bench kernels` compares, their inputs, and their errors against float64.

Letters: N rows, K entries kept, V vocabulary. T is the temperature.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

K, ALPHA = 64, 0.7
OURS, EAGER, DENSE = "logitstore distillation_loss", "same loss, eager PyTorch", "dense loop, full teacher logits"
_ROWS_CHECKED = 16
BUFFERS = 2


@dataclass(frozen=True)
class Case:
    """One size: n_rows rows of logits over vocab_size tokens, at a temperature, logits of that dtype."""

    n_rows: int
    vocab_size: int
    temperature: float
    dtype: str


@dataclass(frozen=True)
class LossInputs:
    """Buffers of one case: student logits [N, V] (several, called in turn), teacher batch and logits, labels [N]."""

    student_logits: tuple["torch.Tensor", ...]
    teacher: Any
    teacher_logits_NV: "torch.Tensor"
    labels_N: "torch.Tensor"
    temperature: float

    @staticmethod
    def seeded(case: Case, device: "torch.device") -> "LossInputs":
        """Peaked random logits: normal with a standard deviation of 3, the same for a case on every run."""
        import torch
        from logitstore_kernels import TeacherBatch, topk_with_tail

        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, case.dtype)

        def logits() -> torch.Tensor:
            drawn = 3 * torch.randn(case.n_rows, case.vocab_size, generator=generator)
            return drawn.to(device=device, dtype=dtype)

        students = tuple(logits() for _ in range(BUFFERS))
        teacher_logits_NV = logits()
        top = topk_with_tail(teacher_logits_NV, min(K, case.vocab_size))
        teacher = TeacherBatch.from_topk(*top, vocab_size=case.vocab_size)
        labels_N = torch.randint(case.vocab_size, (case.n_rows,), generator=generator).to(device)
        return LossInputs(students, teacher, teacher_logits_NV, labels_N, case.temperature)

    def first_rows(self, n_rows: int) -> "LossInputs":
        """The same with the first rows only, of the first buffer."""
        from logitstore_kernels import TeacherBatch

        t = self.teacher
        columns = (t.ids_NK, t.logprobs_NK, t.tail_logmass_N, t.tail_logmoment_half_N)
        teacher = TeacherBatch.from_topk(*(column[:n_rows] for column in columns), vocab_size=t.vocab_size)
        student = (self.student_logits[0][:n_rows],)
        return LossInputs(student, teacher, self.teacher_logits_NV[:n_rows], self.labels_N[:n_rows], self.temperature)

    def in_float64(self) -> "LossInputs":
        """The same values as float64 tensors on the CPU."""
        from logitstore_kernels import TeacherBatch

        t = self.teacher
        columns = (t.logprobs_NK, t.tail_logmass_N, t.tail_logmoment_half_N)
        widened = (column.cpu().double() for column in columns)
        return LossInputs(
            tuple(logits.cpu().double() for logits in self.student_logits),
            TeacherBatch.from_topk(t.ids_NK.cpu(), *widened, vocab_size=t.vocab_size),
            self.teacher_logits_NV.cpu().double(),
            self.labels_N.cpu(),
            self.temperature,
        )


def value_and_gradient(name: str, inputs: LossInputs, buffer: int = 0) -> "tuple[torch.Tensor, torch.Tensor]":
    """(loss, its gradient with respect to the student's logits [N, V]) by the candidate of that name."""
    logits_NV = inputs.student_logits[buffer % len(inputs.student_logits)].detach().requires_grad_()
    loss = LOSSES[name](logits_NV, inputs)
    loss.backward()
    return loss.detach(), logits_NV.grad


def dense_loop_loss(logits_NV: "torch.Tensor", inputs: LossInputs) -> "torch.Tensor":
    """The loss of distillation articles, as they write it: every teacher logit in memory, batchmean over rows."""
    from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

    T = inputs.temperature
    kl = kl_div(log_softmax(logits_NV / T, -1), softmax(inputs.teacher_logits_NV / T, -1), reduction="batchmean")
    return ALPHA * kl * T * T + (1 - ALPHA) * cross_entropy(logits_NV, inputs.labels_N)


def _ours(logits_NV: "torch.Tensor", inputs: LossInputs) -> "torch.Tensor":
    from logitstore_kernels import distillation_loss

    return distillation_loss(
        logits_NV, inputs.teacher, inputs.labels_N, temperature=inputs.temperature, alpha=ALPHA, tail="bucket"
    )


def _eager(logits_NV: "torch.Tensor", inputs: LossInputs) -> "torch.Tensor":
    from logitstore_kernels.reference import distillation_loss_reference

    return distillation_loss_reference(
        logits_NV, inputs.teacher, inputs.labels_N, temperature=inputs.temperature, alpha=ALPHA, tail="bucket"
    )


LOSSES: dict[str, Callable[..., Any]] = {OURS: _ours, EAGER: _eager, DENSE: dense_loop_loss}


def relative_errors(name: str, inputs: LossInputs) -> tuple[float, float]:
    """(error of the loss, largest error of its gradient), each over the size of the float64 truth; on 16 rows."""
    few = inputs.first_rows(_ROWS_CHECKED)
    truth_name = DENSE if name == DENSE else EAGER
    loss64, gradient64 = value_and_gradient(truth_name, few.in_float64())
    loss, gradient = value_and_gradient(name, few)
    loss_error = abs(float(loss) - float(loss64)) / abs(float(loss64))
    gradient_error = (gradient.cpu().double() - gradient64).abs().max() / gradient64.abs().max()
    return loss_error, float(gradient_error)


def bytes_needed(name: str, case: Case) -> int:
    """Student logits read once, gradient written once, and the teacher: K entries a row, or V logits for the loop."""
    item = {"float32": 4, "bfloat16": 2, "float16": 2}[case.dtype]
    student = 2 * case.n_rows * case.vocab_size * item  # read logits, write gradient
    if name == DENSE:
        return student + case.n_rows * case.vocab_size * item  # read the teacher's logits
    return student + case.n_rows * (min(K, case.vocab_size) * 8 + 8 + 8)  # ids and log-probs, two moments, label
