"""Losses that train a student on compressed teacher distributions, and the reduction of teacher logits to them."""

from logitstore_kernels.distillation_loss import distillation_loss, distillation_loss_parts
from logitstore_kernels.linear_loss import fused_linear_distillation_loss, fused_linear_distillation_loss_parts
from logitstore_kernels.loss_arguments import DistillationLossParts
from logitstore_kernels.teacher_batch import TeacherBatch
from logitstore_kernels.topk import TopKWithTail, topk_with_tail
from logitstore_kernels.topk_linear import topk_with_tail_linear
from logitstore_kernels.varopt import SampledRows, varopt_sample
from logitstore_kernels.vocab_parallel import (
    vocab_parallel_distillation_loss,
    vocab_parallel_distillation_loss_parts,
)

__all__ = [
    "DistillationLossParts",
    "SampledRows",
    "TeacherBatch",
    "TopKWithTail",
    "distillation_loss",
    "distillation_loss_parts",
    "fused_linear_distillation_loss",
    "fused_linear_distillation_loss_parts",
    "topk_with_tail",
    "topk_with_tail_linear",
    "varopt_sample",
    "vocab_parallel_distillation_loss",
    "vocab_parallel_distillation_loss_parts",
]
