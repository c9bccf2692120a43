"""The Triton loss as PyTorch operators, opaque to torch.compile, and as an autograd function over them.

There is an operator for values alone, one for values with a new gradient, and one that writes the gradient over the
logits; under torch.compile the last is not used, since reusing a buffer is the compiler's own business. The gradient is
made with the values, multiplied with what a row's loss is expected to be multiplied with. backward() multiplies it
again only in rows where something else came, which the device finds out by itself. It can be differentiated once.

Letters: N rows, K entries kept, V vocabulary, W columns (W >= V).
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from logitstore_kernels.chunked import graph_is_kept
from logitstore_kernels.loss_terms import LossRows, LossTerms
from logitstore_kernels.teacher_batch import TeacherBatch
from logitstore_kernels.triton_dense_launch import launch_dense
from logitstore_kernels.triton_launch import LossOutputs, PackedTeacher, launch, packed
from logitstore_kernels.triton_scale import scale_rows_kernel

# PackedTeacher, the rows, and LossTerms, in the order of their fields.
_ARGUMENTS = (
    "Tensor ids, Tensor values, Tensor? table, Tensor? scale, Tensor? offset, Tensor tail_logmass, "
    "Tensor? tail_logmoment_half, Tensor? coefs, Tensor? basis, Tensor? bias, Tensor labels, Tensor counted, "
    "Tensor upstream, int vocab_size, float temperature, float alpha, str tail, bool kl_wanted, bool ce_wanted, "
    "float label_smoothing, float z_loss, float? softcap"
)
_N_TEACHER = len(PackedTeacher._fields)
_UPSTREAM = _N_TEACHER + 2
_DEVICES = ("cpu", "cuda")

torch.library.define("logitstore::loss_rows", f"(Tensor logits, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "logitstore::loss_rows_and_gradient", f"(Tensor logits, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
torch.library.define("logitstore::loss_rows_in_place", f"(Tensor(a!) logits, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
torch.library.define("logitstore::scale_rows_in_place", "(Tensor(a!) rows, Tensor factor) -> ()")


def _launch(logits_NW: Tensor, gradient_NW: Tensor | None, arguments: tuple) -> LossOutputs:
    teacher, rest = PackedTeacher(*arguments[:_N_TEACHER]), arguments[_N_TEACHER:]
    labels_N, counted_N, upstream_N, vocab_size, *terms = rest
    launch_kernels = launch if teacher.basis_Vr is None else launch_dense
    with _current(logits_NW.device):
        return launch_kernels(
            logits_NW, gradient_NW, teacher, labels_N, counted_N, upstream_N, LossTerms(*terms), vocab_size=vocab_size
        )


def _current(device: torch.device) -> AbstractContextManager:
    """Makes a CUDA device the current one, which is where Triton launches whatever the tensors say."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@torch.library.impl("logitstore::loss_rows", _DEVICES)
def _rows(logits_NW: Tensor, *arguments) -> LossOutputs:
    return _launch(logits_NW, None, arguments)


@torch.library.impl("logitstore::loss_rows_and_gradient", _DEVICES)
def _rows_and_gradient(logits_NW: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradient_NW = torch.empty_like(logits_NW, memory_format=torch.contiguous_format)
    return *_launch(logits_NW, gradient_NW, arguments), gradient_NW


@torch.library.impl("logitstore::loss_rows_in_place", _DEVICES)
def _rows_in_place(logits_NW: Tensor, *arguments) -> LossOutputs:
    return _launch(logits_NW, logits_NW, arguments)


@torch.library.impl("logitstore::scale_rows_in_place", _DEVICES)
def _scale_rows_in_place(rows_NW: Tensor, factor_N: Tensor) -> None:
    n_rows, n_columns = rows_NW.shape
    if rows_NW.numel():
        block = min(8192, triton.next_power_of_2(n_columns))
        with _current(rows_NW.device):
            scale_rows_kernel[(n_rows,)](rows_NW, factor_N, n_columns, rows_NW.stride(0), BLOCK=block, num_warps=8)


@torch.library.register_fake("logitstore::loss_rows")
@torch.library.register_fake("logitstore::loss_rows_in_place")
def _fake_rows(logits_NW: Tensor, *_arguments) -> LossOutputs:
    return LossOutputs(*(logits_NW.new_empty(logits_NW.shape[0], dtype=torch.float32) for _ in range(3)))


@torch.library.register_fake("logitstore::loss_rows_and_gradient")
def _fake_rows_and_gradient(logits_NW: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_fake_rows(logits_NW), torch.empty_like(logits_NW, memory_format=torch.contiguous_format)


@torch.library.register_fake("logitstore::scale_rows_in_place")
def _fake_scale_rows_in_place(rows_NW: Tensor, factor_N: Tensor) -> None:
    return None


def triton_loss_rows(
    logits_NW: Tensor,
    teacher: TeacherBatch,
    labels_N: Tensor,
    counted_N: Tensor,
    terms: LossTerms,
    *,
    expected_upstream: Tensor,
    inplace: bool = False,
) -> LossRows:
    """The values of each row [N] in float32, differentiable once with respect to logits_NW; see chunked_loss_rows.

    expected_upstream: 0 axes or [N].
    """
    # float16 has no room for gradients divided by N before a GradScaler has multiplied them.
    if logits_NW.dtype == torch.float16:
        expected_upstream = torch.ones_like(expected_upstream)
    upstream_N = expected_upstream.float().expand(len(labels_N))
    arguments = (
        *packed(teacher, with_dense_tail=terms.kl_wanted and terms.tail == "dense"), labels_N,
        counted_N.view(torch.uint8), upstream_N, teacher.vocab_size, terms.temperature, terms.alpha, terms.tail,
        terms.kl_wanted, terms.ce_wanted, terms.label_smoothing, terms.z_loss, terms.softcap,
    )  # fmt: skip
    if torch.is_grad_enabled() and logits_NW.requires_grad:
        return LossRows(*_TritonLoss.apply(logits_NW, inplace, *arguments))
    return LossRows(*torch.ops.logitstore.loss_rows(logits_NW.detach(), *arguments))


class _TritonLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NW, inplace, *arguments):
        logits_NW = logits_NW.detach()  # shares the version counter
        if inplace and not torch.compiler.is_compiling():
            rows = torch.ops.logitstore.loss_rows_in_place(logits_NW, *arguments)
            torch.autograd.graph.increment_version(logits_NW)
            gradient_NW = logits_NW
        else:
            *rows, gradient_NW = torch.ops.logitstore.loss_rows_and_gradient(logits_NW, *arguments)
        ctx.save_for_backward(gradient_NW, arguments[_UPSTREAM])
        ctx.mark_non_differentiable(rows[1], rows[2])
        ctx.set_materialize_grads(False)
        return tuple(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_N, _kl, _ce):
        gradient_NW, expected_N = ctx.saved_tensors
        others = (None,) * (len(ctx.needs_input_grad) - 1)
        if upstream_N is None:
            return None, *others
        factor_N = torch.where(expected_N == 0, 1, upstream_N / expected_N)
        if torch.compiler.is_compiling():
            return (gradient_NW * factor_N[:, None]).to(gradient_NW.dtype), *others
        if graph_is_kept():
            gradient_NW = gradient_NW.clone()
        torch.ops.logitstore.scale_rows_in_place(gradient_NW, factor_N)
        return gradient_NW, *others
