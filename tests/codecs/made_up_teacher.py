"""A made-up teacher whose tails can be predicted: its hidden state is linear in both tokens, plus noise."""

import math

import numpy as np
import torch

from logitstore.logits_source import FactoredLogits
from logitstore.tail_fit import TailFitSettings

V, D = 307, 12
SETTINGS = TailFitSettings(width=12, hidden=16, rows_seen=40_000, batch_rows=256, columns=128, lr=5e-3)


def teacher_samples(seed: int, n_samples: int = 30, length: int = 40, full: bool = False) -> list:
    """(logits, input_ids, None): logits of a made-up teacher whose hidden state hangs on both tokens, and noise."""
    head = torch.randn(V, D, generator=torch.Generator().manual_seed(7)).numpy()
    maps = np.random.default_rng(8).standard_normal((2, D, D)).astype(np.float32) / math.sqrt(D)
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(n_samples):
        ids = rng.integers(0, V, length)
        hidden = 0.4 * rng.standard_normal((length, D)).astype(np.float32) + 0.5 * head[ids] @ maps[0]
        hidden[:-1] += 0.5 * head[ids[1:]] @ maps[1]
        logits = FactoredLogits(hidden, head)
        samples.append((hidden @ head.T if full else logits, ids, None))
    return samples
