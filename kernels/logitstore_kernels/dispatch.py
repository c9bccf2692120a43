"""Which path computes a loss from logits: row chunks in plain PyTorch, on every device. Decided here alone.

Letters: N rows, W logits columns.
"""

from torch import Tensor

from logitstore_kernels.chunk_math import LossTerms
from logitstore_kernels.chunked import LossRows, chunked_loss_rows
from logitstore_kernels.teacher_batch import TeacherBatch


def loss_rows(
    logits_NW: Tensor,
    teacher: TeacherBatch,
    labels_N: Tensor,
    counted_N: Tensor,
    terms: LossTerms,
    *,
    expected_upstream: Tensor,
    inplace: bool = False,
) -> LossRows:
    """The values of each row [N], 0 where counted_N is False, differentiable once; see chunked_loss_rows."""
    return chunked_loss_rows(
        logits_NW, teacher, labels_N, counted_N, terms, expected_upstream=expected_upstream, inplace=inplace
    )
