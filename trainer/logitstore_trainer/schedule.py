"""The learning rate of the bundled trainer: a linear warm-up in which every step trains, then half a cosine to zero.

transformers' own schedule starts its warm-up at 0, so its first step changes nothing, and a run of one step trains
nothing at all. Here warm-up step i of n, counted from 0, takes (i + 1) / (n + 1) of the peak; the cosine is the same.
"""

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(optimizer: Optimizer, n_warmup: int, n_steps: int) -> LambdaLR:
    """The schedule of a run of n_steps optimizer steps, the first n_warmup of them below the peak."""
    return LambdaLR(optimizer, partial(share_of_peak, n_warmup=n_warmup, n_steps=n_steps))


def share_of_peak(step: int, n_warmup: int, n_steps: int) -> float:
    """The learning rate of a step, counted from 0, over the peak: in (0, 1], and 0 from n_steps on."""
    if step < n_warmup:
        return (step + 1) / (n_warmup + 1)
    share_done = (step - n_warmup) / max(1, n_steps - n_warmup)
    return 0.5 * (1 + math.cos(math.pi * min(share_done, 1.0)))
