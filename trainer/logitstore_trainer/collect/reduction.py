"""From chunks of the teacher's logits to what a codec keeps: the top k and varopt's samples on the teacher's device.

rskd's samples are drawn in numpy, for which a chunk's logits are moved to the CPU a few MiB at a time; so are varopt's
on a device without float64. Uniforms depend on the text alone (logitstore/sampling.py), so that neither the batches nor
the device decide what is drawn.

Letters: N kept rows of a batch, n rows of a chunk, U uniforms a row, V columns of the head.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from logitstore_kernels import SampledRows, topk_with_tail, varopt_sample

from logitstore import TeacherTargets
from logitstore.codecs.checks import require_tables
from logitstore.codecs.interface import Codec
from logitstore.codecs.sampled import SampledCodec
from logitstore.codecs.varopt import VarOptCodec
from logitstore_trainer.collect.forward import Reduce


def reduction_for(codec: Codec, sequences: Sequence[np.ndarray], keep_masks: Sequence[np.ndarray | None]) -> Reduce:
    """What ChunkedForward.reduced is to call on the logits of this batch, and of this batch alone.

    sequences: B arrays [L_b] of token ids; keep_masks: B arrays [L_b - 1] bool, or None where every row is kept.
    """
    if not isinstance(codec, SampledCodec):
        top = partial(topk_with_tail, k=codec.k, vocab_size=codec.vocab_size)
        return top if codec.tail_step is None else partial(_top_and_coefs, codec, top)
    uniforms = [codec.uniforms(ids) for ids in sequences]
    kept = [u if keep_mask is None else u[keep_mask] for u, keep_mask in zip(uniforms, keep_masks, strict=True)]
    return _Sampler(codec, np.concatenate(kept))


def reduced_targets(
    codec: Codec, columns: Sequence[torch.Tensor], *, input_ids: np.ndarray, keep_mask: np.ndarray | None
) -> TeacherTargets:
    """The targets of one sequence, from its rows as reduction_for left them."""
    if isinstance(codec, SampledCodec):
        return codec.targets_from_samples(*columns, input_ids=input_ids, keep_mask=keep_mask)
    top, coefs = columns[:4], columns[4] if len(columns) > 4 else None
    return codec.targets_from_topk(*top, input_ids=input_ids, keep_mask=keep_mask, teacher_coefs=coefs)


def _top_and_coefs(
    codec: Codec, top: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], logits_nV: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The top k, and the coefficients that corrections of a predicted tail are coded against (on the CPU)."""
    coefs = require_tables(codec).predictor.teacher_coefs(logits_nV, np.arange(len(logits_nV)))
    return (*top(logits_nV), torch.from_numpy(coefs))


class _Sampler:
    """Draws the rows of a batch chunk by chunk; the next chunk takes the uniforms [N, U] where the last one stopped."""

    def __init__(self, codec: SampledCodec, uniforms_NU: np.ndarray) -> None:
        self._codec, self._uniforms_NU, self._n_drawn = codec, uniforms_NU, 0

    def __call__(self, logits_nV: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = slice(self._n_drawn, self._n_drawn + len(logits_nV))
        self._n_drawn = rows.stop
        if isinstance(self._codec, VarOptCodec) and logits_nV.device.type != "mps":
            return _varopt_on_device(self._codec, logits_nV, torch.from_numpy(self._uniforms_NU[rows, 0]))
        samples = self._codec.sample_rows(logits_nV, np.arange(len(logits_nV)), self._uniforms_NU[rows])
        return tuple(torch.from_numpy(column) for column in samples)


def _varopt_on_device(codec: VarOptCodec, logits_nV: torch.Tensor, uniforms_n: torch.Tensor) -> SampledRows:
    """What codec.sample_rows returns, drawn where the logits are; ValueError for logits that are no distribution."""
    samples = varopt_sample(
        logits_nV, codec.k, uniforms_n.to(logits_nV.device), max_weight=codec.max_weight, vocab_size=codec.vocab_size
    )
    unusable = samples.logweights_NK.isnan().any(dim=1).nonzero()[:, 0]
    if len(unusable):
        raise ValueError(
            f"logits of row {int(unusable[0])} have NaN, +inf or no finite value; a distribution needs one"
        )
    return samples
