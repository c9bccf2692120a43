"""The loss of hidden states through a linear head, by row chunks: logits, their gradient in place, three products.

A chunk's logits are one buffer, over which the loss writes their gradient; from that come the gradients of the hidden
states, of the weight and of the bias, before the next chunk takes the buffer. Beside it live the gradient of the
hidden states and, in float32 or wider, those of weight and bias, to which a chunk's part is added a block of the
vocabulary at a time. On an accelerator that part is the result of a product in the logits' dtype, and rounded to it.

Letters: N rows, C rows of a chunk, D width, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from logitstore_kernels.autocast import without_autocast
from logitstore_kernels.dispatch import loss_rows
from logitstore_kernels.loss_arguments import compute_dtype
from logitstore_kernels.loss_terms import LossRows, LossTerms
from logitstore_kernels.teacher_batch import TeacherBatch
from logitstore_kernels.teacher_rows import rows_of

# Fewer rows than 2,048 at a time, and an accelerator spends its time on adding up the weight's gradient.
_ACCELERATOR_ROWS = 2048
_CPU_BYTES = 64 << 20
_CPU_LEAST_ROWS = 128
# Where a product of half-precision matrices cannot be added to a float32 one without its own being rounded first.
_WIDENED_PRODUCTS_ON = ("cpu",)
# The rows of the buffer begin at multiples of 16 bytes, and more, whatever V is.
_STRIDE_MULTIPLE = 64
_WEIGHT_BLOCK = 16_384


class LinearHead(NamedTuple):
    """Hidden states and the head that makes logits of them, all of the logits' dtype and without graphs."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None


class HeadGradients(NamedTuple):
    """hidden_ND of the logits' dtype, the others of the dtype to compute in; None where it is not wanted."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None


def linear_chunk_rows(
    n_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device, *, free_bytes: int | None = None
) -> int:
    """The rows whose logits are held at a time: chunks of one size but for the last.

    On a CPU 64 MiB of logits, though 128 rows at least. On an accelerator 2,048 rows at least where there are as many,
    fewer than twice that; or half of it as often as it takes for two such buffers to fit into free_bytes (None: there
    is room).
    """
    if device.type == "cpu":
        most_rows = max(_CPU_LEAST_ROWS, _CPU_BYTES // (vocab_size * dtype.itemsize))
    else:
        most_rows = -(-n_rows // max(1, n_rows // _ACCELERATOR_ROWS))
        while free_bytes is not None and most_rows > 1 and 2 * most_rows * vocab_size * dtype.itemsize > free_bytes:
            most_rows = -(-most_rows // 2)
    n_chunks = max(1, -(-n_rows // most_rows))
    return max(1, -(-n_rows // n_chunks))


def free_bytes_on(device: torch.device) -> int | None:
    """What a CUDA device can still allocate, the allocator's own reserve included; None where nobody says."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    reserve_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserve_bytes


@torch.no_grad()
def linear_loss_rows(
    head: LinearHead,
    teacher: TeacherBatch,
    labels_N: Tensor,
    counted_N: Tensor,
    terms: LossTerms,
    *,
    chunk_rows: int,
    upstream: Tensor | None,
    wanted: tuple[bool, bool, bool],
    skip_uncounted: bool | None = None,
) -> tuple[LossRows, HeadGradients]:
    """The values of every row and the gradients of sum(upstream * loss_N), without any [N, V] tensor.

    upstream: 0 axes or [N], in the dtype to compute in; None where no gradient is wanted.
    wanted: whether the gradient of hidden_ND, weight_VD and bias_V is; each where it is not is None.
    skip_uncounted: whether rows that do not count are left out, as by default only on a CPU; see chunked_loss_rows.
    """
    if skip_uncounted is None:
        skip_uncounted = labels_N.device.type == "cpu"
    if skip_uncounted and not counted_N.all():
        return _of_counted_rows(head, teacher, labels_N, counted_N, terms, chunk_rows, upstream, wanted)
    n_rows, dtype = len(labels_N), compute_dtype(head.hidden_ND)
    values = LossRows(*(torch.zeros(n_rows, dtype=dtype, device=labels_N.device) for _ in range(3)))
    gradients = _new_gradients(head, dtype, wanted if upstream is not None else (False,) * 3)
    buffer_CV = new_logits(head, min(chunk_rows, n_rows))
    with without_autocast(labels_N.device):
        for start in range(0, n_rows, chunk_rows):
            rows = slice(start, min(start + chunk_rows, n_rows))
            # 0 * NaN is NaN in the weight's gradient, so that rows that do not count must hold no NaN.
            hidden_CD = torch.where(counted_N[rows, None], head.hidden_ND[rows], 0)
            logits_CV = buffer_CV[: len(hidden_CD)]
            write_logits(logits_CV, hidden_CD, head)
            upstream_C = upstream[rows] if upstream is not None and upstream.dim() else upstream
            part = (rows_of(teacher, rows), labels_N[rows], counted_N[rows], terms)
            chunk_values, gradient_CV = _loss_and_gradient(logits_CV, part, upstream_C)
            for whole, chunk in zip(values, chunk_values, strict=True):
                whole[rows] = chunk
            if gradient_CV is not None:
                _add_gradients(gradients, gradient_CV, hidden_CD, head, rows)
    return values, gradients


