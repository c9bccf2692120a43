"""A tail model in fewer coefficients: the r directions that hold most of what tails differ by.

A dense tail costs r multiply-adds a token of the vocabulary, so that a model of fewer coefficients is cheaper to train
with; what lies outside its directions is lost. Directions are those of the greatest second moment of prediction and
left-over together, in the Fisher-whitened coordinates of the model, so that what is lost is the least in KL, to second
order. Within them the ones that are predicted worst come first, as corrections want it.

Letters: R rows, r coefficients, p width of the embedding, V vocabulary.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from logitstore.tail_fit import drawn_batch
from logitstore.tail_model import TailModel, model_tensors, predicted_coefs
from logitstore.tail_rows import TailRows

if TYPE_CHECKING:
    from torch import Tensor

MEASURED_ROWS = 30_000
N_ENTRIES = 16
FEW, FINE_STEP = 256, 0.11


def default_rank(tail_step: float | None) -> int | None:
    """How many coefficients a codec of this tail_step is fitted with: FEW, or None for all, where corrections are fine.

    Corrections can say of the left-over only what lies along the directions, so all coefficients pay where steps are
    fine. On the teacher that was measured (benchmarks/results/codec_checks.jsonl) they save 1 % of the KL of FEW at 24
    bytes a token and less below, 3 % at 40, 8 % at 56; they cost twice the arithmetic to train with.
    """
    return None if tail_step is not None and tail_step < FINE_STEP else FEW


def with_rank(model: TailModel, rows: TailRows, rank: int, *, seed: int = 0) -> TailModel:
    """The model with `rank` coefficients in place of its own, which must be all directions of the rows' head.

    Raises ValueError for a rank below 1 or above the model's.
    """
    if not 1 <= rank <= model.rank:
        raise ValueError(f"rank must be 1 to {model.rank}, the coefficients that the model has; got {rank}")
    if rank == model.rank:
        return model
    import torch

    predicted_Rr, left_Rr, weight_R = _second_moments(model, rows, torch.Generator().manual_seed(seed))
    share_R1 = (weight_R / weight_R.sum())[:, None]
    mean_r = (predicted_Rr * share_R1).sum(0)
    spread_Rr = predicted_Rr - mean_r
    left_rr = left_Rr.T @ (left_Rr * share_R1)
    _, vectors = torch.linalg.eigh((spread_Rr.T @ (spread_Rr * share_R1) + left_rr).double())
    kept = vectors[:, -rank:]
    _, turned = torch.linalg.eigh(kept.T @ left_rr.double() @ kept)
    directions = (kept @ turned.flip(1)).float().numpy()
    arrays = dict(model.arrays)
    basis = arrays["basis"].astype(np.float32)
    mean = mean_r.numpy()
    arrays["bias"] = arrays["bias"] + basis @ mean
    arrays["basis"] = np.ascontiguousarray((basis @ directions).astype(np.float16))
    arrays["coefs_map"] = np.ascontiguousarray(arrays["coefs_map"] @ directions)
    arrays["coefs_bias"] = (arrays["coefs_bias"] - mean) @ directions
    return replace(model, arrays=arrays)


def _second_moments(model: TailModel, rows: TailRows, generator: Any) -> tuple["Tensor", "Tensor", "Tensor"]:
    """(predicted coefficients, what they leave over, weight) of a sample of rows with 16 entries."""
    import torch

    tensors = model_tensors(model)
    # basis = lm_head @ directions and bias = the head's bias + lm_head @ offset: where a hidden state lies in both
    known = torch.cat([tensors["basis"].double(), (tensors["bias"] - rows.bias).double()[:, None]], dim=1)
    *directions, offset = torch.linalg.lstsq(rows.lm_head.double(), known).solution.T
    to_coefs = torch.linalg.pinv(torch.stack(directions, dim=1)).T.float()
    starts = torch.searchsorted(rows.sequence, torch.arange(rows.n_sequences + 1))
    predicted, left, weights, n_rows = [], [], [], 0
    with torch.inference_mode():
        for sequence in torch.randperm(rows.n_sequences, generator=generator).tolist():
            batch = drawn_batch(rows, starts, [sequence], (N_ENTRIES, N_ENTRIES), generator)
            coefs = predicted_coefs(tensors, batch.inputs)[batch.at]
            teacher = (batch.hidden - offset.float()) @ to_coefs
            predicted.append(coefs)
            left.append(teacher - coefs)
            weights.append(batch.weight)
            n_rows += len(coefs)
            if n_rows >= MEASURED_ROWS:
                break
    return torch.cat(predicted), torch.cat(left), torch.cat(weights)
