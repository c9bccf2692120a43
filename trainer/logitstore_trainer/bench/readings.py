"""How what rivals store is read back as a distribution over the vocabulary, and the entries that they store.

Letters: R rows, k entries kept, V vocabulary. T is the temperature.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from logitstore.logits_source import iter_logit_chunks
from logitstore.topk import topk_with_tail
from logitstore_trainer.bench.logits_file import LogitsSample

_LEAST_MISSING_P = 1e-8


def missing_mass_uniform(
    ids_RK: NDArray[Any], logps_RK: NDArray[np.float32], vocab_size: int, temperature: float
) -> NDArray[np.float32]:
    """ln q_T [R, V]: entries as stored, 1 - their mass spread evenly over the others (1e-8 each at least), tempered."""
    k = ids_RK.shape[1]
    logps_RK = logps_RK.astype(np.float32)
    missing_R1 = 1.0 - np.exp(logps_RK.astype(np.float64)).sum(axis=1, keepdims=True)
    fill_R1 = np.log(np.maximum(missing_R1 / max(vocab_size - k, 1), _LEAST_MISSING_P)).astype(np.float32)
    terms_RK = np.exp(logps_RK.astype(np.float64) / temperature)
    total_R1 = terms_RK.sum(axis=1, keepdims=True) + (vocab_size - k) * np.exp(fill_R1.astype(np.float64) / temperature)
    log_total_R1 = np.log(total_R1)
    dense_RV = np.repeat((fill_R1 / temperature - log_total_R1).astype(np.float32), vocab_size, axis=1)
    tempered_RK = (logps_RK / temperature - log_total_R1).astype(np.float32)
    np.put_along_axis(dense_RV, ids_RK.astype(np.int64), tempered_RK, axis=1)
    return dense_RV


def top_entries(sample: LogitsSample, k: int, vocab_size: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The k most probable tokens of each row: ids [R, k], log-probs [R, k] descending."""
    rows = np.arange(len(sample.input_ids) - 1)
    parts = [topk_with_tail(part, k) for part in iter_logit_chunks(sample.logits, rows, vocab_size=vocab_size)]
    return np.concatenate([part.ids for part in parts]), np.concatenate([part.logps for part in parts])


def log_softmax_rows(x_RV: NDArray[Any], temperature: float) -> NDArray[np.float32]:
    """float32 [R, V], computed in float64 in row chunks of 16 MiB."""
    import torch

    out_RV = np.empty(x_RV.shape, np.float32)
    n_chunk = max(1, (16 << 20) // (8 * x_RV.shape[1]))
    for start in range(0, len(x_RV), n_chunk):
        part = torch.from_numpy(np.array(x_RV[start : start + n_chunk])).double() / temperature
        out_RV[start : start + n_chunk] = part.log_softmax(1).numpy()
    return out_RV