def _of_counted_rows(head, teacher, labels_N, counted_N, terms, chunk_rows, upstream, wanted):
    """What linear_loss_rows returns, computed for the rows that count and 0 in the others."""
    rows = counted_N.nonzero()[:, 0]
    values, gradients = linear_loss_rows(
        head._replace(hidden_ND=head.hidden_ND[rows]), rows_of(teacher, rows), labels_N[rows], counted_N[rows], terms,
        chunk_rows=chunk_rows, upstream=upstream[rows] if upstream is not None and upstream.dim() else upstream,
        wanted=wanted,
    )  # fmt: skip
    values = LossRows(*(part.new_zeros(len(labels_N)).index_copy_(0, rows, part) for part in values))
    if gradients.hidden_ND is not None:
        hidden_ND = torch.zeros_like(head.hidden_ND).index_copy_(0, rows, gradients.hidden_ND)
        gradients = gradients._replace(hidden_ND=hidden_ND)
    return values, gradients


def _new_gradients(head: LinearHead, dtype: torch.dtype, wanted: tuple[bool, bool, bool]) -> HeadGradients:
    hidden_ND, weight_VD, bias_V = head
    return HeadGradients(
        torch.empty_like(hidden_ND) if wanted[0] else None,
        torch.zeros_like(weight_VD, dtype=dtype) if wanted[1] else None,
        torch.zeros_like(bias_V, dtype=dtype) if wanted[2] else None,
    )


def new_logits(head: LinearHead, n_rows: int) -> Tensor:
    """A buffer for the logits of n_rows rows, [n_rows, V], not filled."""
    vocab_size = len(head.weight_VD)
    stride = -(-vocab_size // _STRIDE_MULTIPLE) * _STRIDE_MULTIPLE
    return head.hidden_ND.new_empty(n_rows, stride)[:, :vocab_size]


def write_logits(logits_CV: Tensor, hidden_CD: Tensor, head: LinearHead) -> None:
    """Mutates logits_CV to what the head makes of hidden_CD, rows of its hidden states."""
    if head.bias_V is None:
        torch.mm(hidden_CD, head.weight_VD.T, out=logits_CV)
    else:
        torch.addmm(head.bias_V, hidden_CD, head.weight_VD.T, out=logits_CV)


def _loss_and_gradient(logits_CV: Tensor, part: tuple, upstream: Tensor | None) -> tuple[LossRows, Tensor | None]:
    """The chunk's values and the gradient of its logits * upstream (0 axes or [C]), written over the logits."""
    if upstream is None:
        one = torch.ones((), dtype=compute_dtype(logits_CV), device=logits_CV.device)
        return loss_rows(logits_CV, *part, expected_upstream=one), None
    with torch.enable_grad():
        leaf_CV = logits_CV.detach().requires_grad_()
        values = loss_rows(leaf_CV, *part, expected_upstream=upstream, inplace=True)
        (gradient_CV,) = torch.autograd.grad(values.loss_N, leaf_CV, upstream.expand(len(leaf_CV)))
    return LossRows(*(value.detach() for value in values)), gradient_CV


def _add_gradients(
    gradients: HeadGradients, gradient_CV: Tensor, hidden_CD: Tensor, head: LinearHead, rows: slice
) -> None:
    """Mutates `gradients` by what a chunk contributes."""
    if gradients.hidden_ND is not None:
        torch.mm(gradient_CV, head.weight_VD, out=gradients.hidden_ND[rows])
    if gradients.weight_VD is not None:
        for start in range(0, gradient_CV.shape[1], _WEIGHT_BLOCK):
            tokens = slice(start, start + _WEIGHT_BLOCK)
            if gradients.weight_VD.dtype == gradient_CV.dtype:
                gradients.weight_VD[tokens].addmm_(gradient_CV[:, tokens].T, hidden_CD)
            elif gradient_CV.device.type in _WIDENED_PRODUCTS_ON:
                dtype = gradients.weight_VD.dtype
                gradients.weight_VD[tokens].addmm_(gradient_CV[:, tokens].to(dtype).T, hidden_CD.to(dtype))
            else:
                gradients.weight_VD[tokens] += gradient_CV[:, tokens].T @ hidden_CD
    if gradients.bias_V is not None:
        gradients.bias_V.add_(gradient_CV.sum(dim=0, dtype=gradients.bias_V.dtype))
