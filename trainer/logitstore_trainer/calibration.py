"""Calibration: how often a model's first guess is right, against how sure it was (Guo et al. 2017).

Rows go into equal bins of the probability of the first guess, (0, 1/15], ..., (14/15, 1]. The expected calibration
error is the mean over rows of |share that is right - mean confidence| of their bin. It is biased upward where bins hold
few rows, so compare models on the same text.

Letters: N rows, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch

N_BINS = 15


@dataclass(frozen=True)
class CalibrationBin:
    """One bin of confidence: rows in it, their mean confidence, and the share of them whose first guess is the label.

    The means are None in a bin without rows.
    """

    n_rows: int
    mean_confidence: float | None
    accuracy: float | None


def calibration_sums(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Sums over rows by bin [3, N_BINS] in float64 on the CPU: rows, confidence, first guesses that are the label."""
    confidence_N, guess_N = logits_NV.float().softmax(dim=1).max(dim=1)
    confidence_N = confidence_N.double().cpu()
    bin_N = (confidence_N * N_BINS).ceil().long().sub(1).clamp(0, N_BINS - 1)
    right_N = (guess_N == labels_N).double().cpu()
    per_row_3N = torch.stack([torch.ones_like(confidence_N), confidence_N, right_N])
    return torch.zeros(3, N_BINS, dtype=torch.float64).index_add(1, bin_N, per_row_3N)


def calibration_error(sums_3M: torch.Tensor) -> float:
    """The expected calibration error in [0, 1] of calibration_sums: sum over bins of |right - confidence| / rows."""
    n_rows, confidence, right = sums_3M
    return float((right - confidence).abs().sum() / n_rows.sum())


def calibration_bins(sums_3M: torch.Tensor) -> list[CalibrationBin]:
    """The bins of calibration_sums, lowest confidence first."""
    columns: list[list[Any]] = sums_3M.T.tolist()
    return [
        CalibrationBin(int(n), confidence / n if n else None, right / n if n else None)
        for n, confidence, right in columns
    ]
